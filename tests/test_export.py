"""What is exported runs where it is meant to: in fresh processes without jaxtok, TensorFlow's without jax too."""

import functools
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import jaxtok
from configs import ar_flextok, kl_vae, maskgit_vqgan
from jaxtok import export
from jaxtok.bound import BoundTokenizer
from jaxtok.build import build
from jaxtok.checkpoint import Checkpoints, claim_workdir
from jaxtok.export import B
from tests import runs
from tests.generate import models
from tests.quantizers.test_in_a_tokenizer import BATCH, LFQ, VQ, task

N, VOCABULARY, CLASSES = 8, 64_000, 40
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
LABELS = np.array([3, 0, 39, 3, 7], np.int32)
DECODE, SAMPLE = dict(steps=2, guidance=2.0), dict(guidance=1.5, tokens=5)
int32 = functools.partial(np.asarray, dtype=np.int32)

# Blocks modules, and runs requests [(function, {input: array})] on what the page's loader gives: arrays, or the errors.
PROCESS = """
import pickle, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
{loader}
def run(name, inputs):
    try:
        return np.asarray({call})
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"

folder, requests = pickle.load(sys.stdin.buffer)
functions = {{name: load(folder, name) for name in {{name for name, _ in requests}}}}
pickle.dump([run(*request) for request in requests], open(sys.argv[1], "wb"))
assert not {blocked} & {{name.partition(".")[0] for name in sys.modules}}
"""
WITHOUT = {
    "stablehlo": ({"jaxtok", "flax", "tensorflow"}, "functions[name](*inputs.values())"),
    "savedmodel": ({"jaxtok", "flax", "jax", "jaxlib"}, "functions[name](**inputs)"),
    "onnx": ({"jaxtok", "flax", "jax", "jaxlib", "tensorflow"}, "functions[name](**inputs)"),
}


def needs(package, what):
    """Skips where a large package has no wheel: the extra "test" has it on Linux, jax2onnx on Python 3.11."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{what} needs {package}")


FORMATS = ["stablehlo", pytest.param("savedmodel", marks=needs("tensorflow", "SavedModel"))]


def in_a_fresh_process(folder, format, requests, tmp):
    """The results of requests, by the loader that docs/export.md prints."""
    loader = re.search(rf"^```python\n# {format}\n(.*?)^```$", (runs.ROOT / "docs/export.md").read_text(), re.M | re.S)[
        1
    ]
    blocked, call = WITHOUT[format]
    code = PROCESS.format(blocked=blocked, loader=loader, call=call)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-c", code, str(tmp / "results")]
    done = subprocess.run(command, input=pickle.dumps((str(folder), requests)), cwd=tmp, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads((tmp / "results").read_bytes())


def at_random(shapes, seed=0):
    """Arrays of these shapes, so that no path is closed by a zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(-0.3, 0.3, x.shape), x.dtype), shapes)


def write(workdir, config, **trees):
    """A workdir as a run leaves it, though nothing trained."""
    claim_workdir(workdir, config)
    for folder, some in ((workdir, ("ema", "mutable")), (workdir / "frozen", ("frozen",))):
        state = {name: trees[name] for name in some if trees.get(name)}
        if state:
            checkpoints = Checkpoints(folder)
            checkpoints.save(0, state)
            checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Workdir of a tiny FlexTok."""
    config = runs.tiny()
    trees = jax.eval_shape(build(config.task).init, jax.random.key(0), {"image": IMAGES})
    mutable = jax.tree.map(jnp.abs, at_random(trees["mutable"]))
    return write(tmp_path_factory.mktemp("tokenizer"), config, ema=at_random(trees["params"]), mutable=mutable)


@pytest.fixture(scope="module")
def generator(tokenizer, tmp_path_factory):
    """Workdir of a tiny AR over its codes."""
    config = ar_flextok.get_config("tiny")
    config.task.tokenizer, batch = str(tokenizer), {"codes": np.zeros((2, N), np.int32), "label": LABELS[:2]}
    trees = jax.eval_shape(build(config.task).init, jax.random.key(0), batch)
    frozen = {"tokenizer": jaxtok.load(tokenizer).variables}
    return write(tmp_path_factory.mktemp("generator"), config, ema=at_random(trees["params"], 1), frozen=frozen)


@pytest.fixture(scope="module")
def folders(tokenizer, generator, tmp_path_factory):
    """(format) -> the folders of both, exported once."""

    @functools.cache
    def exported(format):
        path = tmp_path_factory.mktemp(format)
        code = f"""
from jaxtok.export import export
export({str(tokenizer)!r}, {str(path / "tokenizer")!r}, {format!r}, decode={DECODE})
export({str(generator)!r}, {str(path / "generator")!r}, {format!r}, sample={SAMPLE}, decode={DECODE})
"""
        if format == "savedmodel":  # in a process of its own, so that no other test meets TensorFlow
            subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, check=True)
        else:
            exec(code, {})
        return path

    return exported


def pixels(bound, codes, seed, **options):
    """What jaxtok decodes, float32."""
    codes = bound.model.apply(bound.variables, jnp.asarray(codes), N, method="lookup")
    return bound.model.apply(bound.variables, codes, jax.random.key(seed), **options, method="decode")


@pytest.mark.parametrize("format", FORMATS)
def test_a_tokenizer_does_elsewhere_what_it_does_here(format, tokenizer, folders, tmp_path):
    bound = jaxtok.load(tokenizer)
    codes = np.asarray(bound.encode(IMAGES))
    some, wild = codes[:2], int32([[-7, 10**6, *codes[0, 2:]], codes[1]])
    decode = lambda codes, k, seed=3: ("decode", dict(codes=codes, k=int32(k), seed=int32(seed)))
    requests = [
        ("encode", dict(images=IMAGES)),
        ("encode", dict(images=IMAGES[:2])),
        decode(codes, 3),
        decode(some, N),
        decode(some, N, 4),
        ("reconstruct", dict(images=IMAGES[:2], k=int32(3), seed=int32(3))),
        # outside: clipped
        decode(some, 99),
        decode(some, 0),
        decode(some, 1),
        decode(wild, N),
        decode(np.clip(wild, 0, VOCABULARY - 1), N),
        # errors
        ("encode", dict(images=IMAGES[:, :8])),
        ("encode", dict(images=IMAGES.astype(np.float32))),
        decode(some[:, :5], 3),
        ("encode", dict(images=IMAGES[:0])),
    ]
    found = in_a_fresh_process(folders(format) / "tokenizer", format, requests, tmp_path)
    all5, two, first3, every, other, rebuilt, many, zero, one, clipped, inside, *errors = found
    np.testing.assert_array_equal(all5, codes)
    np.testing.assert_array_equal(two, some)
    assert len(np.unique(codes)) > 20 and first3.dtype == np.float32
    np.testing.assert_allclose(first3, pixels(bound, codes[:, :3], 3, **DECODE), atol=1e-4)
    np.testing.assert_allclose(every, pixels(bound, some, 3, **DECODE), atol=1e-4)
    np.testing.assert_allclose(rebuilt, pixels(bound, some[:, :3], 3, **DECODE), atol=1e-4)
    for different in (other, one, first3[:2]):
        assert np.abs(every - different).max() > 0.01
    np.testing.assert_array_equal(np.round(every * 255), bound.decode(some, seed=3, **DECODE))
    for a, b in ((many, every), (zero, one), (clipped, inside)):
        np.testing.assert_array_equal(a, b)
    for error in errors:
        assert re.match(r"(ValueError|InvalidArgumentError): ", error) and re.search("(?i)shape|tensor|dtype", error)


@pytest.mark.parametrize("format", FORMATS)
def test_a_generator_does_elsewhere_what_it_does_here(format, generator, folders, tmp_path):
    bound = jaxtok.load(generator)
    wild = int32([3, -1, CLASSES + 9, 3, 7])  # as many as LABELS: one program less
    sample = lambda labels, seed: ("sample", dict(labels=labels, seed=int32(seed)))
    codes = np.asarray(bound.sample(LABELS, seed=5, **SAMPLE))
    requests = [
        sample(LABELS, 5),
        sample(LABELS[:2], 5),
        sample(wild, 5),
        sample(int32([3, CLASSES, CLASSES, 3, 7]), 5),
        ("decode", dict(codes=codes, k=int32(5), seed=int32(5))),
        ("decode", dict(codes=codes, k=int32(2), seed=int32(5))),
        ("sample_decode", dict(labels=LABELS, seed=int32(5))),
    ]
    five, two, none, null, decoded, prefix, whole = in_a_fresh_process(
        folders(format) / "generator", format, requests, tmp_path
    )
    np.testing.assert_array_equal(five, codes)
    np.testing.assert_array_equal(two, bound.sample(LABELS[:2], seed=5, **SAMPLE))
    np.testing.assert_array_equal(none, null)
    assert (none < VOCABULARY).all() and (five != bound.sample(LABELS, seed=6, **SAMPLE)).any()
    tokenizer = BoundTokenizer(bound.task.codec, bound.variables["tokenizer"])
    np.testing.assert_allclose(decoded, pixels(tokenizer, codes, 5, **DECODE), atol=1e-4)
    np.testing.assert_allclose(prefix, pixels(tokenizer, codes[:, :2], 5, **DECODE), atol=1e-4)
    np.testing.assert_allclose(whole, decoded, atol=1e-4)


def test_the_folder_says_what_is_in_it(folders, tokenizer, tmp_path, capsys):
    about = json.loads((folders("stablehlo") / "tokenizer/export.json").read_text())
    decode = about["functions"]["decode"]
    assert decode["takes"] == {"codes": "int32 [B 8]", "k": "int32 []", "seed": "int32 []"}
    assert decode["gives"] == {"pixels": "float32 [B 16 16 3]"} and about["options"]["decode"] == DECODE
    stored = np.load(folders("stablehlo") / "tokenizer/weights.npz")
    of = {name: {path.split("/")[1] for path in one["weights"]} for name, one in about["functions"].items()}
    assert of == {"encode": {"encoder"}, "decode": {"decoder"}, "reconstruct": {"encoder", "decoder"}}
    assert set(stored.files) == set(about["functions"]["reconstruct"]["weights"])
    out = tmp_path / "out"
    export.main([f"--checkpoint={tokenizer}", "--format=stablehlo", f"--out={out}", "--decode", "steps=1"])
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (folders("stablehlo") / "tokenizer").iterdir()
    }
    printed = capsys.readouterr().out
    assert re.search(r"^reconstruct +images uint8 \[B 16 16 3\], k int32 \[\], seed int32 \[\] ", printed, re.M)
    assert f"MB in {out}" in printed


@pytest.mark.parametrize(
    "options, message",
    [
        (["--decode", "step=1"], 'no key "step".*steps'),
        (["--sample", "tokens=1"], "options of `sample` are for generators"),
        (["--size=8"], r"made for pictures \[16, 16, 3\]"),
        (["--size=a"], "--size: invalid sides value: 'a'"),
        (["--checkpoint=nowhere"], "nowhere is no folder"),
        (["--format=tflite"], "invalid choice: 'tflite'"),
    ],
)
def test_what_the_command_refuses(options, message, tokenizer, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main([f"--checkpoint={tokenizer}", "--format=stablehlo", f"--out={tmp_path / 'out'}", *options])
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tokenizer, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        export.export(tokenizer, tmp_path, "stablehlo")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_latents_of_any_size_and_no_seed_where_nothing_is_drawn(tmp_path):
    config = kl_vae.get_config("tiny")
    trees = jax.eval_shape(build(config.task).init, jax.random.key(0), {"image": IMAGES})
    write(tmp_path / "vae", ConfigDict(dict(task=config.task)), ema=at_random(trees["params"]))
    with pytest.raises(ValueError, match="any size: say which"):
        export.export(tmp_path / "vae", tmp_path / "out", "stablehlo")
    about = export.export(tmp_path / "vae", tmp_path / "out", "stablehlo", size=(16, 24))["functions"]
    assert about["encode"]["gives"] == {"codes": "float32 [B 8 12 4]"}
    assert about["decode"]["takes"] == {"codes": "float32 [B 8 12 4]", "k": "int32 []"}
    bound, images = jaxtok.load(tmp_path / "vae"), np.concatenate([IMAGES, IMAGES[:, :, :8]], 2)[:2]
    requests = [("reconstruct", dict(images=images, k=int32(k))) for k in (96, 95)]
    found, fewer = in_a_fresh_process(tmp_path / "out", "stablehlo", requests, tmp_path)
    codes = bound.model.apply(bound.variables, images, method="encode")
    wanted = bound.model.apply(bound.variables, codes, method="decode")
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(fewer - found).max() > 1e-3


@needs("jax2onnx", "ONNX")
def test_a_tokenizer_of_one_pass_in_onnxruntime(tmp_path, capsys):
    config = maskgit_vqgan.get_config("tiny")
    trees = jax.eval_shape(build(config.task).init, jax.random.key(0), {"image": IMAGES})
    some = at_random({"model": trees["params"]}, 2)["model"]
    write(tmp_path / "run", ConfigDict(dict(task=config.task)), ema=some, mutable=at_random(trees["mutable"]))
    cumsum = jnp.cumsum
    about = export.export(tmp_path / "run", tmp_path / "out", "onnx", size=(16, 16))
    assert jnp.cumsum is cumsum  # what converts replaces it
    assert about["functions"]["decode"]["takes"] == {"codes": "int32 [B 64]", "k": "int32 []"}
    assert about["onnxruntime"]["encode"] == "128 of 128 codes equal"
    bound = jaxtok.load(tmp_path / "run")
    codes = np.asarray(bound.encode(IMAGES))
    whole = functools.partial(bound.model.apply, bound.variables, method="decode")
    wild = int32(np.where(codes[:2] == codes[0, 0], 10**6, codes[:2]))
    requests = [
        ("encode", dict(images=IMAGES)),
        ("encode", dict(images=IMAGES[:2])),
        ("decode", dict(codes=codes, k=int32(64))),
        ("decode", dict(codes=codes[:2], k=int32(99))),
        ("reconstruct", dict(images=IMAGES[:2], k=int32(64))),
        ("decode", dict(codes=wild, k=int32(64))),
        ("decode", dict(codes=np.clip(wild, 0, 31), k=int32(64))),
        # errors
        ("encode", dict(images=IMAGES[:, :8])),
        ("encode", dict(images=IMAGES.astype(np.float32))),
    ]
    five, two, all5, all2, rebuilt, clipped, inside, *errors = in_a_fresh_process(
        tmp_path / "out", "onnx", requests, tmp_path
    )
    np.testing.assert_array_equal(five, codes)
    np.testing.assert_array_equal(two, codes[:2])
    wanted = whole(bound.model.apply(bound.variables, IMAGES, method="encode"))
    for found in (all5, all2, rebuilt):
        np.testing.assert_allclose(found, wanted[: len(found)], atol=1e-4)
    np.testing.assert_array_equal(clipped, inside)
    assert len(np.unique(codes)) > 2 and np.std(wanted) > 0.01
    assert all(re.search("InvalidArgument", error) for error in errors)


@needs("jax2onnx", "ONNX")
def test_a_flow_in_onnxruntime_takes_noise_and_one_batch_size(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="jax2onnx cannot convert decode: give it a fixed batch, --batch=1"):
        export.export(tokenizer, tmp_path / "out", "onnx", decode=DECODE)
    assert not (tmp_path / "out").exists()
    export.export(tokenizer, tmp_path / "out", "onnx", decode=DECODE, batch=2)
    bound, noise = jaxtok.load(tokenizer), jax.random.normal(jax.random.key(3), (2, 16, 16, 3))
    codes = np.asarray(bound.encode(IMAGES[:2]))
    start = dict(k=int32(3), noise=np.asarray(noise))
    requests = [
        ("encode", dict(images=IMAGES[:2])),
        ("decode", dict(codes=codes, **start)),
        ("reconstruct", dict(images=IMAGES[:2], **start)),
        ("encode", dict(images=IMAGES)),
    ]
    found, decoded, rebuilt, error = in_a_fresh_process(tmp_path / "out", "onnx", requests, tmp_path)
    np.testing.assert_array_equal(found, codes)
    wanted = pixels(bound, codes[:, :3], 3, **DECODE)
    np.testing.assert_allclose(decoded, wanted, atol=1e-4)
    np.testing.assert_allclose(rebuilt, wanted, atol=1e-4)
    assert "InvalidArgument" in error


@pytest.mark.parametrize(
    "dtype, same, other, says",
    [
        (jnp.int32, "6 of 6 codes equal", lambda x: x + 1, "0 of 6 codes equal"),
        (jnp.float32, "at most 0.0e+00 apart", lambda x: x + 0.1, r"at most 1.0e-01 apart"),
        (jnp.float32, "at most 0.0e+00 apart", lambda x: x * np.nan, "at most nan apart"),
    ],
)
def test_onnx_that_computes_something_else_is_refused(dtype, same, other, says):
    shape = jax.ShapeDtypeStruct((B, 3), dtype)
    one = export.Program(lambda weights, x: jnp.sign(x), {}, {"x": shape}, {"y": shape})
    assert export.difference("encode", one, lambda inputs: np.sign(inputs["x"])) == same
    with pytest.raises(ValueError, match=f"encode gives other values in onnxruntime, {says}: choose another format"):
        export.difference("encode", one, lambda inputs: other(np.sign(inputs["x"])))


QUANTIZERS = {
    "vq": (VQ, 6),
    "lfq": (LFQ, 6),
    "ibq": (dict(name="quantizers.ibq.IBQ", size=16), 6),
    "simvq": (dict(name="quantizers.simvq.SimVQ", size=16), 6),
    "residual": (dict(name="quantizers.residual.Residual", levels=(VQ, VQ)), 6),
    "product": (dict(name="quantizers.product.Product", books=(VQ, VQ)), 6),
}


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
def test_every_quantizer_takes_a_symbolic_batch(kind):
    run = task(*QUANTIZERS[kind], {})
    trees = jax.eval_shape(run.init, jax.random.key(0), BATCH)
    bound = BoundTokenizer(run.model, {"params": trees["params"], **trees["mutable"]})
    functions = export.of_tokenizer(bound, None, dict(steps=1))
    for one in functions.values():
        shape = jax.eval_shape(one.run, bound.variables, *one.inputs.values()).shape
        assert shape[0] == B and not any(d == B for d in shape[1:])


@pytest.mark.parametrize("kind", ["ar", "digits", "llamagen", "no classes", "masked", "rar"])
def test_every_generator_takes_a_symbolic_batch(kind):
    module = {"masked": models.masked, "rar": models.rar}.get(
        kind, lambda: models.ar("learned" if kind == "ar" else kind)
    )()
    params = jax.eval_shape(functools.partial(models.parameters, module))
    labels = jax.ShapeDtypeStruct((B,), jnp.int32)

    def sample(variables, labels):
        condition = {"label": labels} if module.classes else None
        options = dict(batch=labels.shape[0], guidance=2.0 if module.classes else 1.0)
        return module.apply(variables, jax.random.key(0), condition, **options, method="sample")

    assert jax.eval_shape(sample, params, labels).shape == (B, models.N)
