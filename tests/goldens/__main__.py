"""python -m tests.goldens FOLDER: compares every array of a folder of goldens with ours.

A folder with config.json is one model (FlexTok); one without is checked file by file, as far as TABLES know the files.
Exit code 0: all agree. 1: an array misses its tolerance, or has no partner. 2: FOLDER cannot be read as goldens.
"""

import json
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np

from jaxtok.pretrained.flextok import from_state_dict
from tests.goldens import (
    flextok_arrays,
    one_d_generators,
    one_d_quantizers,
    one_d_tokenizers,
    text_arrays,
    vae_arrays,
)
from tests.goldens.compare import MISS, SKIPPED, Row, compare_all

# {file name: f(arrays) -> (ours, inputs, tolerances)}: what we compute, what it was fed, {name: (rtol, atol)}.
TABLES = (one_d_quantizers.FILES, one_d_generators.FILES, one_d_tokenizers.FILES, text_arrays.FILES)

MODEL = ("enc_dim", "enc_depth", "dec_dim", "dec_depth", "n_reg", "levels", "ch", "patch", "head_dim", "max_timestep")
FILES = ("weights", "forward", "sampling", "train", "units", "vae_tiny")
INPUTS = {
    "forward": ("latents", "noise", "t"),
    "sampling": ("noise_init", "indices"),
    "train": ("keep_k",),
    "units": ("mode_u", "temb_t", "apg_vcond", "apg_vuncond"),
    "vae_tiny": ("x", "eps"),
}


class OddFolder(Exception):
    """The folder cannot be read as goldens; the message says why."""


def main(arguments) -> int:
    if len(arguments) != 1:
        print("usage: python -m tests.goldens FOLDER", file=sys.stderr)
        return 2
    folder, known = Path(arguments[0]), FILES
    try:
        with jax.default_matmul_precision("highest"):
            if stands_alone(folder):
                files = read_arrays(folder)
                known, rows = files.keys() & {name for table in TABLES for name in table}, check_alone(files)
            else:
                config, files = read(folder)
                rows = check(config, files)
    except OddFolder as error:
        print(error, file=sys.stderr)
        return 2
    for row in rows:
        print(row)
    for name in known:
        if name not in files:
            print(f"{name}.npz is not in this folder: nothing of it was checked")
    missed, skipped = (sum(row.verdict == verdict for row in rows) for verdict in (MISS, SKIPPED))
    checked = len(rows) - skipped
    for name in sorted(files.keys() - set(known)):
        print(f"{name}.npz: {len(files[name])} arrays not compared, for no code here answers to this file")
        skipped += len(files[name])
    print(f"{checked} arrays checked, {missed} missed, {skipped} not compared")
    return 1 if missed else 0


def read(folder) -> tuple[dict, dict]:
    """config.json, and {file name: {array name: array}} of every .npz file. Raises OddFolder."""
    if not folder.is_dir():
        raise OddFolder(f"{folder} is not a folder: give one that holds config.json, weights.npz and forward.npz.")
    try:
        config = json.loads((folder / "config.json").read_text())
        lacking = [f"model.{key}" for key in MODEL if key not in config["model"]]
        if len(config["run"]["keep"]) < 2:
            lacking.append("a second entry in run.keep")
    except FileNotFoundError:
        raise OddFolder(
            f"{folder} has no config.json, which says the sizes of the model, and no file that can be checked alone."
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise OddFolder(f"{folder}/config.json needs a model and a run with a keep list ({error!r}).") from None
    if lacking:
        raise OddFolder(f"{folder}/config.json lacks {', '.join(lacking)}.")
    files = read_arrays(folder)
    for name in ("weights", "forward"):
        if name not in files:
            raise OddFolder(f"{folder} has no {name}.npz; without it nothing can be checked.")
    for name, inputs in INPUTS.items():
        lacking = [key for key in inputs if name in files and key not in files[name]]
        if name == "units" and name in files:
            fsqs = [key.removesuffix("_levels") for key in files[name] if key.endswith("_levels")]
            fed = [f"{fsq}_{kind}" for fsq in fsqs for kind in ("z", "table_idx", "table_codes")]
            lacking += [key for key in fed if key not in files[name]]
        if lacking:
            raise OddFolder(f"{folder}/{name}.npz lacks {', '.join(lacking)}, which our code is fed.")
    if "vae_tiny" in files:
        try:
            config["vae_tiny"] = json.loads((folder / "vae_tiny_config.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError) as error:
            raise OddFolder(f"{folder}/vae_tiny.npz needs vae_tiny_config.json beside it ({error!r}).") from None
    return config, files


def read_arrays(folder) -> dict:
    """{file name: {array name: array}} of every .npz file. Raises OddFolder."""
    files = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path) as archive:
                files[path.stem] = dict(archive)
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise OddFolder(f"{path} cannot be read as an .npz file of plain arrays ({error}).") from None
    return files


def stands_alone(folder) -> bool:
    """Whether the folder has no config.json and a file that a table knows."""
    alone = any((folder / f"{name}.npz").exists() for table in TABLES for name in table)
    return alone and not (folder / "config.json").exists()


def check_alone(files) -> list[Row]:
    """A row for every array of the files that a table knows; several tables may each know a part of a file."""
    rows = []
    for name, golden in files.items():
        ours, inputs, tolerances = {}, [], {}
        checks = [table[name] for table in TABLES if name in table]
        try:
            for part in (check(golden) for check in checks):
                ours, inputs, tolerances = ours | part[0], [*inputs, *part[1]], tolerances | part[2]
        except KeyError as error:
            raise OddFolder(f"{name}.npz lacks {error}, which our code is fed.") from None
        except (TypeError, ValueError) as error:
            rows.append(Row(name, MISS, note=f"our code does not take these arrays: {error}"))
            continue
        inputs = set(inputs) - ours.keys()  # what one part is fed, another may compute
        unknown = {key: "no code here answers to it" for key in golden.keys() - ours.keys() - inputs}
        if checks:
            rows += compare_all(name, ours, golden, inputs, unknown, tolerances)
    return rows


def check(config, files) -> list[Row]:
    """A row for every array of the files that we know. Raises OddFolder for a config that no model can have."""
    try:
        shapes = flextok_arrays.shapes(config["model"], files["forward"]["latents"].shape[2:])
    except (TypeError, ValueError) as error:
        raise OddFolder(f"config.json and the latents do not make a model: {error}") from None
    try:
        params, _ = from_state_dict(files["weights"], shapes)
    except ValueError as error:
        return [Row("weights", MISS, note=f"\n{error}")]
    ours = flextok_arrays.forward(config, params, files["forward"])
    rows = compare_all("forward", ours, files["forward"], INPUTS["forward"])
    if "sampling" in files:
        inputs = [*INPUTS["sampling"], *(name for name in files["sampling"] if name.endswith("_args"))]
        ours = flextok_arrays.sampling(config, params, files["sampling"])
        rows += compare_all("sampling", ours, files["sampling"], inputs)
    if "train" in files:
        ours, golden = flextok_arrays.train(config, params, files["train"], files["forward"], files["weights"])
        rows += compare_all("train", ours, golden, INPUTS["train"])
    if "units" in files:
        inputs = [*INPUTS["units"], *(name for name in files["units"] if name.endswith(("_z", "_levels")))]
        ours, defects = flextok_arrays.units(files["units"])
        rows += compare_all("units", ours, files["units"], inputs, defects)
    if "vae_tiny" in files:
        try:
            ours, golden = vae_arrays.arrays(config["vae_tiny"], files["vae_tiny"])
        except ValueError as error:
            return [*rows, Row("vae_tiny", MISS, note=f"\n{error}")]
        rows += compare_all("vae_tiny", ours, golden, INPUTS["vae_tiny"])
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
