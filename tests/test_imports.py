"""Who may know whom: docs/design.md, section "Imports", held against the import statements of every file."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("codecs", "encoders", "quantizers", "decoders", "losses")
BELOW = ("nn", "structs")
# What a room may import of jaxtok, beside itself. A room is a folder or a file of jaxtok/; None: it stands on top.
MAY_IMPORT = {
    "structs": (),
    "nn": (),
    "data": (),
    **dict.fromkeys(PARTS, BELOW),
    "tokenizer": ("structs",),
    "generate": (*BELOW, "tokenizer"),
    "reduce": (*BELOW, "tokenizer"),
    "eval": (*BELOW, "tokenizer"),
    "pretrained": (*BELOW, "convert"),  # whose command is also `python -m jaxtok.pretrained.convert`
    "sharding": (),
    "metrics": (),
    "checkpoint": ("sharding",),
    "optim": ("sharding",),
    **dict.fromkeys(("__init__", "build", "tasks", "step", "train", "tokenize", "evaluate", "export"), None),
    **dict.fromkeys(("bound", "hub", "convert", "demo", "init_from", "plan", "stages", "command", "__main__"), None),
    **dict.fromkeys(("distributed", "chips", "hlo"), ()),
}
TENSORFLOW = ("tensorflow", "clu.metric_writers", "clu.periodic_actions")  # the last two import it


def imports(path, root=ROOT):
    """Every module that a file imports, relative ones resolved, and whether that happens as the file is loaded.

    `from a import b` counts as a.b, for b may be a module: [("jaxtok.nn.masks", True), ...]
    """
    package = path.relative_to(root).parent.parts
    tree = ast.parse(path.read_text(), str(path))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    later = {id(node) for function in functions for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        found += [(name, id(node) not in later) for name in names]
    return found


def within(name, modules):
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def offences(path, root=ROOT):
    """What a file of jaxtok/ or configs/ imports and must not, a sentence each."""
    place, *rest = path.relative_to(root).with_suffix("").parts
    if place == "configs":
        allowed = ("ml_collections", "configs")
        if rest[-1].startswith("__"):  # of the package itself, which finds and lists them
            allowed = ("configs", *sys.stdlib_module_names)
        names = [name for name, _ in imports(path, root)]
        return [f"imports {name}; a config imports {allowed} only" for name in names if not within(name, allowed)]
    room, found = rest[0], []
    if room not in MAY_IMPORT:
        return [f"is in the room {room}, which tests/test_imports.py does not know: say there what it may import"]
    allowed = None if rest[-1] == "__main__" else MAY_IMPORT[room]  # a command stands on top
    for name, at_top in imports(path, root):
        if within(name, ["jaxtok"]) and allowed is not None:
            if not within(name, [f"jaxtok.{other}" for other in (room, *allowed)]):
                found.append(f"imports {name}; {room} may import {allowed or 'nothing'} of jaxtok")
        if room == "data" and within(name, ["jax", "jaxlib", "flax", "optax", "orbax"]):
            found.append(f"imports {name}; worker processes of the data pipeline must not start jax")
        if within(name, ["orbax"]) and room != "checkpoint":
            found.append(f"imports {name}; only checkpoint.py knows Orbax")
        if within(name, TENSORFLOW) and (at_top or room not in ("data", "export", "metrics")):
            found.append(f"imports {name}; tensorflow comes only inside functions of data, export and metrics")
        if within(name, ["torch"]):
            found.append(f"imports {name}; nothing here needs torch")
        if within(name, ["jax._src"]) and room != "export":
            found.append(f"imports {name}; private parts of jax change without notice")
    return found


FILES = sorted([*ROOT.glob("jaxtok/**/*.py"), *ROOT.glob("configs/**/*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_design(path):
    assert offences(path) == []


def test_the_files_are_found():
    assert {"tokenizer.py", "transformer.py", "fsq.py", "flextok.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize(
    "place, line, says",
    [
        ("jaxtok/nn/x.py", "from jaxtok.structs import Codes", "nn may import nothing"),
        ("jaxtok/structs.py", "import jaxtok.nn", "structs may import nothing"),
        ("jaxtok/structs.py", "from jaxtok import nn", "imports jaxtok.nn;"),
        ("jaxtok/encoders/x.py", "from jaxtok.quantizers.fsq import FSQ", "encoders may import"),
        ("jaxtok/losses/x.py", "from ..decoders import flow", "imports jaxtok.decoders.flow;"),
        ("jaxtok/losses/x.py", "def f():\n    from jaxtok.eval import pictures", "losses may import"),
        ("jaxtok/decoders/x.py", "from jaxtok import Tokenizer", "imports jaxtok.Tokenizer;"),
        ("jaxtok/tokenizer.py", "from jaxtok.nn import masks", "tokenizer may import"),
        ("jaxtok/eval/x.py", "from jaxtok.quantizers import fsq", "eval may import"),
        ("jaxtok/generate/x.py", "from . import y; from jaxtok.train import train", "imports jaxtok.train.train;"),
        ("jaxtok/data/x.py", "import jax.numpy as jnp", "must not start jax"),
        ("jaxtok/data/x.py", "def f():\n    from flax import struct", "must not start jax"),
        ("jaxtok/data/x.py", "from jaxtok.structs import Codes", "data may import nothing"),
        ("jaxtok/data/x.py", "import tensorflow as tf", "only inside functions"),
        ("jaxtok/data/x.py", "try:\n    import tensorflow\nexcept ImportError:\n    pass", "only inside functions"),
        ("jaxtok/losses/x.py", "def f():\n    import tensorflow", "only inside functions of data"),
        ("jaxtok/metrics.py", "from clu import metric_writers", "only inside functions"),
        ("jaxtok/train.py", "import orbax.checkpoint as ocp", "only checkpoint.py"),
        ("jaxtok/train.py", "def f():\n    import torch.nn", "torch"),
        ("jaxtok/build.py", "from jax._src import core", "private"),
        ("jaxtok/misc/x.py", "", "does not know"),
        ("configs/x.py", "import jax", "a config imports"),
        ("configs/x.py", "from jaxtok.structs import Codes", "a config imports"),
    ],
)
def test_an_offender_is_caught(tmp_path, place, line, says):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(line)
    [offence] = offences(path, tmp_path)
    assert says in offence


@pytest.mark.parametrize(
    "place, line",
    [
        ("jaxtok/decoders/x.py", "from jaxtok.nn import flow\nfrom jaxtok.decoders import schedule\nfrom . import y"),
        ("jaxtok/data/x.py", "from jaxtok.data import images\ndef f():\n    import tensorflow as tf"),
        ("jaxtok/data/x.py", "import jaxtyping, tensorflow_datasets"),  # names that only begin alike
        ("jaxtok/checkpoint.py", "import orbax.checkpoint"),
        ("jaxtok/export.py", "def f():\n    import tensorflow\n    from jax._src.lib import mlir"),
        ("configs/x.py", "from ml_collections import ConfigDict\nfrom configs import common"),
        ("configs/x.py", "from configs.common import base\nfrom configs import titok"),
    ],
)
def test_what_the_design_allows_passes(tmp_path, place, line):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert offences(path, tmp_path) == []


def fresh(code):
    """Runs code in a new Python; its output and CPU seconds, those of its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return out, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_import_jaxtok_is_light():
    code = "import jaxtok, sys; print(*sys.modules)"
    out, seconds = fresh(code)
    heavy = ["tensorflow", "torch", "orbax", "grain", "jaxtok.data"]
    assert "jaxtok" in out.split() and not [name for name in out.split() if within(name, heavy)]
    # CPU time, not wall time; a crowded machine inflates even that, so the best of three counts.
    assert min(seconds, *(fresh(code)[1] for _ in range(2))) < 2


def test_a_config_loads_without_jax():
    out, _ = fresh("import configs.flextok, sys; configs.flextok.get_config(); print(*sys.modules)")
    heavy = ["jax", "flax", "jaxtok"]
    assert "ml_collections" in out.split() and not [name for name in out.split() if within(name, heavy)]
