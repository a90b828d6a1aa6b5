"""One pass over held-out pictures, of any number: scores and codes a picture stay, moments of features, and the few
pictures that are shown."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.eval import frechet

SHOWN, FEW = 8, 4  # pictures in the grid; the worst, and the best


class Spread:
    """A source of at most `limit` examples of another, spread evenly over it: its first may be all of one class."""

    def __init__(self, source, limit=None):
        self.source, self.read_threads = source, getattr(source, "read_threads", 1)
        self.numbers = np.linspace(0, len(source) - 1, min(limit or len(source), len(source))).round().astype(int)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.source[self.number(i)]

    def number(self, i):
        return int(self.numbers[i])

    def describe(self, i):
        return self.source.describe(self.number(i)) if hasattr(self.source, "describe") else f"example {self.number(i)}"


def wanted(n: int) -> np.ndarray:
    """Indices of the pictures that the grid shows, of n."""
    return np.unique(np.linspace(0, n - 1, SHOWN).round().astype(np.int32))


def labels(task) -> list[str]:
    """Of the reconstructions that `task.evaluate` gives, behind the original: "sampler@k"."""
    return [f"{sampler['title']}@{k}" for sampler in task.samplers for k in task.token_counts]


def look(task, variables, judge, features, wanted, batch) -> dict:
    """What is to be known of a batch; all of it is small. To be compiled, with the output on every device.

    Args:
      task: its `evaluate` rebuilds the pictures.
      variables: of the model.
      judge: None, or f(a, b) -> [B], a distance of pictures in [0, 1].
      features: None, or f(pictures in [0, 1]) -> [B D].
      wanted: indices of the pictures to show.
      batch: `image`, `mask`, and `index` int32 [B].

    Returns
      rows: name -> [B], those of `task.evaluate`, "lpips/<label>", "mask" and "index".
      features: [1 + K B D], of originals and reconstructions.
      kept: "shown", "worst" and "best" (by the first sampler's last count) -> dict(key, index, valid [n], pictures
        uint8 [1 + K n H W 3]), the smallest keys first.
    """
    params, mutable = variables["params"], {name: tree for name, tree in variables.items() if name != "params"}
    out = task.evaluate(params, mutable, {}, batch, jax.random.key(0))
    columns, mask, index = jnp.stack(out["pictures"]), batch["mask"], batch["index"]  # [1 + K B H W 3]
    unit = lambda x: x.astype(jnp.float32) / 255
    both = lambda x: (judge and judge(unit(columns[0]), unit(x)), features and features(unit(x)))
    distances, found = jax.lax.map(both, columns)  # one program for all columns
    rows = out["rows"] | {"mask": mask, "index": index}
    if judge:
        rows |= {f"lpips/{label}": distances[i + 1] for i, label in enumerate(labels(task))}
    score = rows[f"psnr/{task.samplers[0]['title']}@{task.token_counts[-1]}"]
    matches = index == wanted[:, None]  # [n B]
    keys = {"shown": index.astype(jnp.float32), "worst": score, "best": -score}
    few = {name: jnp.argsort(jnp.where(mask, keys[name], jnp.inf))[:FEW] for name in ("worst", "best")}
    few["shown"] = matches.argmax(1)
    kept = {
        name: {
            "key": keys[name][chosen],
            "index": index[chosen],
            "valid": matches.any(1) if name == "shown" else mask[chosen],
            "pictures": columns[:, chosen],
        }
        for name, chosen in few.items()
    }
    return {"rows": rows, "kept": kept, "features": found}


def collect(batches: Iterable[dict], labels: Sequence[str]) -> tuple[dict, dict, dict]:
    """What a pass leaves behind, on the host.

    Args:
      batches: of `look`, as numpy.
      labels: of the reconstructions.

    Returns rows name -> [n], in the order of the source; kept: "shown", "worst", "best" -> [(key, index, uint8
    [1 + K H W 3]), ...]; and Fréchet moments, {} without features: label -> Moments, and "originals" -> those of two
    random halves.
    """
    rows, kept, moments = [], {"shown": [], "worst": [], "best": []}, {}
    for batch in batches:
        mask, features = batch["rows"]["mask"], batch["features"]
        rows.append({name: values[mask] for name, values in batch["rows"].items()})
        for name, few in batch["kept"].items():
            columns = few["pictures"].swapaxes(0, 1)
            entries = zip(few["key"].tolist(), few["index"].tolist(), columns, few["valid"], strict=True)
            both = kept[name] + [(key, index, pictures.copy()) for key, index, pictures, valid in entries if valid]
            kept[name] = sorted(both, key=lambda entry: entry[:2])[: SHOWN if name == "shown" else FEW]
        if features is not None:
            first = frechet.first_half(batch["rows"]["index"])
            moments = moments or dict.fromkeys(["first", "second", *labels], frechet.empty(features.shape[-1]))
            parts = [("first", 0, mask & first), ("second", 0, mask & ~first)]
            for name, column, counts in parts + [(label, i + 1, mask) for i, label in enumerate(labels)]:
                moments[name] = frechet.update(moments[name], features[column], counts)
    rows = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    order = np.argsort(rows["index"])  # several processes take turns
    if moments:
        moments["originals"] = moments.pop("first"), moments.pop("second")
    return {name: values[order] for name, values in rows.items()}, kept, moments
