"""The answers of docs/faq.md are true: its files and commands run, at a tiny size, and do what the page says."""

import json
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

import jaxtok
from jaxtok import evaluate, train
from jaxtok.build import build
from jaxtok.checkpoint import Checkpoints
from tests import runs
from tests.test_evaluate import patch_weights

PAGE = (runs.ROOT / "docs/faq.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
FENCES = [code.replace("\\\n", " ").strip() for language, code in BLOCKS if not language]
FILES = [re.fullmatch(r"# (\S+\.py)\n(.*)", code, re.S).groups() for language, code in BLOCKS if language]
OTHERWISE = " --config.seed=1"  # what does not come from the first run is drawn otherwise
SMALLER = {"=mine.py": "=mine.py:tiny", "=larger.py": "=larger.py:tiny", "=2000": "=8"}


def command(start):
    """The one command of the page that starts so, at the tiny size."""
    [line] = [fence for fence in FENCES if fence.startswith(start)]
    for before, after in SMALLER.items():
        line = line.replace(before, after)
    return line


def flags_of(line):
    """The flags of a command, read as it reads them."""
    values, words = flags.FlagValues(), shlex.split(line)[2:]
    with mock.patch.object(sys, "argv", words):  # which ml_collections reads
        config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
        for name in ("workdir", "checkpoint", "inception"):
            flags.DEFINE_string(name, None, name, flag_values=values)
        flags.DEFINE_integer("limit", None, "limit", flag_values=values)
        values(words)
    return values


def call(line):
    """Runs a command in this process."""
    values = flags_of(line)
    if "jaxtok.train" in line:
        return train.train(values.config, values.workdir)
    options = {name: values[name].value for name in ("limit", "inception") if values[name].value}
    return evaluate.evaluate(values.checkpoint, **options)


def weights(workdir):
    params = Checkpoints(workdir).restore_params(which="ema")
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's files are, pictures of several sizes, and a run of mine.py."""
    path = tmp_path_factory.mktemp("faq")
    for name, text in FILES:
        (path / name).write_text(text.replace("2 * 256", "2 * 16"))
    (path / "IMAGES").mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        colour = rng.integers(0, 256, 3)
        Image.fromarray(np.broadcast_to(colour, (20 + i % 7, 24, 3)).astype(np.uint8)).save(path / f"IMAGES/{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        call(command("python -m jaxtok.train --config=mine.py --workdir=runs/mine"))
    return path


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_own_pictures(folder):
    found = jaxtok.load("runs/mine")
    picture = np.zeros((1, 16, 16, 3), np.uint8)
    assert found.encode(picture).shape == (1, 8)
    config = json.loads(Path("runs/mine/config.json").read_text())
    assert config["data"]["train"]["source"] == dict(name="data.sources.Folder", path="IMAGES", split="train")
    assert sorted(runs.logged("runs/mine", "eval/psnr/one step@8")) == [6]


def test_the_published_size_reads_the_folder():
    line = command("python -m jaxtok.train --config=configs/flextok.py:d18_d28_off")
    values = flags_of(line.replace("configs/", f"{runs.ROOT}/configs/"))
    data = values.config.data
    assert len(build(data.train.source)) + len(build(data.eval.source)) == 60


def test_a_larger_size_starts_from_the_smaller():
    call(command("python -m jaxtok.train --config=larger.py") + OTHERWISE)
    found = jaxtok.load("runs/larger")
    assert found.picture == (32, 32, 3) and found.tokens == 8
    far = np.abs(weights("runs/larger") - weights("runs/mine")).max()
    assert 0 < far < 1e-3  # six steps at 1e-5


def test_fine_tuning_starts_from_the_run():
    call(command("python -m jaxtok.train --config=mine.py --workdir=runs/finer") + OTHERWISE)
    far = np.abs(weights("runs/finer") - weights("runs/mine")).max()
    assert 0 < far < 1e-3


def test_distances_are_measured_and_only_the_named_file_makes_fid(monkeypatch):
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth"):
        call(command("python -m jaxtok.evaluate --checkpoint=runs/mine --inception"))
    patch_weights(monkeypatch)
    metrics = call(command("python -m jaxtok.evaluate --checkpoint=runs/mine --limit"))
    assert 0 < metrics["pictures"] <= 8 and "FID" not in str(metrics["frechet"])


def test_every_command_of_the_page_is_tested():
    tested = ("configs/flextok.py:d18_d28_off", "mine.py --workdir=runs/mine", "larger.py", "--workdir=runs/finer")
    tested += ("--inception", "--limit")
    assert len(FENCES) == len(tested) and all(any(word in fence for fence in FENCES) for word in tested)
    assert [name for name, _ in FILES] == ["mine.py", "larger.py"]
