"""python -m jaxtok.tokenize: the codes are the model's, however the work was divided, killed and resumed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxtok
from configs import kl_vae
from jaxtok import tokenize as command
from jaxtok.build import build
from jaxtok.checkpoint import Checkpoints, claim_workdir, fingerprint
from jaxtok.data import pipeline, transforms
from jaxtok.data.sources import Tokenized
from jaxtok.tokenize import tokenize
from tests import runs

SIZES = dict(batch=8, shard=16)  # 44 pictures: shards of 16, 16 and 12, the last batch is filled up


def config(**changes):
    return runs.tiny(data__train__source__n=44, **changes)


def leave(workdir, config, step=3):
    """What a run leaves, though nothing trained: random parameters, so that codes differ."""
    image = np.zeros((1, 16, 16, 3), np.uint8)
    keys = {"params": jax.random.key(0), "train": jax.random.key(0)}
    shapes = dict(jax.eval_shape(lambda: build(config.task.model).init(keys, image, train=True)))
    rng = np.random.default_rng(step)
    params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), shapes.pop("params"))
    mutable = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 0.4, x.shape), x.dtype), shapes)
    mutable.pop("intermediates", None)
    claim_workdir(workdir, config)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(step, {"ema": params, "mutable": mutable})
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return leave(tmp_path_factory.mktemp("run"), config())


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The codes of the run, written in one go."""
    out = tmp_path_factory.mktemp("whole")
    return out, tokenize(run, out, **SIZES)


def files(out):
    """Name -> bytes of all that is in a folder of codes, without the path of the tokenizer."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name, text in found.items():
        if name.endswith(("config.json", "manifest.json")):
            found[name] = json.loads(text)
            found[name]["tokenizer"].pop("path")
    return found


def read(folder, name="codes"):
    source = Tokenized(folder)
    return np.stack([source[i][name] for i in range(len(source))])


# ---- what is written ----


def test_the_codes_are_those_of_the_model(run, whole):
    out, manifests = whole
    tokenizer = jaxtok.load(run)
    for split in ("train", "eval"):
        pictures, source = build(config().data[split].source), Tokenized(out / split)
        assert len(source) == len(pictures) == {"train": 44, "eval": 12}[split]
        images = np.stack([pictures[i]["image"] for i in range(len(pictures))])
        expected = np.asarray(tokenizer.encode(images))
        np.testing.assert_array_equal(read(out / split), expected)
        assert source[3]["codes"].dtype == np.int32 and source.records[3]["codes"].dtype == np.uint16
        assert [source[i]["caption"] for i in range(12)] == [pictures[i]["caption"] for i in range(12)]
        assert [source[i]["label"] for i in range(12)] == [pictures[i]["label"] for i in range(12)]
        assert source.class_names == pictures.class_names
        manifest = source.manifest
        assert manifest == manifests[split]
        assert manifest["tokenizer"] == dict(path=str(run), step=3, fingerprint=fingerprint(run))
        assert (manifest["vocabulary"], manifest["tokens"], manifest["grid"]) == (64_000, 8, None)
        assert manifest["counts"] == dict(examples=len(pictures), bad=0, distinct=len(np.unique(expected)))
        source.verify()
    assert len(np.unique(expected)) > 24
    assert [shard["examples"] for shard in manifests["train"]["shards"]] == [16, 16, 12]


def test_passes_see_what_training_sees(run, whole, tmp_path):
    manifests = tokenize(run, tmp_path, passes=2, **SIZES)
    assert manifests["train"]["passes"] == 2 and manifests["eval"]["passes"] == 0
    np.testing.assert_array_equal(read(tmp_path / "eval"), read(whole[0] / "eval"))
    pictures, flip = build(config().data.train.source), transforms.flip()
    turned = [pipeline.augment(pictures[i], [flip], (i, turn))["image"] for turn in range(2) for i in range(44)]
    found = read(tmp_path / "train")
    np.testing.assert_array_equal(found, jaxtok.load(run).encode(np.stack(turned)))
    same = (found[:44] == found[44:]).all(1).mean()
    assert 0.2 < same < 0.8  # half of the pictures are flipped in one pass and not in the other


def test_the_first_tokens_alone(run, whole, tmp_path):
    manifests = tokenize(run, tmp_path, tokens=3, **SIZES)
    assert manifests["train"]["tokens"] == 3
    np.testing.assert_array_equal(read(tmp_path / "train"), read(whole[0] / "train")[:, :3])
    with pytest.raises(ValueError, match="tokens=9: a picture has 1 to 8 tokens"):
        tokenize(run, tmp_path / "other", tokens=9, **SIZES)


def groups():
    fsq = dict(name="quantizers.fsq.FSQ")
    books = (fsq | dict(levels=(8, 8, 8)), fsq | dict(levels=(5, 5, 5)))
    return config(task__model__quantizer=dict(name="quantizers.product.Product", books=books))


def continuous():
    gaussian = dict(name="quantizers.gaussian.Gaussian")
    return config(task__model__quantizer=gaussian, task__model__encoder__channels=10)


def places():
    changed = kl_vae.get_config("tiny")
    changed.data = config().data
    return changed


def test_several_indices_a_token(tmp_path):
    out = tmp_path / "out"
    manifest = tokenize(leave(tmp_path / "run", groups()), out, **SIZES)["eval"]
    model, variables = (lambda t: (t.model, t.variables))(jaxtok.load(tmp_path / "run"))
    images = np.stack([build(groups().data.eval.source)[i]["image"] for i in range(12)])
    expected = np.asarray(jax.jit(lambda v, x: model.apply(v, x, method="encode").indices)(variables, images))
    found = read(out / "eval")
    assert expected.shape == (12, 8, 2)
    np.testing.assert_array_equal(found, expected)
    assert manifest["vocabulary"] == [512, 125]
    assert manifest["counts"]["distinct"] == [len(np.unique(expected[..., g])) for g in range(2)]
    assert min(manifest["counts"]["distinct"]) > 5
    assert command.row(manifest)["distinct codes"] == f"{sum(manifest['counts']['distinct'])} of 637"


@pytest.mark.parametrize("make", [continuous, places])
def test_continuous_tokens(make, tmp_path):
    workdir = leave(tmp_path / "run", make())
    manifest = tokenize(workdir, tmp_path / "all", **SIZES)["eval"]
    shape = (8, 5) if make is continuous else (8, 8, 4)
    found = read(tmp_path / "all" / "eval", "latents")
    assert found.shape == (12, *shape) and found.dtype == np.float32
    assert manifest["vocabulary"] is None and manifest["counts"]["distinct"] is None
    assert manifest["grid"] == (None if make is continuous else [8, 8])
    model, variables = (lambda t: (t.model, t.variables))(jaxtok.load(workdir))
    images = np.stack([build(make().data.eval.source)[i]["image"] for i in range(12)])
    z = np.asarray(jax.jit(lambda v, x: model.apply(v, x, method="encode").z)(variables, images))
    np.testing.assert_allclose(found.reshape(z.shape), z, atol=1e-5)
    assert z.std() > 0.01
    few = tokenize(workdir, tmp_path / "few", tokens=3, **SIZES)["eval"]
    assert few["grid"] is None and few["tokens"] == 3
    np.testing.assert_allclose(read(tmp_path / "few" / "eval", "latents"), z[:, :3], atol=1e-5)


# ---- however the work is divided ----


def test_one_device_writes_the_files_of_eight(run, whole, tmp_path, monkeypatch):
    assert jax.device_count() == 8
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)
    tokenize(run, tmp_path, **SIZES)
    assert files(tmp_path) == files(whole[0])


def test_the_batch_does_not_matter(run, whole, tmp_path):
    tokenize(run, tmp_path, batch=16, shard=16)
    assert files(tmp_path) == files(whole[0])


def test_two_simulated_processes(run, whole, tmp_path):
    with pytest.raises(RuntimeError, match="train lacks the shards 000001, which other processes write"):
        tokenize(run, tmp_path, process_index=0, process_count=2, **SIZES)
    assert tokenize(run, tmp_path, process_index=1, process_count=2, **SIZES) == {}
    with pytest.raises(FileNotFoundError, match="not complete. Run the command"):
        Tokenized(tmp_path / "train")
    assert tokenize(run, tmp_path, process_index=0, process_count=2, **SIZES) == whole[1]
    assert files(tmp_path) == files(whole[0])


def test_two_processes(run, whole, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    flags = [f"--checkpoint={run}", f"--out={tmp_path}", "--batch=8", "--shard=16"]
    flags += [f"--coordinator=localhost:{port}", "--processes=2"]
    several = [python("-m", "jaxtok.tokenize", *flags, f"--process={i}", devices=2) for i in range(2)]
    try:
        said = [process.communicate(timeout=120)[0] for process in several]
        assert [process.returncode for process in several] == [0, 0], said
        assert ["Codes of" in out for out in said] == [True, False]
    finally:
        for process in several:
            process.kill()
            process.wait()
    assert files(tmp_path) == files(whole[0])


def python(*arguments, devices=1):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(runs.ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *arguments], cwd=runs.ROOT, env=env, **pipes)


# ---- killed and restarted ----


def killed(run, out, where):
    """Tokenizes, and dies by SIGKILL in the middle of shard 1, or when it is there and its entry is not."""
    from jaxtok.data import codes, records

    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    encode, write = records.encode_example, codes.write_json
    written = []

    def encode_or_die(example):
        written.append(example)
        return die() if len(written) == 16 + 6 else encode(example)

    def write_or_die(file, value):
        return die() if file.name == "000001.json" else write(file, value)

    if where == "shard":
        records.encode_example = encode_or_die
    else:
        codes.write_json = write_or_die
    tokenize(run, out, **SIZES)


def test_killed_and_restarted_on_other_processes(run, whole, tmp_path):
    for where, left in (("shard", "000001.array_record.unfinished"), ("entry", "000001.array_record")):
        code = f"from tests.test_tokenize import *; killed({str(run)!r}, {str(tmp_path)!r}, {where!r})"
        process = python("-c", code)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, out
        there = {path.name for path in (tmp_path / "train").iterdir()}
        assert {"000000.json", left} <= there and not {"000001.json", "manifest.json"} & there
        with pytest.raises(FileNotFoundError, match="not complete"):
            Tokenized(tmp_path / "train")
    begun = (tmp_path / "train" / "000000.array_record").stat()
    for index in (2, 1, 0):
        manifests = tokenize(run, tmp_path, process_index=index, process_count=3, **SIZES)
    assert manifests == whole[1]
    assert files(tmp_path) == files(whole[0])
    now = (tmp_path / "train" / "000000.array_record").stat()
    assert (now.st_mtime_ns, now.st_ino) == (begun.st_mtime_ns, begun.st_ino)  # what was complete is not written again


def test_a_lost_shard_is_written_again_from_the_command_line(run, whole, tmp_path):
    out = tmp_path / "codes"
    shutil.copytree(whole[0], out)
    (out / "train" / "000001.array_record").unlink()
    options = ["--batch=8", "--shard=16", f"--checkpoint={run}", f"--out={out}"]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(runs.ROOT)}
    arguments = [sys.executable, "-m", "jaxtok.tokenize", *options]
    said = subprocess.run(arguments, cwd=runs.ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert files(out) == files(whole[0])
    assert "44/44" in said.stderr and "12/12" not in said.stderr  # the bar; the other split is complete
    title, columns, _, *lines = said.stdout.splitlines()
    assert title == f"Codes of {run} in {out}" and len(lines) == 2
    assert columns.split() == "split pictures bad tokens shards bytes distinct codes".split()
    assert lines[0].split()[:5] == "train 44 0 8 3".split() and lines[0].endswith(" of 64000")


# ---- what is refused ----


def test_a_folder_begun_otherwise_is_refused(run, whole, tmp_path):
    before = files(whole[0])
    with pytest.raises(
        ValueError, match=r"train holds .* another config(.|\n)*  shard: 16 -> 8\n(.|\n)*  tokens: 8 -> 3"
    ):
        tokenize(run, whole[0], tokens=3, batch=8, shard=8)
    with pytest.raises(ValueError, match=r"  passes: 0 -> 1\n"):
        tokenize(run, whole[0], passes=1, **SIZES)
    other = leave(tmp_path / "other", config(), step=4)
    with pytest.raises(ValueError, match=r"  tokenizer.fingerprint: .* -> .*\n  tokenizer.step: 3 -> 4"):
        tokenize(other, whole[0], **SIZES)
    assert files(whole[0]) == before
    shutil.copytree(run, tmp_path / "moved")
    shutil.copytree(whole[0], tmp_path / "out")
    assert tokenize(tmp_path / "moved", tmp_path / "out", **SIZES)["train"]["shards"] == whole[1]["train"]["shards"]


def test_converted_weights_need_a_config(tmp_path):
    changed = config()
    data = changed.data
    del changed.data
    workdir = leave(tmp_path / "run", changed)
    with pytest.raises(ValueError, match="no data.train.source and no data.eval.source; .* --config=FILE"):
        tokenize(workdir, tmp_path / "out", **SIZES)
    data.eval.source.n = 5
    manifests = tokenize(workdir, tmp_path / "out", data=data, **SIZES)
    assert manifests["eval"]["counts"]["examples"] == 5


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(batch=8, shard=20), "shard=20 a multiple of batch=8"),
        (dict(batch=6, shard=12), "batch of 6 cannot be split over data=8"),
        (dict(passes=-1), "passes=-1 must be 0 or more"),
    ],
)
def test_impossible_sizes(options, says, run, tmp_path):
    with pytest.raises(ValueError, match=says):
        tokenize(run, tmp_path, **SIZES | options)


def test_what_is_no_workdir(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no workdir .* jaxtok.pretrained.convert"):
        tokenize(tmp_path / "nowhere", tmp_path / "out")


def test_bad_records_are_left_out_and_named(run, tmp_path, recwarn):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"pictures/{i:02}.png")
    for i in (0, 9):
        (tmp_path / f"pictures/{i:02}.png").write_bytes(b"no picture")
    data = config().data
    data.train.source = dict(name="data.sources.Folder", path=str(tmp_path / "pictures"))
    data.max_bad = 0.05
    with pytest.raises(ValueError, match="2 of 20 records of Folder are bad, more than max_bad=0.05 allows: .*00.png"):
        tokenize(run, tmp_path / "out", data=data, **SIZES)
    data.max_bad = 0.1
    manifest = tokenize(run, tmp_path / "out", data=data, **SIZES)["train"]
    assert manifest["counts"]["examples"] == 18 and manifest["counts"]["bad"] == 2
    [(first, why), (second, _)] = manifest["shards"][0]["bad"]
    assert (first, second) == (0, 9) and "00.png: no picture of a known format" in why
    images = [np.asarray(Image.open(tmp_path / f"pictures/{i:02}.png")) for i in range(20) if i not in (0, 9)]
    np.testing.assert_array_equal(read(tmp_path / "out/train"), jaxtok.load(run).encode(np.stack(images)))
    assert any("Bad record left out (2 of 20 so far)" in str(warning.message) for warning in recwarn)


# ---- whose codes ----


def test_a_fingerprint_tells_models_apart_and_nothing_else(run, tmp_path):
    print_of_run = fingerprint(run)
    assert len(print_of_run) == 64
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    (copied / "metrics.jsonl").write_text("{}")
    (copied / "checkpoints/3/.DS_Store").write_text("")
    assert fingerprint(copied) == fingerprint(str(copied)) == print_of_run
    said = json.loads((copied / "config.json").read_text())
    said["total_steps"] = 99
    (copied / "config.json").write_text(json.dumps(said))
    assert fingerprint(copied) == print_of_run
    said["task"]["model"]["quantizer"]["levels"][0] = 7
    (copied / "config.json").write_text(json.dumps(said))
    assert fingerprint(copied) != print_of_run
    assert fingerprint(leave(tmp_path / "again", config())) != print_of_run  # the same sizes of files, other weights


def test_a_fingerprint_follows_the_newest_step_and_frozen_parts(run, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    seen = [fingerprint(copied)]
    for folder, step, key in ((copied, 7, "ema"), (copied / "frozen", 0, "frozen")):
        checkpoints = Checkpoints(folder)
        checkpoints.save(step, {key: {"w": jnp.ones(4)}})
        checkpoints.close()
        seen.append(fingerprint(copied))
    assert len(set(seen)) == 3
    shutil.rmtree(copied / "checkpoints/3")  # as old steps go
    assert fingerprint(copied) == seen[-1]
    shutil.rmtree(copied / "checkpoints/7")
    with pytest.raises(FileNotFoundError, match="No complete checkpoint"):
        fingerprint(copied)
