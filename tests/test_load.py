"""jaxtok.load: from every kind of source, and what the tokenizer that it returns promises."""

import functools
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import jaxtok
from configs import kl_vae
from jaxtok import bound, convert, sharding
from jaxtok.build import build
from jaxtok.checkpoint import Checkpoints, claim_workdir
from jaxtok.init_from import graft
from jaxtok.nn import masks
from jaxtok.nn.position import sincos_2d
from jaxtok.pretrained.flextok import LICENCE
from tests import runs
from tests.pretrained import published
from tests.pretrained.test_pickles import Storage, save_zip, tensor

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)


def equal(a, b):
    """Whether two trees hold the same arrays."""
    a, b = (traverse_util.flatten_dict(tree, sep="/") for tree in (a, b))
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


# ---- a run of ours ----


def some_variables(model, pixels):
    """Random variables, so that no path is closed by a zero."""
    keys = {"params": jax.random.key(0), "train": jax.random.key(0)}
    shapes = jax.eval_shape(lambda: model.init(keys, pixels, train=True))
    rng = np.random.default_rng(0)
    random = lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)
    params = jax.tree.map(random, shapes["params"])
    statistics = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 0.4, x.shape), x.dtype), shapes["batch_stats"])
    return {"params": params, "batch_stats": statistics}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir as a run leaves it, though nothing trained; and its variables."""
    workdir, config = tmp_path_factory.mktemp("run"), runs.tiny()
    variables = some_variables(build(config.task.model), IMAGES)
    params, mutable = variables["params"], {"batch_stats": variables["batch_stats"]}
    claim_workdir(workdir, config)
    checkpoints = Checkpoints(workdir)
    state = {"params": jax.tree.map(jnp.zeros_like, params), "ema": params, "mutable": mutable, "step": jnp.int32(3)}
    checkpoints.save(3, state)
    checkpoints.close()
    return workdir, variables


@pytest.fixture(scope="module")
def tokenizer(run):
    return jaxtok.load(run[0])


def test_a_run_comes_with_its_averages_and_statistics(run, tokenizer):
    assert equal(tokenizer.variables, run[1])
    assert (tokenizer.tokens, tokenizer.vocabulary, tokenizer.picture) == (8, 64_000, (16, 16, 3))


def test_encode_gives_the_indices_of_the_model(tokenizer):
    codes = tokenizer.encode(IMAGES)
    expected = jax.jit(functools.partial(tokenizer.model.apply, method="encode"))(tokenizer.variables, IMAGES)
    np.testing.assert_array_equal(codes, expected.indices)
    assert codes.dtype == jnp.int32 and len(np.unique(codes)) > 16
    floats = IMAGES.astype(np.float64) / 127.5 - 1
    for images in (floats, jnp.asarray(floats), jnp.asarray(IMAGES)):
        np.testing.assert_array_equal(tokenizer.encode(images), codes)
    np.testing.assert_array_equal(tokenizer.encode(IMAGES[:3], tokens=5), codes[:3, :5])
    np.testing.assert_array_equal(tokenizer.encode(IMAGES, tokens=8), codes)


def test_decode_gives_the_pictures_of_the_model_at_any_length(tokenizer):
    codes, options = np.asarray(tokenizer.encode(IMAGES)), dict(steps=2, guidance=2.0)

    @jax.jit
    def expected(k):
        apply = functools.partial(tokenizer.model.apply, tokenizer.variables)
        kept = apply(IMAGES, method="encode").replace(keep=masks.keep_prefix(jnp.full(4, k), 8))
        return 255 * apply(kept, jax.random.key(5), **options, method="decode")

    for k in (1, 3, 6, 8):
        pictures = tokenizer.decode(codes[:, :k], seed=5, **options)
        assert pictures.shape == IMAGES.shape and pictures.dtype == jnp.uint8 and pictures.std() > 5
        assert np.abs(np.asarray(pictures, float) - expected(k)).max() < 0.5 + 0.01  # rounded
    assert (tokenizer.decode(codes[:, :3], **options) != tokenizer.decode(codes, **options)).any()


def test_few_programs_serve_all_lengths(run, monkeypatch):
    traced = []

    def counted(model, variables, indices, *args, **options):
        traced.append((indices.shape, options))
        return decode_arrays(model, variables, indices, *args, **options)

    decode_arrays = bound.decode_arrays
    monkeypatch.setattr(bound, "decode_arrays", counted)
    tokenizer = jaxtok.load(run[0])
    codes = np.zeros((2, 8), np.int64)
    for k in (5, 6, 7, 8, 3, 4, 2, 1):
        tokenizer.decode(codes[:, :k], steps=1)
        tokenizer.decode(codes[:, :k], steps=1, seed=k)
    assert [shape for shape, _ in traced] == [(2, 8), (2, 4), (2, 2), (2, 1)]
    tokenizer.decode(codes, steps=2)
    assert len(traced) == 5


def test_the_seed_decides(tokenizer):
    codes = tokenizer.encode(IMAGES)
    first, again, other = (tokenizer.decode(codes, seed=seed, steps=2, guidance=2.0) for seed in (2**40, 2**40, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    "images, says",
    [
        (IMAGES[0], r"images are \[B 16 16 3\], channels last, and these are \[16, 16, 3\]"),
        (IMAGES.transpose(0, 3, 1, 2), "channels last"),
        (IMAGES[:0], "channels last"),
        (IMAGES[:, :8, :8], r"images are \[B 16 16 3\] for this tokenizer: resize them"),
        (IMAGES.astype(np.int32), r"uint8, or floats in \[-1, 1\], and these are int32"),
        (IMAGES > 3, "these are bool"),
        (IMAGES.astype(np.float32), r"floats lie in \[-1, 1\], and these in \[0, 255\]"),
        (np.full((1, 16, 16, 3), np.nan), r"these in \[nan, nan\]"),
    ],
)
def test_other_images_are_refused(tokenizer, images, says):
    with pytest.raises(ValueError, match=says):
        tokenizer.encode(images)


@pytest.mark.parametrize(
    "codes, says",
    [
        (np.zeros((2, 9), int), "A picture has 1 to 8 tokens here, got 9"),
        (np.zeros((2, 0), int), r"integers \[B k\]"),
        (np.zeros(8, int), r"integers \[B k\], not int64 \[8\]"),
        (np.zeros((2, 8)), "not float64"),
        (np.full((2, 8), 64_000), r"must lie in 0 ... 63999, got 64000 ... 64000"),
        (np.full((2, 8), -1), "were they made by another tokenizer"),
    ],
)
def test_other_codes_are_refused(tokenizer, codes, says):
    with pytest.raises(ValueError, match=says):
        tokenizer.decode(codes)


def test_other_options_are_refused(tokenizer):
    with pytest.raises(TypeError, match='FlowDecoder.sample has no key "step". Did you mean "steps"'):
        tokenizer.decode(np.zeros((1, 8), int), step=3)
    with pytest.raises(ValueError, match="tokens=9: a picture has 1 to 8 tokens"):
        tokenizer.encode(IMAGES, tokens=9)


def test_on_a_mesh_the_weights_and_batches_are_split(run, tokenizer):
    codes = np.asarray(tokenizer.encode(IMAGES))
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        split = jaxtok.load(run[0])
        assert equal(split.variables, run[1])
        kernel = split.variables["params"]["decoder"]["blocks"]["mlp"]["gate"]["kernel"]
        assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")  # a rule of the config
        found = split.encode(IMAGES)
        np.testing.assert_array_equal(found, codes)
        assert not found.sharding.is_fully_replicated
        np.testing.assert_array_equal(split.encode(IMAGES[:3]), codes[:3])  # which four devices cannot share
        pictures = np.asarray(split.decode(codes, steps=2), int)
    assert np.abs(pictures - np.asarray(tokenizer.decode(codes, steps=2), int)).max() <= 1
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        with pytest.raises(ValueError, match="make_mesh"):
            jaxtok.load(run[0])


def test_what_was_frozen_comes_from_its_folder_and_losses_stay_behind(run, tmp_path):
    params = run[1]["params"]
    claim_workdir(tmp_path, runs.tiny())
    own = {"decoder": params["decoder"], "objective": {"repa": {"projector": jnp.ones(3)}}}
    frozen = {"encoder": params["encoder"], "objective": {"repa": {"tower": jnp.ones(2)}}}
    state = {"ema": own, "mutable": {"batch_stats": run[1]["batch_stats"]}}
    for folder, tree in ((tmp_path, state), (tmp_path / "frozen", {"frozen": frozen})):
        checkpoints = Checkpoints(folder)
        checkpoints.save(0, tree)
        checkpoints.close()
    assert equal(jaxtok.load(tmp_path).variables, run[1])


# ---- published weights ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny FlexTok with its codec as published, in a folder; its arrays."""
    folder, arrays = tmp_path_factory.mktemp("published"), published.weights(published.tiny_shapes())
    published.write_safetensors(folder / "model.safetensors", arrays, published.metadata(published.tiny_config()))
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text(json.dumps(published.TINY_VAE))
    return folder, arrays


@pytest.fixture(scope="module")
def loaded(tiny):
    return jaxtok.load(tiny[0] / "model.safetensors")


def test_a_published_file_encodes_and_decodes(loaded):
    assert (loaded.tokens, loaded.vocabulary, loaded.picture) == (8, 64_000, (32, 32, 3))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    codes = loaded.encode(images)
    assert codes.shape == (2, 8) and (codes[0] != codes[1]).any()
    pictures = loaded.decode(codes, steps=2, guidance=2.0)
    assert pictures.shape == images.shape and pictures.dtype == jnp.uint8 and pictures.std() > 5
    np.testing.assert_array_equal(loaded.decode(codes, steps=2, guidance=2.0), pictures)
    assert (loaded.decode(codes, seed=1, steps=2, guidance=2.0) != pictures).any()
    # three tokens go through the program of four, with the result of the one of eight
    three = np.asarray(loaded.decode(codes[:, :3], steps=2, guidance=2.0), int)
    options = (("guidance", 2.0), ("steps", 2))
    of_eight = loaded._decoder(loaded.variables, codes, 3, jax.random.key(0), options=options)
    assert np.abs(three - np.asarray(of_eight, int)).max() <= 1 and (three != np.asarray(pictures)).any()


def test_it_is_the_reference_s_weights_that_came(loaded, tiny):
    params, weights = loaded.variables["params"], tiny[1]
    conv = weights["vae.vae.decoder.up_blocks.1.resnets.0.conv1.weight"]
    np.testing.assert_array_equal(
        params["codec"]["decoder"]["up_1"]["block_0"]["conv1"]["kernel"], conv.T.swapaxes(0, 1)
    )
    gate = weights["decoder.module_dict.dec_transformer.blocks.1.mlp.fc1.weight"]
    np.testing.assert_array_equal(params["decoder"]["blocks"]["mlp"]["gate"]["kernel"][1], gate.T)


def as_folder(tiny, folder):
    published.write_safetensors(folder / "model.safetensors", tiny)
    (folder / "config.json").write_text(json.dumps(published.tiny_config()))
    return folder


def as_shards(tiny, folder):
    keys = list(tiny)
    places = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(keys)}
    for file in set(places.values()):
        published.write_safetensors(folder / file, {key: tiny[key] for key in keys if places[key] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"config": published.tiny_config()}))
    return folder


def as_pickle(tiny, folder):
    (folder / "config.json").write_text(json.dumps(published.tiny_config()))
    tree = {key: tensor(Storage(array.ravel()), array.shape) for key, array in tiny.items()}
    return save_zip(folder / "last.pth", {"model": tree, "epoch": 3})


@pytest.mark.parametrize("form", [as_folder, as_shards, as_pickle])
def test_every_form_gives_the_same_model_and_says_its_licence(loaded, tiny, tmp_path, capsys, form):
    source = form(tiny[1], tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(json.dumps(published.TINY_VAE))
    found = jaxtok.load(str(source))
    assert equal(found.variables, loaded.variables) and str(found.model) == str(loaded.model)
    assert "for research alone" in capsys.readouterr().err


def test_a_checkpoint_of_another_size_is_refused(tiny, tmp_path):
    tree = published.config(**published.TINY | dict(encoder=(64, 3), grid=4), scaling_factor=None)
    tree["vae"]["hf_hub_path"] = "someone/tiny_vae"
    (as_folder(tiny[1], tmp_path) / "config.json").write_text(json.dumps(tree))
    (tmp_path / "vae").symlink_to(tiny[0] / "vae")
    with pytest.raises(ValueError) as error:
        jaxtok.load(tmp_path)
    assert "encoder/blocks/attn/out/kernel[2]" in str(error.value)  # there are two layers
    assert "encoder/pos_embed needs (4, 4, 64)" in str(error.value)


def test_a_mesh_takes_published_weights(loaded, tiny):
    with jax.set_mesh(sharding.make_mesh(1, 4, 2)):
        found = jaxtok.load(tiny[0])
        kernel = found.variables["params"]["decoder"]["blocks"]["mlp"]["gate"]["kernel"]
        assert not kernel.sharding.is_fully_replicated and equal(found.variables, loaded.variables)


def test_convert_writes_a_workdir(loaded, tiny, tmp_path, capsys):
    source, out = str(tiny[0] / "model.safetensors"), tmp_path / "out"
    extra = {"decoder.module_dict.dec_repa_layer.mlp.0.weight": np.zeros(3, np.float32), "x": np.zeros(2, np.float32)}
    published.write_safetensors(tmp_path / "more.safetensors", tiny[1] | extra)
    (tmp_path / "config.json").write_text(json.dumps(published.tiny_config()))
    (tmp_path / "vae").symlink_to(tiny[0] / "vae")
    with pytest.warns(UserWarning, match="1 foreign keys are unknown and were not used: x"):
        convert.main([str(tmp_path / "more.safetensors"), f"--out={out}"])
    printed = capsys.readouterr().out
    assert f"{len(tiny[1])} of {len(tiny[1]) + 2} keys of" in printed and "unknown foreign keys (1):\n  x\n" in printed
    assert "projector to a teacher" in printed and printed.endswith(f"{LICENCE}\n")
    config = json.loads((out / "config.json").read_text())
    assert config["source"] == dict(name=str(tmp_path / "more.safetensors"), kind="flextok", licence=LICENCE)
    task = build(config["task"])
    assert str(task.model) == str(loaded.model) and task.token_counts == (1, 2, 4, 8) and task.frozen == ("codec",)
    found = jaxtok.load(out)
    assert equal(found.variables, loaded.variables) and str(found.model) == str(loaded.model)
    start, filled = graft(jax.tree.map(jnp.zeros_like, loaded.variables["params"]), out)  # config.init_from
    assert equal(start, loaded.variables["params"]) and len(filled) == len(jax.tree.leaves(start))
    with pytest.raises(SystemExit):
        convert.main([source, f"--out={out}"])
    assert "has checkpoints already" in capsys.readouterr().err


# ---- where weights may come from ----


def test_a_converted_codec_is_that_of_a_run(tmp_path, capsys):
    """A VAE as published -> a workdir -> the frozen codec of a tokenizer that trains on its latents."""
    with np.load(runs.ROOT / "tests" / "goldens" / "flextok" / "vae_tiny.npz") as archive:
        golden = dict(archive)
    source, vae, workdir = (tmp_path / name for name in ("source", "vae", "run"))
    source.mkdir()
    weights = {key.removeprefix("w/"): array for key, array in golden.items() if key.startswith("w/")}
    published.write_safetensors(source / "model.safetensors", weights)
    config = (runs.ROOT / "tests" / "goldens" / "flextok" / "vae_tiny_config.json").read_text()
    (source / "config.json").write_text(config)
    convert.main([str(source), f"--out={vae}", "--kind=vae"])
    assert f"{len(weights)} of {len(weights)} keys" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a codec, not a whole tokenizer"):
        jaxtok.load(vae)

    spec = json.loads((vae / "config.json").read_text())["codec"]
    config = runs.tiny(init_from=(dict(path=str(vae), rules=((r".*", r"codec/\g<0>"),)),), task__frozen=("codec",))
    config.total_steps, config.task.token_counts, config.task.samplers = 2, (8,), (dict(title="one step", steps=1),)
    config.task.model.codec = spec
    config.task.model.encoder.patch = config.task.model.decoder.patch = 1
    config.task.model.decoder.shape = (2, 2, 4)  # 16 px by the codec's factor of 8
    runs.alone(config, workdir)
    tokenizer = jaxtok.load(workdir)
    codec = tokenizer.variables["params"]["codec"]
    for ours, theirs in (
        (codec["encoder"]["conv_in"], "encoder.conv_in"),
        (codec["post_quant_conv"], "post_quant_conv"),
    ):
        np.testing.assert_array_equal(ours["kernel"], weights[f"{theirs}.weight"].transpose(2, 3, 1, 0))
    codes = tokenizer.encode(np.zeros((1, 16, 16, 3), np.uint8))
    assert tokenizer.decode(codes, steps=1).shape == (1, 16, 16, 3)


def a_hub(monkeypatch, download):
    fake = types.ModuleType("huggingface_hub")
    fake.snapshot_download, fake.constants = download, types.SimpleNamespace(HF_HUB_CACHE="the/cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)


def test_the_id_of_a_repository_is_fetched_and_that_of_its_codec(loaded, tiny, tmp_path, monkeypatch):
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tiny[0] / "vae" if repository == "someone/tiny_vae" else as_folder(tiny[1], tmp_path))

    a_hub(monkeypatch, download)
    monkeypatch.chdir(tmp_path)
    assert equal(jaxtok.load("someone/tiny.v1").variables, loaded.variables)
    files = ["config.json", "model*.safetensors*"]
    assert asked == [("someone/tiny.v1", files), ("someone/tiny_vae", ["config.json"])]


def test_without_a_connection_the_files_are_named(monkeypatch):
    def download(repository, allow_patterns):
        raise ConnectionError("no route to host\nmany more lines")

    a_hub(monkeypatch, download)
    with pytest.raises(FileNotFoundError) as error:
        jaxtok.load("EPFL-VILAB/flextok_d18_d28_dfn")
    message = str(error.value)
    assert "the/cache" in message and "no route to host" in message and "\n" not in message
    assert "place its files (config.json, model*.safetensors*)" in message


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r'pip install "jaxtok\[hub\]", or place its files \(config.json'):
        jaxtok.load("EPFL-VILAB/flextok_d18_d28_dfn")


@pytest.mark.parametrize("source", ["nowhere", "/no/where", "a/b/c", "../x", "-a/b c"])
def test_what_is_nowhere_is_no_repository(source):
    with pytest.raises(FileNotFoundError, match="no folder or file here, and no id of a repository"):
        jaxtok.load(source)


def test_files_that_are_missing_are_named(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors or model\.safetensors\.index\.json"):
        jaxtok.load(tmp_path)
    published.write_safetensors(tmp_path / "x.safetensors", tiny[1], {"format": "pt"})
    with pytest.raises(FileNotFoundError, match=r"place the published config\.json beside it"):
        jaxtok.load(tmp_path / "x.safetensors")
    for kind in ("flextalk", "convert", "os.path"):
        with pytest.raises(ValueError, match=rf"no jaxtok\.pretrained\.{kind} that reads checkpoints"):
            jaxtok.load(tiny[0], kind=kind)


# ---- the true size ----


def test_a_file_of_the_published_size(tmp_path):
    """FlexTok d12-d12, 342 M made-up numbers: about 30 s of CPU, and twice the file's 1.4 GB of memory."""
    block = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(np.float32)
    arrays = {}
    for i, (key, shape) in enumerate(published.listed("d12_d12").items()):
        if "posembs" in key and shape[2:] == (16, 16):
            arrays[key] = np.moveaxis(sincos_2d(16, 16, shape[1]), -1, 0)[None]
        elif "norm" in key and key.endswith("weight"):
            arrays[key] = np.ones(shape, np.float32)
        else:
            arrays[key] = np.resize(np.roll(block, i), shape)
    path = tmp_path / "model.safetensors"
    published.write_safetensors(path, arrays, published.metadata(published.config(**published.D12)))
    w = arrays["decoder.module_dict.dec_transformer.blocks.11.attn.wv.weight"]
    del arrays
    tokenizer = jaxtok.load(path)
    path.unlink()
    params = tokenizer.variables["params"]
    listed = sum(map(math.prod, published.listed("d12_d12").values()))
    assert sum(x.size for x in jax.tree.leaves(params)) == listed - 2 * 16 * 16 * 768  # the two position tables
    value = params["decoder"]["blocks"]["attn"]["qkv"]["kernel"][11, :, :, 2]
    np.testing.assert_array_equal(value.reshape(768, 768), w.T)
    images = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    codes = tokenizer.encode(images)
    assert codes.shape == (1, 256) and codes.min() >= 0 and codes.max() < 64_000 and len(np.unique(codes)) > 1
    picture = tokenizer.decode(codes, steps=1)
    assert picture.shape == images.shape and picture.dtype == jnp.uint8 and picture.std() > 1


# ---- tokens with places, of several indices, continuous ----

KINDS = {
    "places": dict(name="quantizers.vq.VQ", size=16),
    "groups": dict(name="quantizers.binary.LFQ", bits=(2, 3)),
    "continuous": dict(name="quantizers.gaussian.Gaussian"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_every_kind(kind):
    config = kl_vae.get_config("tiny").task.model
    config.encoder.out = 5 if kind == "groups" else 4
    config.quantizer = KINDS[kind]
    model = build(config)
    keys = {"params": jax.random.key(0), "train": jax.random.key(0)}
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 3), np.uint8)
    variables = jax.jit(functools.partial(model.init, train=True))(keys, images)
    tokenizer = bound.BoundTokenizer(model, variables)
    codes = tokenizer.encode(images)
    assert codes.shape == {"places": (2, 128), "groups": (2, 128, 2), "continuous": (2, 8, 16, 2)}[kind]
    grid = {} if kind == "continuous" else {"grid": (8, 16)}
    pictures = tokenizer.decode(codes, **grid)
    whole = model.apply(variables, model.apply(variables, images, method="encode"), method="decode")
    assert np.abs(np.asarray(pictures, float) - 255 * np.asarray(whole)).max() < 0.5 + 1e-3
    assert tokenizer.encode(images[:, :, :16]).shape[1:3] != codes.shape[1:3]  # pictures of any size
    square = tokenizer.encode(images[:, :, :16])
    assert tokenizer.decode(square).shape == (2, 16, 16, 3)
    if kind == "continuous":
        with pytest.raises(ValueError, match="finite floats"):
            tokenizer.decode(np.full(codes.shape, np.nan, np.float32))
        with pytest.raises(ValueError, match="grid is for indices"):
            tokenizer.decode(codes, grid=(8, 16))
        return
    with pytest.raises(ValueError, match="128 tokens with places are no square"):
        tokenizer.decode(codes)
    with pytest.raises(ValueError, match=r"grid=\(8, 8\) has not 128 places"):
        tokenizer.decode(codes, grid=(8, 8))
    with pytest.raises(ValueError, match="made by another tokenizer"):
        tokenizer.decode(np.asarray(codes) + 7, **grid)
    with pytest.raises(ValueError, match=r"integers \[B k 2\]" if kind == "groups" else r"integers \[B k\]"):
        tokenizer.decode(np.zeros((2, 4, 3), int))
