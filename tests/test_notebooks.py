"""The notebooks run from top to bottom, as a reader has them but for the sizes, and do what they say."""

import json
import os
import re

import pytest

from tests import runs

FOLDER = runs.ROOT / "docs" / "notebooks"
TINY = 'REPOSITORY, VARIANT, STEPS, WORKDIR = "", "tiny", 6, "runs/tiny"\n'
# Of each: what takes the place of its parameters, and what must hold when it has run.
NOTEBOOKS = {
    "quickstart": (
        TINY + "PUBLISHED = False",
        """
        assert sorted(rebuilt) == [1, 2, 4, 8] and all(found.shape == images.shape for found in rebuilt.values())
        assert (rebuilt[1] != rebuilt[8]).any() and codes.shape == (6, 8) and metrics["psnr/one step@8"] > 5
        same = tokenizer.decode(tokenizer.encode(images)[:, :2], steps=1)
        assert (np.asarray(same) == rebuilt[2]).all()
        """,
    ),
    "train_your_own": (
        TINY + 'PICTURES = "mine"',
        """
        assert held_out.class_names == ("dark", "light") and 0 < len(held_out) < 40
        assert report["pictures"] == len(held_out) and report["step"] == 6
        assert np.load("codes.npz")["codes"].shape == (1, 8) and Path(WORKDIR, "evaluation", "report.html").exists()
        """,
    ),
    "generate": (
        TINY + 'GENERATOR_STEPS, PASSES = 6, 1\nTOKENIZER, CODES, GENERATOR = "runs/tiny", "runs/codes", "runs/ar"',
        """
        assert manifests["train"]["counts"]["examples"] == 64 and codes.shape == (40, 8)
        assert drawn.shape == (40, 16, 16, 3) and (rows["1 tokens"] != drawn).any() and "bits a token" in metrics
        assert (rows["8 tokens"] == drawn).all()
        """,
    ),
}


def read(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def source(cell):
    return "".join(cell["source"])


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_small_says_what_it_installs_and_holds_no_output(name):
    cells = read(name)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert cells[0]["cell_type"] == "markdown" and source(cells[0]).startswith("# ")
    assert code[0]["metadata"]["tags"] == ["parameters"] and "%pip install" in source(code[1])
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert max(len(line) for cell in code for line in source(cell).splitlines()) <= 120


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_parameter_has_a_tiny_value(name):
    """So that the test replaces all of them, and a reader finds all of them at the top."""
    names = lambda text: set(re.findall(r"\b[A-Z_]{4,}\b", re.sub(r"#.*|\"[^\"]*\"", "", text)))
    parameters = source(read(name)["cells"][1])
    assert names(parameters) <= names(NOTEBOOKS[name][0])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    parameters, check = NOTEBOOKS[name]
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells[1].source = parameters
    lines = [line.strip() for line in check.strip().splitlines()]
    notebook.cells.append(nbformat.v4.new_code_cell("\n".join([*lines, 'print("all of it")'])))
    if name == "train_your_own":
        write_pictures(tmp_path / "mine")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(runs.ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    client = nbclient.NotebookClient(notebook, timeout=600, resources=dict(metadata=dict(path=str(tmp_path))))
    client.execute()  # an error in a cell is one here, and shows the cell
    assert notebook.cells[-1].outputs[0].text == "all of it\n"
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert any("image/png" in output.data for output in shown)


def write_pictures(folder):
    """Eighty pictures of two classes, of which some tenth is held out."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind, low in (("dark", 0), ("light", 128)):
        (folder / kind).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(rng.integers(low, low + 128, (20, 24, 3), np.uint8)).save(folder / kind / f"{i}.png")
