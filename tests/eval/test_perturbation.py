"""Pictures rebuilt from perturbed codes: what a cell of the grid is, and the section of the report."""

import functools

import jax
import numpy as np
import pytest

from configs import robusttok
from jaxtok import evaluate as command
from jaxtok import hub
from jaxtok.build import build
from jaxtok.eval import frechet, perturbation
from jaxtok.quantizers.perturb import perturb
from tests import runs, test_evaluate


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A tiny run, on 12 held-out pictures in batches of 8."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    runs.alone(robusttok.get_config("tiny"), path)
    return path


@pytest.fixture(scope="module")
def run(workdir):
    """(task, variables, pictures)."""
    config = robusttok.get_config("tiny")
    source = build(config.data.eval.source)
    images = np.stack([source[i]["image"] for i in range(len(source))])
    return build(config.task), hub.restore(workdir, None)[1], images


def batch(images):
    return {"image": images, "mask": np.arange(len(images)) < 10, "index": np.arange(len(images), dtype=np.int32)}


def means(pictures):
    return pictures.mean((1, 2))


def look(run, cells, **changes):
    task, variables, images = run
    features = jax.tree_util.Partial(means)
    function = functools.partial(perturbation.look, task, perturb, cells)
    return jax.device_get(jax.jit(function)(variables, features, jax.random.key(0), batch(images) | changes))


def test_batches_with_a_blank_have_draws_of_their_own(run):
    first, second = (np.r_[-1, start : start + 11].astype(np.int32) for start in (0, 11))
    one, other = (look(run, [(0.5, 8)], index=index)["psnr"] for index in (first, second))
    assert np.abs(one - other).max() > 1e-3


def test_the_grid_is_a_share_of_the_vocabulary():
    cells = perturbation.grid(4096)
    assert len(cells) == 15 and cells[0] == (0.5, 205) and cells[-1] == (0.9, 369)
    assert {delta for _, delta in perturbation.grid(8)} == {2}
    for vocabulary in (None, (8, 8)):
        with pytest.raises(ValueError, match="Only tokens of one index are perturbed"):
            perturbation.grid(vocabulary)


def test_nothing_changes_at_alpha_nought_or_with_one_neighbour(run):
    task, variables, images = run
    cells = [(0.0, 8), (1.0, 1), (1.0, 8)]
    found = look(run, cells)
    mutable = {name: tree for name, tree in variables.items() if name != "params"}  # the quantizer counts its steps
    rows = jax.jit(task.evaluate)(variables["params"], mutable, {}, batch(images), jax.random.key(0))["rows"]
    own = np.asarray(rows["psnr/one pass@8"])
    np.testing.assert_allclose(found["psnr"][:2], [own, own], atol=0.02)  # which are not rounded to bytes
    assert np.abs(found["psnr"][2] - own).max() > 0.03
    np.testing.assert_array_equal(found["features"][0], found["features"][1])
    assert np.abs(found["features"][2] - found["features"][0]).max() > 1e-4


def test_the_section_has_a_row_a_cell_and_their_mean(run):
    cells, (_, _, images) = [(0.5, 4), (1.0, 8)], run
    found, originals = look(run, cells), frechet.update(frechet.empty(3), means(images[:10] / 255))
    metrics, part = perturbation.section([found, found], cells, originals, "FD-means")
    (table,) = part.tables.values()
    assert [(row["alpha"], row["delta"]) for row in table] == [("0.5", "4"), ("1", "8"), ("mean", "")]
    for row, psnr, features in zip(metrics["cells"], found["psnr"], found["features"], strict=True):
        assert row["psnr"] == pytest.approx(psnr[:10].mean(), rel=1e-5)  # of the batch's padding nothing
        twice = frechet.update(frechet.empty(3), np.tile(features[:10], (2, 1)))
        assert row["frechet"] == pytest.approx(frechet.distance(originals, twice), rel=1e-6)
    assert metrics["mean"]["frechet"] == pytest.approx(np.mean([row["frechet"] for row in metrics["cells"]]))
    metrics, part = perturbation.section([found], cells, None, None)
    assert "frechet" not in metrics["mean"] and "FD-means" not in next(iter(part.tables.values()))[0]


def test_the_command_measures_it_where_it_is_asked_to(workdir, tmp_path, monkeypatch):
    test_evaluate.patch_weights(monkeypatch)
    metrics = command.evaluate(workdir, tmp_path, perturbed=True)
    cells = metrics["perturbed"]["cells"]
    assert len(cells) == 15 and {cell["delta"] for cell in cells} == {3, 4, 6}
    assert all(np.isfinite([cell["psnr"], cell["frechet"]]).all() for cell in cells)
    assert "Rebuilt from perturbed codes" in (tmp_path / "report.html").read_text()
