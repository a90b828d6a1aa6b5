"""Our generators against arrays of the references."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.goldens.compare import MISS, OK, SKIPPED, compare_all
from tests.goldens.one_d_generators import FILES

FOLDER = Path(__file__).parents[1] / "goldens" / "one_d"

# What in a file is not a generator's: tests/test_goldens_one_d.py has it.
OTHERS = {"tokenbridge": {"latent", "dequant", "reconstruction_values", "boundaries"}}


@pytest.fixture(scope="module", params=FILES)
def computed(request):
    """(name, golden arrays, ours, inputs, tolerances)."""
    with np.load(FOLDER / f"{request.param}.npz") as archive, jax.default_matmul_precision("highest"):
        golden = {key: array for key, array in archive.items() if key not in OTHERS.get(request.param, ())}
        return request.param, golden, *FILES[request.param](golden)


def test_every_array_agrees(computed):
    name, golden, ours, inputs, tolerances = computed
    rows = compare_all(name, ours, golden, inputs, tolerances=tolerances)
    assert [str(row) for row in rows if row.verdict == MISS] == []
    assert sum(row.verdict == OK for row in rows) == len(ours) > 0
    assert sum(row.verdict == SKIPPED for row in rows) == len(inputs) == len(golden) - len(ours)


def test_a_wrong_entry_of_any_array_is_found(computed):
    """One entry off by three tolerances, or by one; nothing else misses."""
    name, golden, ours, inputs, tolerances = computed
    for key in ours:
        array = golden[key].astype(golden[key].dtype if golden[key].dtype.kind != "b" else int)
        place = np.flatnonzero(np.isfinite(array))[-1] if array.dtype.kind == "f" else -1
        rtol, atol = tolerances[key]
        step = 1 if array.dtype.kind in "iu" else 3 * (atol + rtol * np.abs(array.flat[place]))
        array.reshape(-1)[place] += np.asarray(step, array.dtype)
        rows = compare_all(name, ours, golden | {key: array}, inputs, tolerances=tolerances)
        assert [row.name for row in rows if row.verdict == MISS] == [f"{name}/{key}"]
