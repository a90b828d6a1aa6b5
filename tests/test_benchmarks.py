"""That the benchmarks run at any size. What they measure is no test's affair."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks import flextok, generate, measure, systems
from tests import runs
from tests.generate import models


def check_programs(rows):
    before = set()
    for label, (fn, args, plain) in rows.items():
        assert plain is None or plain in before
        assert jax.eval_shape(fn, *args) is not None
        before.add(label)


def test_every_program_traces_and_is_compared_with_one_before_it():
    rows = flextok.programs("tiny", steps=2, batches=(1,))
    assert {"encode 1", "decode 8, plain", "decode 2", 'decode 2 without "once"', "train step 2"} <= set(rows)
    check_programs(rows)


def test_every_generator_traces_and_says_what_it_must_read():
    rows, sizes = generate.programs("tiny", tokens=9, batches=(1, 4))
    check_programs(rows)
    assert rows.keys() == sizes.keys() and len(rows) == 7
    layer = 4 * 32**2 + 3 * 32 * 85 + 4 * 32  # attention, SwiGLU, two norms
    read = 4 * (2 * layer + 32 + 2 * 32 + 32 * 48)  # the start, the last norm, the head
    place = 4 * 2 * 2 * 32  # keys and values of two layers; 5 places on average
    assert sizes["tiny, batch 1"] == sizes["tiny, batch 1, plain"] == (9, 9 * (read + 5 * place))
    assert sizes["tiny, batch 4, guided"] == (36, 9 * (read + 8 * 5 * place))
    tokens, of_masked = sizes["masked, batch 1, guided, 8 steps"]
    assert tokens == 16 and of_masked % 8 == 0


def test_sampling_without_a_cache_gives_the_same_codes():
    """Of 9 tokens, so that the prefix grows by two and the last part is shorter."""
    module = models.ar()
    params, (_, condition), rng = models.parameters(module), models.batch(module), jax.random.key(3)
    codes = models.run(module, "sample", params, rng, condition)
    np.testing.assert_array_equal(generate.recompute(module, module.length, params, rng, condition), codes)


def test_bandwidth_counts_bytes_read_and_written(monkeypatch):
    """On a clock that ticks once between begin and end."""
    clock = itertools.count()
    monkeypatch.setattr(measure, "LARGE", 1000)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    assert measure.bandwidths() == (8000, 4000)


def test_a_measurement_says_what_it_divided(monkeypatch):
    square = lambda a: a @ a
    a = jax.numpy.ones((64, 64))
    monkeypatch.setattr(measure, "LARGE", 1000)
    plain, same = measure.measure({"plain": (square, (a,), None), "same": (square, (a,), "plain")}, repeats=1)
    assert plain["gflop"] == 2 * 64**3 / 1e9 and plain["speed-up"] is None
    assert same["of peak"] * same["peak gflop/s"] * same["seconds"] == pytest.approx(same["gflop"])
    assert same["speed-up"] == plain["seconds"] / same["seconds"]


def test_a_run_becomes_a_row_once(tmp_path, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    first = systems.run("kl_vae:tiny", 3, tmp_path / "it", ["--config.total_steps=2", "--config.log_every=1"])
    assert first["steps"] == 2 and first["peak memory, GB"] > 0 and first["minutes"] > 0
    assert first["PSNR, all tokens"] == runs.logged(tmp_path / "it", "eval/psnr/mean@64")[2]
    monkeypatch.setattr(systems.subprocess, "run", None)
    assert systems.run("kl_vae:tiny", 3, tmp_path / "it", []) == first
    other = first | {"seed": 4, "PSNR, all tokens": first["PSNR, all tokens"] + 2}
    assert f"{first['PSNR, all tokens'] + 1:.2f}" in systems.table([first, other])


def test_a_run_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    with pytest.raises(RuntimeError, match="(?s)kl_vae:tiny, seed 0: .*b3"):
        systems.run("kl_vae:tiny", 0, tmp_path / "it", ["--config.optimizer.b3=1"])
