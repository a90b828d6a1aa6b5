"""Procedural pictures with exact labels, captions and per-patch label maps: no file, and nothing in them is unknown."""

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS = {
    "red": (225, 40, 45), "orange": (245, 135, 20), "yellow": (250, 215, 30), "green": (45, 165, 60),
    "blue": (40, 85, 225), "purple": (140, 50, 185), "brown": (120, 70, 35), "black": (25, 25, 25),
}  # fmt: skip
# Backgrounds are pale: every channel at least 190. Every colour above has one below 60: pixels tell the two apart.
PALE = (190, 256)
MAX_OBJECTS = 3


class Shapes:
    """One to three coloured shapes that do not touch, on a pale background; picture i depends on seed, split, i alone.

    `image` uint8 [size size 3], antialiased. `label` int32 = class of the main object, which is the largest:
    shape number x 8 + colour number. `caption` names the objects, the main one first: "a red circle and a blue square".
    `patch_labels` int32 [size/patch size/patch]: what most pixels of a patch belong to, 0 = background, 1 + class =
    object (the lower number wins a tie). No picture holds two objects of one class.

    Train and test pictures differ by construction: the red of the background is even in train and odd in test.

    Args:
      size: side in pixels.
      n: how many pictures.
      seed: whole number >= 0.
      split: "train" or "test".
      patch: side of a patch of `patch_labels`; divides `size`.
    """

    class_names = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)

    def __init__(self, size=64, n=10000, seed=0, split="train", patch=8):
        if split not in ("train", "test"):
            raise ValueError(f"Shapes has no split {split!r}: choose 'train' or 'test'.")
        if size < 16:
            raise ValueError(f"Shapes: size must be at least 16, got {size}: smaller shapes cannot be told apart.")
        if size % patch:
            raise ValueError(f"Shapes: patch={patch} must divide size={size}.")
        self.size, self.n, self.seed, self.split, self.patch = size, n, seed, split, patch

    def __len__(self):
        return self.n

    def scene(self, i):
        """Background colour [3] and the objects, the main one first: dicts of class_id, shape, colour, x, y, radius.

        The unit of x, y and radius is the side of the picture; y points down.
        """
        if not 0 <= i < self.n:
            raise IndexError(f"Shapes: picture {i} of {self.n}")
        is_test = self.split == "test"
        rng = np.random.default_rng([self.seed, is_test, i])
        background = rng.integers(*PALE, size=3)
        background[0] = background[0] & ~1 | is_test
        classes = rng.choice(len(self.class_names), size=rng.integers(1, MAX_OBJECTS + 1), replace=False)
        objects = []
        for k, class_id in enumerate(classes.tolist()):
            shape, colour = divmod(class_id, len(COLOURS))
            for _ in range(20):  # an object that finds no room is left out
                radius = rng.uniform(0.21, 0.28) if k == 0 else rng.uniform(0.09, 0.13)
                x, y = rng.uniform(radius + 0.04, 0.96 - radius, size=2)
                if all(np.hypot(x - o["x"], y - o["y"]) > radius + o["radius"] + 0.06 for o in objects):
                    names = {"shape": SHAPES[shape], "colour": tuple(COLOURS)[colour]}
                    objects.append({"class_id": class_id, **names, "x": x, "y": y, "radius": radius})
                    break
        return background, objects

    def __getitem__(self, i):
        background, objects = self.scene(i)
        centres = (np.arange(self.size) + 0.5) / self.size
        image = np.broadcast_to(background.astype(np.float32), (self.size, self.size, 3))  # [H W 3]
        grid = self.size // self.patch
        ids, counts = [0], [np.full((grid, grid), self.patch**2)]  # background first: [h w], pixels of each patch
        for o in sorted(objects, key=lambda o: o["class_id"]):
            x, y = centres[None] - o["x"], centres[:, None] - o["y"]  # [1 W], [H 1]
            distance = signed_distance(o["shape"], x, y, o["radius"])  # [H W]
            alpha = np.clip(0.5 - distance * self.size, 0, 1)[:, :, None].astype(np.float32)  # [H W 1]
            image = image + alpha * (np.array(COLOURS[o["colour"]], np.float32) - image)
            ids.append(1 + o["class_id"])
            counts.append((distance < 0).reshape(grid, self.patch, grid, self.patch).sum(axis=(1, 3)))
            counts[0] = counts[0] - counts[-1]
        caption = join_names([article(f"{o['colour']} {o['shape']}") for o in objects])
        return {
            "image": np.rint(image).astype(np.uint8),  # [H W 3]
            "label": np.int32(objects[0]["class_id"]),
            "caption": caption,
            "patch_labels": np.array(ids, np.int32)[np.argmax(counts, axis=0)],  # [h w]
        }


def signed_distance(shape, x, y, r):
    """Distance to the outline, negative inside, of a shape in the circle of radius `r`; x [1 W], y [H 1] -> [H W].

    Exact near straight edges, where antialiasing needs it; at corners it is a bound from below.
    """
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.71 * r
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - r) * 0.7071
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(x - 0.94 * r, y - 0.32 * r), np.maximum(y - 0.94 * r, x - 0.32 * r))
    return np.maximum(0.866 * np.abs(x) - 0.5 * y - 0.5 * r, y - 0.5 * r)  # triangle, one corner up


def article(noun):
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def join_names(names):
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
