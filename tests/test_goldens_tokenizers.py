"""Whole tokenizers and critics against arrays of the references."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.goldens import one_d_quantizers, one_d_tokenizers
from tests.goldens.compare import MISS, OK, compare_all

FOLDER = Path(__file__).parent / "goldens" / "one_d"
FILES = sorted(name for name in one_d_tokenizers.FILES if (FOLDER / f"{name}.npz").exists())


@pytest.mark.parametrize("name", FILES)
def test_every_array_agrees_and_a_wrong_one_is_found(name):
    with np.load(FOLDER / f"{name}.npz") as archive:
        golden = dict(archive)
    with jax.default_matmul_precision("highest"):
        ours, inputs, tolerances = one_d_tokenizers.FILES[name](golden)
    check = lambda golden: compare_all(name, ours, golden, inputs, tolerances=tolerances)
    mine = {f"{name}/{key}" for key in ours}
    rows = [row for row in check(golden) if row.name in mine]
    assert [row for row in rows if row.verdict == MISS] == [] and len(rows) == len(ours) > 0
    assert all(row.verdict == OK for row in rows)
    for key in ours:  # one entry off by three tolerances, or by one
        rtol, atol = tolerances[key]
        array = np.array(golden[key])
        step = 1 if array.dtype.kind in "iu" else 3 * (atol + rtol * np.abs(array.flat[-1]))
        array.reshape(-1)[-1:] += np.asarray(step, array.dtype)
        assert {row.name for row in check(golden | {key: array}) if row.verdict == MISS} & mine == {f"{name}/{key}"}
    quantizer = one_d_quantizers.FILES.get(name, lambda golden: ({}, [], {}))(golden)
    assert golden.keys() <= {*ours, *inputs, *quantizer[0]}  # nothing is left over
