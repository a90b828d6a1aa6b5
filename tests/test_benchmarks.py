"""That the benchmarks run at any size. What they measure is no test's affair."""

import jax
import pytest

from benchmarks import flextok, measure


def test_every_program_traces_and_is_compared_with_one_before_it():
    rows = flextok.programs("tiny", steps=2, batches=(1,))
    assert {"encode 1", "decode 8, plain", "decode 2", 'decode 2 without "once"', "train step 2"} <= set(rows)
    before = set()
    for label, (fn, args, plain) in rows.items():
        assert plain is None or plain in before
        assert jax.eval_shape(fn, *args) is not None
        before.add(label)


def test_a_measurement_says_what_it_divided():
    square = lambda a: a @ a
    a = jax.numpy.ones((64, 64))
    plain, same = measure.measure({"plain": (square, (a,), None), "same": (square, (a,), "plain")}, repeats=1)
    assert plain["gflop"] == 2 * 64**3 / 1e9 and plain["speed-up"] is None
    assert same["of peak"] * same["peak gflop/s"] * same["seconds"] == pytest.approx(same["gflop"])
    assert same["speed-up"] == plain["seconds"] / same["seconds"]
