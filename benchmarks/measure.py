"""Time against this machine's own matrix product, and its own memory: figures that travel better than seconds.

Peak, bandwidths and program are measured in turn, so that what else the machine does falls on all.
"""

import resource
import time
from functools import partial

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxtok.nn import flops

SIDE = 2048  # of the matrices that make the peak
LARGE = 2**26  # float32 numbers that the bandwidths are measured on: 268 MB, which no cache holds


def seconds(fn, *args, repeats):
    """The least time of some calls, each waited for."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        best = min(best, time.perf_counter() - start)
    return best


@jax.jit
def product(a):
    return a @ a


def matmul_peak():
    """FLOP/s of a product of two square matrices, float32; the first call compiles it."""
    return 2 * SIDE**3 / seconds(product, jnp.ones((SIDE, SIDE)), repeats=3)


@partial(jax.jit, donate_argnums=0)
def scale(a):
    return 1.0001 * a


@jax.jit
def total(a):
    return a.sum()


def bandwidths():
    """(copy, read), bytes a second: of a large array that is scaled, and of one that is summed.

    A copy counts what it reads and what it writes, once each. The result takes the argument's place, or new pages of
    memory would be what is measured. A sum reads only; the faster of both is no bound of what a program can read, for
    reading and writing may have ways of their own: `copy` is the stricter figure.
    """
    a, copy = jnp.ones(LARGE), float("inf")
    for _ in range(4):  # the first call compiles it
        start = time.perf_counter()
        a = jax.block_until_ready(scale(a))
        copy = min(copy, time.perf_counter() - start)
    return 2 * a.nbytes / copy, a.nbytes / seconds(total, a, repeats=4)


def measure(rows, repeats=3):
    """Runs programs in turn and says how fast each is.

    Args:
      rows: {label: (function, arguments, plain)}: `plain` is the label of the same computation without shortcuts, or
        None; a plain form stands before what is compared with it.

    Returns [{"program", "seconds", "gflop", "of peak", "peak gflop/s", "copy GB/s", "read GB/s", "speed-up",
    "compile s", "memory MB"}, ...].
    """
    results = {}
    for label, (fn, args, plain) in tqdm(rows.items(), unit="program"):
        start = time.perf_counter()
        compiled = jax.jit(fn).lower(*args).compile()
        compile_seconds = time.perf_counter() - start
        work, memory = flops.count(fn, *args), compiled.memory_analysis()
        jax.block_until_ready(compiled(*args))
        peak, copy, read, best = 0.0, 0.0, 0.0, float("inf")
        for _ in range(repeats):
            peak, (copy, read) = max(peak, matmul_peak()), map(max, (copy, read), bandwidths())
            best = min(best, seconds(compiled, *args, repeats=1))
        results[label] = {
            "program": label,
            "seconds": best,
            "gflop": work / 1e9,
            "of peak": work / best / peak,
            "peak gflop/s": peak / 1e9,
            "copy GB/s": copy / 1e9,
            "read GB/s": read / 1e9,
            "speed-up": results[plain]["seconds"] / best if plain else None,
            "compile s": compile_seconds,
            "memory MB": (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes)
            / 1e6,
        }
    return list(results.values())


def resident_mb():
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kB on Linux
