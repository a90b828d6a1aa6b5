"""Every test runs on eight fake CPU devices, so that meshes are meshes.

Set through the environment, before anything imports jax, so that the processes which tests start inherit it.
"""

import os
import sys
from importlib.metadata import version
from pathlib import Path

assert "jax" not in sys.modules, "something imported jax before tests/conftest.py could set it up"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("GLIBC_TUNABLES", "")  # spares `python -m jaxtok.train` its second start
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# Tests compile much and compute little: without LLVM's optimisations a program is ready in less than half the time, and
# with XLA's older emitter of fused loops, which jaxlib 0.12 has no more, in two thirds of that.
FLAGS = ["--xla_backend_optimization_level=0"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))

# What one run (or one xdist worker) compiled, the next reads. Files are named by the hash of the program, jax version
# and flags; a worker that finds one half written by another warns and compiles.
cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtok" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
