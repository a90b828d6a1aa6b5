"""DINOv2: its arithmetic against float64 numpy on arrays under the published names, and the table over all sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxtok.build import build
from jaxtok.checkpoint import Checkpoints
from jaxtok.init_from import graft
from jaxtok.losses.alignment import Alignment
from jaxtok.nn.interpolate import cubic
from jaxtok.pretrained import vit
from jaxtok.pretrained.convert import flatten, match
from jaxtok.structs import Decoded

# width, depth, parameters: all that the published files hold, the mask token included
PUBLISHED = {
    "small": (384, 12, 22_056_576),
    "base": (768, 12, 86_580_480),
    "large": (1024, 24, 304_368_640),
    "giant": (1536, 40, 1_136_480_768),
}


def official(width, depth, swiglu=False, patch=14, grid=37):
    """{key: shape} of dinov2_vit?14_pretrain.pth."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    hidden = 8 * width // 3 if swiglu else 4 * width
    linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    if swiglu:
        linears |= {"mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden)}
    else:
        linears |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for i in range(depth):
        for name, shape in linears.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        names = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
        shapes |= {f"blocks.{i}.{name}": (width,) for name in names}
    return shapes


def hub(arrays):
    """Arrays under the official names -> under those of the hub's Dinov2Model."""
    words = {
        "blocks.": "encoder.layer.", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
        "attn.proj": "attention.output.dense", "mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token", "pos_embed": "embeddings.position_embeddings",
    }  # fmt: skip
    found = {}
    for key, array in arrays.items():
        for ours, theirs in words.items():
            key = key.replace(ours, theirs)
        key = f"layer{key}" if key.startswith("norm.") else key
        if "attn.qkv" in key:
            for name, third in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                found[key.replace("attn.qkv", f"attention.attention.{name}")] = third
        else:
            found[key] = array
    return found


def zeros(shapes):
    """Arrays that own one number each."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("names", [dict, hub], ids=["official", "hub"])
@pytest.mark.parametrize("size", PUBLISHED)
def test_the_table_covers_the_published_keys(size, names):
    width, depth, parameters = PUBLISHED[size]
    foreign = zeros(official(width, depth, swiglu=size == "giant"))
    assert sum(array.size for array in foreign.values()) == parameters
    foreign = vit.halved(names(foreign))
    fields = vit.sizes(foreign)
    mlp = "swiglu" if size == "giant" else "gelu"
    assert fields == dict(width=width, depth=depth, patch=14, mlp=mlp, grid=(37, 37), size=518)
    init, image = vit.ViT(**fields).init, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    like = jax.eval_shape(init, jax.random.key(0), image)["params"]
    pieces, report = match(foreign, vit.RULES, like)
    assert (report.unused, report.missing, report.mismatched) == ([], [], [])
    [aside] = report.set_aside.values()
    assert [key.rpartition(".")[2] for key in aside] == ["mask_token"]
    assert len(pieces) == len(foreign) - 1
    assert sum(leaf.size for leaf in flatten(like).values()) == parameters - width


# ---- the arithmetic ----


def tiny(swiglu=False):
    """Weights of a ViT of width 128 and two blocks, on pictures of 12 px in patches of 4."""
    rng = np.random.default_rng(0)
    shapes = official(128, 2, swiglu, patch=4, grid=3)
    if swiglu:  # 2/3 of 4 x 128, rounded down as ours; the giant's is a whole number
        shapes = {k: tuple({2 * 341: 2 * 341}.get(n, n) for n in shape) for k, shape in shapes.items()}
    near_one = lambda key: "norm" in key and key.endswith("weight") or "gamma" in key
    return {key: (rng.normal(size=shape) * 0.1 + near_one(key)).astype(np.float32) for key, shape in shapes.items()}


def norm(x, w, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def forward(weights, images):
    """float64 [B h w D], a token at a time where that is plainer."""
    w = {key: array.astype(np.float64) for key, array in weights.items()}
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    x = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    patches = [x[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] for i in range(3) for j in range(3)]
    kernel = w["patch_embed.proj.weight"]  # [D 3 4 4]
    x = [np.einsum("brsc,dcrs->bd", patch, kernel) + w["patch_embed.proj.bias"] for patch in patches]
    cls = np.broadcast_to(w["cls_token"][0, 0], x[0].shape)
    x = np.stack([cls, *x], 1) + w["pos_embed"]
    for block in ("blocks.0", "blocks.1"):
        q, k, v = np.split(linear(norm(x, w, f"{block}.norm1"), f"{block}.attn.qkv"), 3, -1)
        heads = []
        for head in (slice(0, 64), slice(64, 128)):
            logits = q[..., head] @ k[..., head].swapaxes(1, 2) / 8
            p = np.exp(logits - logits.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v[..., head])
        x = x + w[f"{block}.ls1.gamma"] * linear(np.concatenate(heads, -1), f"{block}.attn.proj")
        y = norm(x, w, f"{block}.norm2")
        if f"{block}.mlp.fc1.weight" in w:
            y = linear(y, f"{block}.mlp.fc1")
            y = linear(y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2, f"{block}.mlp.fc2")
        else:
            gate, value = np.split(linear(y, f"{block}.mlp.w12"), 2, -1)
            y = linear(gate / (1 + np.exp(-gate)) * value, f"{block}.mlp.w3")
        x = x + w[f"{block}.ls2.gamma"] * y
    return norm(x, w, "norm")[:, 1:].reshape(len(images), 3, 3, -1)


@pytest.mark.parametrize("swiglu", [False, True], ids=["gelu", "swiglu"])
def test_features_are_those_of_float64_numpy(swiglu):
    weights = tiny(swiglu)
    images = np.random.default_rng(1).integers(0, 256, (2, 12, 12, 3), dtype=np.uint8)
    config, params, report = vit.load(weights)
    features = jax.jit(build(config["tower"]).apply)({"params": params}, images)
    assert features.shape == (2, 3, 3, 128) and features.dtype == jnp.float32
    np.testing.assert_allclose(features, forward(weights, images), rtol=0, atol=1e-5)
    assert list(report.set_aside) == ["of DINOv2's own training"]


@pytest.mark.parametrize("swiglu", [False, True], ids=["gelu", "swiglu"])
def test_both_namings_give_the_same_parameters(swiglu):
    weights = tiny(swiglu)
    spec, params, _ = vit.load(weights)
    hubs, others, _ = vit.load(hub(weights))
    assert spec == hubs
    jax.tree.map(np.testing.assert_array_equal, params, others)


def test_a_converted_tower_is_found_by_init_from(tmp_path):
    """From a workdir of it, into the place of a frozen teacher, every leaf."""
    spec, params, _ = vit.load(tiny())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"ema": params})
    checkpoints.close()
    module = Alignment(build(spec["tower"]))
    decoded = Decoded(None, jnp.zeros((1, 8, 8, 3)), {"patches": jnp.zeros((1, 4, 16))})
    batch = {"image": jnp.zeros((1, 12, 12, 3), jnp.uint8)}
    ours = jax.jit(module.init)(jax.random.key(0), {"decoded": decoded}, batch)["params"]
    rules = ((".*", r"objective/repa/tower/\g<0>"),)
    tree, filled = graft({"objective": {"repa": ours}}, tmp_path, rules)
    assert set(filled) == {f"objective/repa/tower/{name}" for name in flatten(ours["tower"])}
    jax.tree.map(np.testing.assert_array_equal, tree["objective"]["repa"]["tower"], params)


def test_bad_weights_are_refused_by_name():
    weights = tiny()
    with pytest.raises(ValueError, match=r"missing .*\n  blocks/mlp/fc1/kernel\[1\]"):
        vit.load({key: a for key, a in weights.items() if key != "blocks.1.mlp.fc1.weight"})
    with pytest.raises(ValueError, match="no weights of DINOv2"):
        vit.load(weights | {"register_tokens": np.zeros((1, 4, 128), np.float32)})
    with pytest.raises(ValueError, match="no weights of DINOv2"):
        vit.load({"conv1.weight": np.zeros((4, 3, 3, 3))})


# ---- pictures and positions ----


@pytest.mark.parametrize("size", [31, 11])
def test_pictures_are_resized_as_by_pillow(size):
    # neither bright nor dark: Pillow clips between its two passes, too
    images = np.random.default_rng(0).integers(70, 186, (2, 20, 24, 3), dtype=np.uint8)
    ours = vit.resize(jnp.asarray(images), size)
    theirs = [np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC)) for image in images]
    assert ours.shape == (2, size, size, 3)
    assert np.abs(ours - np.stack(theirs)).max() < 1.5  # Pillow rounds twice, to whole numbers


def test_only_uint8_pictures_are_taken():
    with pytest.raises(ValueError, match="takes uint8 pictures, .* not float32"):
        vit.resize(jnp.zeros((1, 8, 8, 3)), 8)


def test_the_cubic_is_pytorchs():
    # half-way between two values: -0.09375, 0.59375, 0.59375, -0.09375; the first and last value stand for those beyond
    expected = [[0.5, 0.59375, -0.09375, 0], [0, -0.09375, 0.59375, 0.5]]
    np.testing.assert_allclose(cubic(4, 2, 0.5), expected, atol=1e-7)
    np.testing.assert_allclose(cubic(5, 5, 1.0), np.eye(5), atol=1e-7)


def test_positions_of_another_grid_are_dinov2s():
    table = np.random.default_rng(0).normal(size=(16, 3))
    np.testing.assert_array_equal(vit.positions(table, (4, 4), (4, 4)), table)
    ours = np.asarray(vit.positions(table, (4, 4), (6, 3))).reshape(6, 3, 3)

    def weights(i, m):  # of the four rows around the place of row i of m
        place = (i + 0.5) * 4 / (m + 0.1) - 0.5
        t, first = place - math.floor(place), math.floor(place)
        inner = lambda d: 1.25 * d**3 - 2.25 * d**2 + 1
        outer = lambda d: -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3
        rows = [min(max(first + k, 0), 3) for k in (-1, 0, 1, 2)]
        return list(zip(rows, (outer(1 + t), inner(t), inner(1 - t), outer(2 - t)), strict=True))

    for i in range(6):
        for j in range(3):
            expected = sum(a * b * table[4 * y + x] for y, a in weights(i, 6) for x, b in weights(j, 3))
            np.testing.assert_allclose(ours[i, j], expected, atol=1e-6)
