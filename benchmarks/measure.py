"""Time against this machine's own matrix product: a figure that travels better than seconds.

Peak and program are measured in turn, so that what else the machine does falls on both.
"""

import resource
import time

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxtok.nn import flops

SIDE = 2048  # of the matrices that make the peak


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


def measure(rows, repeats=3):
    """Runs programs in turn and says how fast each is.

    Args:
      rows: {label: (function, arguments, plain)}: `plain` is the label of the same computation without shortcuts, or
        None; a plain form stands before what is compared with it.

    Returns [{"program", "seconds", "gflop", "of peak", "speed-up", "compile s", "memory MB"}, ...].
    """
    results = {}
    for label, (fn, args, plain) in tqdm(rows.items(), unit="program"):
        start = time.perf_counter()
        compiled = jax.jit(fn).lower(*args).compile()
        compile_seconds = time.perf_counter() - start
        work, memory = flops.count(fn, *args), compiled.memory_analysis()
        jax.block_until_ready(compiled(*args))
        peak, best = 0.0, float("inf")
        for _ in range(repeats):
            peak = max(peak, matmul_peak())
            best = min(best, seconds(compiled, *args, repeats=1))
        results[label] = {
            "program": label,
            "seconds": best,
            "gflop": work / 1e9,
            "of peak": work / best / peak,
            "peak gflop/s": peak / 1e9,
            "speed-up": results[plain]["seconds"] / best if plain else None,
            "compile s": compile_seconds,
            "memory MB": (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes)
            / 1e6,
        }
    return list(results.values())


def resident_mb():
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kB on Linux
