"""Generators in the one loop: on codes from disk or made on the fly, each paradigm, to samples and pictures."""

import dataclasses
import functools
import shutil
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxtok
from configs import ar_flextok, kl_vae
from jaxtok import checkpoint, evaluate, sharding, tasks, train
from jaxtok.build import build
from jaxtok.data import pipeline
from jaxtok.data.sources import Tokenized
from jaxtok.eval import generation
from jaxtok.generate import __main__ as generate
from jaxtok.generate.objective import Scores
from jaxtok.pretrained.extractors import Extractor
from jaxtok.tokenize import tokenize
from tests import runs

CLASSES = 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Workdir of a tiny tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer")
    runs.untrained(runs.tiny(), path)
    return path


@pytest.fixture(scope="module")
def codes(tokenizer, tmp_path_factory):
    """Its codes on disk."""
    path = tmp_path_factory.mktemp("codes")
    data = ar_flextok.get_config("tiny").data.copy_and_resolve_references()
    data.train.transforms = ()
    tokenize(tokenizer, path, batch=8, shard=32, data=data)
    return path


def config(tokenizer, **model):
    config = ar_flextok.get_config("tiny")
    config.task.tokenizer, config.log_every = str(tokenizer), 1
    config.data.train.transforms = ()
    config.task.model.update(model)
    return config


def from_disk(config, codes):
    for split in ("train", "eval"):
        config.data[split].source = dict(name="data.sources.Tokenized", path=str(codes / split))
    return config


@pytest.fixture(scope="module")
def run(tokenizer, codes, tmp_path_factory):
    path = tmp_path_factory.mktemp("ar")
    runs.alone(from_disk(config(tokenizer), codes), path)
    return path


def test_codes_from_disk_train_as_those_made_on_the_fly(tokenizer, run, tmp_path):
    metrics = runs.alone(config(tokenizer), tmp_path)
    assert runs.logged(tmp_path) == pytest.approx(runs.logged(run), rel=1e-5)
    assert metrics["bits a token"] == pytest.approx(metrics["loss"] / np.log(2))
    assert (tmp_path / "samples.png").exists()


def test_the_tokenizer_is_frozen_and_written_once(tokenizer, run):
    stored = {which: shapes for _, which, shapes in checkpoint.stored_weights(run)}
    assert set(stored["ema"]) == {"generator"} and set(stored["frozen"]) == {"tokenizer"}
    ours = checkpoint.Checkpoints(run / "frozen").restore_params(which="frozen")["tokenizer"]
    theirs = checkpoint.Checkpoints(tokenizer)
    wanted = {"params": theirs.restore_params(which="ema"), **theirs.restore_params(which="mutable")}
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(length=9), "length is 9; a picture has 8 codes"),
        (dict(vocabulary=65), "vocabulary is 65, and that of .* 64000"),
        (dict(classes=3), "classes is 3; the data has 40"),
    ],
)
def test_a_model_that_does_not_fit_the_codes_is_refused(tokenizer, codes, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        runs.alone(from_disk(config(tokenizer, **change), codes), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_codes_of_another_tokenizer_are_refused(tokenizer, codes, tmp_path):
    another = shutil.copytree(tokenizer, tmp_path / "another")
    build(config(another).task).check(Tokenized(codes / "train"))  # the same, elsewhere
    text = (another / "config.json").read_text()
    (another / "config.json").write_text(text.replace('"law": "pow2"', '"law": "uniform"'))
    with pytest.raises(ValueError, match="made by another tokenizer"):
        build(config(another).task).check(Tokenized(codes / "train"))


def test_a_tokenizer_refuses_codes_and_a_generator_a_missing_tokenizer(tokenizer, codes, tmp_path):
    with pytest.raises(ValueError, match="a tokenizer trains on pictures"):
        runs.alone(from_disk(runs.tiny(), codes), tmp_path)
    with pytest.raises(FileNotFoundError, match="task.tokenizer: there is no .*nowhere.*config.json"):
        runs.alone(config(tmp_path / "nowhere"), tmp_path / "ar")


MASKED = dict(width=32, depth=2, length=8, classes=CLASSES, vocabulary=64_000, block=dict(head_dim=16))
MODELS = {
    "masked": dict(name="generate.masked.Masked", **MASKED) | dict(sampler=dict(steps=2)),
    "rar": dict(name="generate.rar.RAR", **MASKED) | dict(sampler=dict(tokens=3)),
}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_loop_trains_every_paradigm(kind, tokenizer, codes, tmp_path):
    model = dict(MODELS[kind])
    changed = from_disk(config(tokenizer), codes)
    changed.task.samplers = (dict(title="sample", **model.pop("sampler")),)
    changed.task.model = model
    runs.alone(changed, tmp_path)
    losses = runs.logged(tmp_path)
    assert losses[6] < losses[1]
    assert jaxtok.load(tmp_path).sample([0], seed=1).shape == (1, 8)


def test_text_is_read_by_a_tower_that_trains_with_the_run(tokenizer, codes, tmp_path):
    changed = from_disk(config(tokenizer, classes=0, text=True), codes)
    for split in ("train", "eval"):
        changed.data[split].transforms = (dict(name="data.transforms.caption_bytes", length=24),)
    changed.task.text_tower = dict(name="encoders.text.TextTransformer", width=32, depth=1, length=24)
    runs.alone(changed, tmp_path)
    losses = runs.logged(tmp_path)
    assert losses[6] < losses[1]
    state = checkpoint.Checkpoints(tmp_path)
    before, after = (state.restore_params(step, "params")["text_tower"] for step in (3, 6))
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    generator, text = jaxtok.load(tmp_path), np.zeros((2, 24), np.int32)
    text[:, :3] = 1 + np.frombuffer(b"red", np.uint8)
    assert generator.sample(text=text, guidance=3.0).shape == (2, 8)
    with pytest.raises(ValueError, match="no class|Labels lie in"):
        generator.sample([1], text=text)


def test_flow_over_the_latents_of_a_vae(tmp_path):
    runs.untrained(kl_vae.get_config("tiny"), tmp_path / "vae")
    changed = config(tmp_path / "vae")
    changed.task.decoder, changed.sharding = {}, ((r".*", "fsdp"),)
    changed.task.samplers = (dict(title="sample", steps=2, guidance=2.0),)
    changed.task.model = dict(
        name="generate.flow.Flow", shape=(8, 8, 4), width=32, depth=2, classes=CLASSES, block=dict(head_dim=16)
    )
    runs.alone(changed, tmp_path / "flow")
    losses = runs.logged(tmp_path / "flow")
    assert losses[6] < losses[1]
    generator = jaxtok.load(tmp_path / "flow")
    latents = generator.sample([1, 2], steps=2)
    assert latents.shape == (2, 8, 8, 4) and generator.decode(latents).shape == (2, 16, 16, 3)


def test_samples_are_those_of_the_trained_weights_and_depend_on_seed_and_class(run):
    generator = jaxtok.load(run)
    labels = np.arange(4)
    codes = generator.sample(labels, tokens=5, guidance=2.0)
    np.testing.assert_array_equal(generator.sample(labels, tokens=5, guidance=2.0), codes)
    assert codes.shape == (4, 5) and (codes != generator.sample(labels, tokens=5, guidance=2.0, seed=1)).any()
    images = generator.decode(codes)
    assert images.shape == (4, 16, 16, 3) and images.dtype == np.uint8
    task = build(config(generator.task.tokenizer).task)
    wanted = task.model.apply(
        {"params": generator.variables["generator"]},
        jax.random.key(0),
        {"label": labels},
        tokens=5,
        guidance=2.0,
        method="sample",
    )
    np.testing.assert_array_equal(codes, wanted)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (dict(labels=[CLASSES]), ValueError, "0 ... 39 here, got 40"),
        (dict(labels=[0.5]), ValueError, "Labels are integers"),
        (dict(labels=[1], text=[[1]]), ValueError, "reads no text"),
        (dict(labels=[1], token=3), TypeError, 'no key "token".* "tokens"'),
        (dict(labels=[1], tokens=9), ValueError, "1 to 8 tokens, not 9"),
    ],
)
def test_what_sample_refuses(run, call, error, message):
    with pytest.raises(error, match=message):
        jaxtok.load(run).sample(**call)


@pytest.mark.parametrize(
    "given, message",
    [
        ([[64_000]], "must lie in 0 ... 63999, got 64000"),
        ([[-1]], "must lie in 0 ... 63999, got -1"),
        ([[0.5]], r"Codes are integers \[B k\]"),
        (np.zeros((1, 9), int), "1 to 8 tokens a picture, got 9"),
    ],
)
def test_what_decode_refuses(run, given, message):
    with pytest.raises(ValueError, match=message):
        jaxtok.load(run).decode(given)


class Noise(nn.Module):
    """A model without parameters: its samples are drawn from nothing but the key."""

    def loss(self, codes, condition):
        return Scores(jnp.zeros(codes.shape), jnp.ones(codes.shape))

    def sample(self, rng, condition, batch):
        return jax.random.randint(rng, (batch, 8), 0, 1000)


@dataclasses.dataclass(frozen=True)
class Undecoded(tasks.GeneratorTask):
    """The task without its tokenizer; `seen` gets the rows of an evaluation."""

    seen: dict = dataclasses.field(default_factory=dict)

    def codes(self, frozen, batch):
        return batch["codes"]

    def decode(self, variables, codes, key):
        return jnp.zeros((len(codes), 8, 8, 3), jnp.uint8)

    def summarize(self, rows):
        self.seen.update(rows)
        return {}, []


def test_no_two_batches_of_an_evaluation_have_the_same_samples(tmp_path):
    source = [{"codes": np.zeros(8, np.int32)}] * 10
    task = Undecoded(Noise(), "", ({"title": "sample"},))
    batches = functools.partial(pipeline.eval_batches, source, batch_size=4)  # the last is half empty
    state = {"ema": {"generator": {}}, "mutable": {}, "frozen": {"tokenizer": {}}}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    log = types.SimpleNamespace(log=lambda done, metrics: None)
    train.run_evaluation(task, jax.jit(task.evaluate), batches, mesh, tmp_path, log, 1, state)
    assert len(np.unique(task.seen["codes/sample"], axis=0)) == 10


def test_the_evaluation_judges_samples_beside_real_pictures(run, monkeypatch):
    quick = functools.partial(evaluate.train_classifier, steps=2)
    monkeypatch.setattr(evaluate, "train_classifier", quick)
    colours = jax.tree_util.Partial(lambda x: x.mean((1, 2)))
    monkeypatch.setattr(evaluate, "extractor", lambda name: Extractor("FD", colours, 3, "0"))
    metrics = evaluate.evaluate(run, samples=2)
    assert metrics["held out"]["bits a token"] < np.log2(64_000) + 1
    names = {generation.REAL, generation.OWN, "its class,\n4 tokens"}
    assert set(metrics["samples"]) == names | {"two halves of the originals", "commonest class"}
    assert metrics["samples"][generation.OWN].keys() == {"accuracy", "balanced", "frechet"}
    assert metrics["copies"]["its class,\n4 tokens"]["tokens"] == 4
    report = (run / "evaluation/report.html").read_text()
    assert "Copies of training examples" in report and "always the commonest class" in report


def test_the_command_draws_a_grid_and_says_what_it_cannot(run, tmp_path, capsys):
    names = build(config("x").data.eval.source).class_names
    out = [f"--checkpoint={run}", f"--out={tmp_path / 'a.png'}", "--samples=3", "--batch=8", "--decode", "steps=1"]
    generate.main([*out, f"--labels={names[2]},0", "--tokens=4", f"--codes={tmp_path / 'a.npz'}"])
    stored = np.load(tmp_path / "a.npz")
    assert stored["codes"].shape == (6, 4) and stored["labels"].tolist() == [2, 2, 2, 0, 0, 0]
    assert Image.open(tmp_path / "a.png").width > 2 * 96
    for labels, message in (
        ("red cirle", 'no class "red cirle". Did you mean "red circle"'),
        ("99", "0 ... 39 here, got 99"),
    ):
        with pytest.raises(SystemExit) as stop:
            generate.main([*out, f"--labels={labels}"])
        assert stop.value.code == 2 and message in capsys.readouterr().err


class Recorder:
    """A generator that notes the seeds it is given."""

    def __init__(self):
        self.seeds = []

    def sample(self, batch, seed):
        self.seeds.append(seed)
        return np.zeros((batch, 4), np.int32)

    def decode(self, codes, seed):
        return np.zeros((len(codes), 8, 8, 3), np.uint8)


def test_two_seeds_share_no_batch_and_folders_are_made_before_the_first(tmp_path, monkeypatch):
    fake = Recorder()
    monkeypatch.setattr(jaxtok, "load", lambda path: fake)
    for seed in (0, 2, 4):
        codes = tmp_path / f"{seed}/codes/a.npz"
        out = [f"--out={tmp_path / f'{seed}/grids/a.png'}", f"--codes={codes}"]
        generate.main(["--checkpoint=x", "--samples=6", "--batch=2", f"--seed={seed}", *out])
        assert np.load(codes)["codes"].shape == (6, 4)
    assert len(set(fake.seeds)) == 9
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        generate.main(["--checkpoint=x", f"--out={tmp_path}/a.png", f"--codes={tmp_path}/file/a.npz"])
    assert len(fake.seeds) == 9
