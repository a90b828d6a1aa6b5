"""Nothing in jaxtok.data imports jax or tensorflow, and what is large is imported when it is used."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_jax_and_no_tensorflow():
    code = """
import importlib, pathlib, sys
names = sorted(p.stem for p in pathlib.Path("jaxtok/data").glob("*.py"))
assert len(names) > 5
for name in names:
    importlib.import_module("jaxtok.data" if name == "__init__" else f"jaxtok.data.{name}")
large = {"jax", "jaxlib", "flax", "tensorflow", "torch", "grain", "array_record", "tensorflow_datasets"}
assert not large & sys.modules.keys(), large & sys.modules.keys()
from jaxtok.data.pipeline import train_batches
from jaxtok.data.shapes import Shapes
with train_batches(Shapes(size=16, n=8), batch_size=4) as batches:
    next(batches)
assert "tensorflow" not in sys.modules  # jax may be there now: Grain takes its tree functions from it, if installed
print("light")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "light", run.stderr
