"""Our FlexTok against arrays of the reference, and the checker against folders with faults."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxtok.nn.position import sincos_2d
from jaxtok.pretrained.convert import match
from jaxtok.pretrained.flextok import RULES, from_state_dict
from tests.goldens import flextok_arrays
from tests.goldens.__main__ import main
from tests.goldens.compare import MISS, OK, compare, compare_all

FOLDER = Path(__file__).parent / "goldens" / "flextok"
WQ = "encoder.module_dict.enc_transformer.blocks.0.attn.wq.weight"
POSEMBS = "encoder.module_dict.enc_posemb_module.posembs"


ODD_PATCH = (FOLDER / "config.json").read_text().replace('"patch": 2', '"patch": 3')  # of latents of 8 x 8


def load(name):
    with np.load(FOLDER / f"{name}.npz") as archive:
        return dict(archive)


@pytest.fixture
def copy(tmp_path):
    """Makes a folder of goldens from the given files; {file: {array: f}} changes arrays by f."""

    def copy(files, changes=None):
        for config in FOLDER.glob("*.json"):
            shutil.copy(config, tmp_path)
        for name in files:
            arrays = load(name)
            for key, change in (changes or {}).get(name, {}).items():
                arrays[key] = change(arrays[key])
            np.savez(tmp_path / f"{name}.npz", **arrays)
        return str(tmp_path)

    return copy


def one_entry(by):
    """Changes the first entry of an array."""

    def change(array):
        array = array.copy()
        array.flat[0] += by
        return array

    return change


def missed(output):
    return [line.split()[0] for line in output.splitlines() if MISS in line.split()]


def test_flextok_reproduces_every_array(capsys):
    assert main([str(FOLDER)]) == 0
    output = capsys.readouterr().out
    names = [line.split()[0] for line in output.splitlines()]
    for file in ("forward", "sampling", "train", "units", "vae_tiny"):
        for key in load(file):
            assert names.count(f"{file}/{key}") == (not key.startswith("w/"))
    assert "sincos_16_4x6_nonsquare" in output and "known defect of the reference" in output
    assert output.splitlines()[-1] == "130 arrays checked, 0 missed, 28 not compared"


def test_a_wrong_entry_in_any_file_is_found(copy, capsys):
    """One entry of one array in each file, by little more than it may differ; nothing else misses."""
    changes = {
        "forward": {"velocity_k4": one_entry(1e-4), "fsq_indices": one_entry(1)},
        "sampling": {"apg_mid_traj": one_entry(1e-4), "cfg_full_vuncond": one_entry(np.nan)},
        "train": {"loss": lambda loss: loss + np.float32(1e-4), f"grad/{WQ}": one_entry(1e-6)},
        "units": {"fsq1_table_codes": one_entry(1e-3), "mode_sigma_0.25": one_entry(-1e-4)},
        "vae_tiny": {"logvar": one_entry(1e-4), "kl": one_entry(-1e-3)},
    }
    assert main([copy(["weights", *changes], changes)]) == 1
    output = capsys.readouterr().out
    assert sorted(missed(output)) == sorted(f"{file}/{key}" for file, keys in changes.items() for key in keys)
    assert "10 missed" in output.splitlines()[-1]


def test_a_wrong_weight_is_found(copy, capsys):
    folder = copy(["weights", "forward"], {"weights": {WQ: one_entry(0.1)}})
    np.savez(Path(folder) / "other.npz", a=np.ones(1), b=np.ones(1))
    assert main([folder]) == 1
    output = capsys.readouterr().out
    assert "other.npz: 2 arrays not compared" in output and output.endswith("missed, 5 not compared\n")
    assert "forward/enc_seq_after_block" in missed(output) and "forward/enc_seq_in" not in missed(output)
    for absent in ("sampling", "train", "units", "vae_tiny"):
        assert f"{absent}.npz is not in this folder" in output


def test_weights_that_do_not_convert_are_a_miss(copy, capsys):
    folder = copy(["weights", "forward"], {"weights": {POSEMBS: one_entry(0.1), WQ: lambda w: w[:32]}})
    assert main([folder]) == 1
    output = capsys.readouterr().out
    assert f"{POSEMBS}: encoder/pos_embed is computed here and differs" in output and f"{WQ}: encoder/blocks" in output
    assert output.splitlines()[-1] == "1 arrays checked, 1 missed, 0 not compared"


def test_the_codec_needs_its_weights_and_its_config(copy, capsys):
    quant = "w/quant_conv.weight"
    folder = Path(copy(["weights", "forward", "vae_tiny"], {"vae_tiny": {quant: lambda w: w[:4]}}))
    assert main([str(folder)]) == 1
    assert "quant_conv.weight: quant_conv/kernel needs (1, 1, 8, 8)" in capsys.readouterr().out
    (folder / "vae_tiny_config.json").unlink()
    assert main([str(folder)]) == 2
    assert "vae_tiny.npz needs vae_tiny_config.json beside it" in capsys.readouterr().err


def other_model():
    """Unequal widths and depths, fewer channels and levels, large patches, an odd number of registers."""
    model = {"enc_dim": 32, "enc_depth": 1, "dec_dim": 48, "dec_depth": 3, "n_reg": 5, "levels": [7, 4, 3], "ch": 3}
    return model | {"patch": 4, "grid": [6, 6], "head_dim": 16, "max_timestep": 1.0}


def random_weights(model, rng):
    """A foreign state dict of that model."""
    patch, channels, registers = model["ch"] * model["patch"] ** 2, len(model["levels"]), model["n_reg"]
    shapes = {}
    for part in ("enc", "dec"):
        width, depth = model[f"{part}_dim"], model[f"{part}_depth"]
        hidden = int(2 * int(4 * width) / 3)
        shapes |= linear(f"{part}_{'noise_' if part == 'dec' else ''}patch_emb.patch_proj", width, patch)
        for block in (f"{part}_transformer.blocks.{i}." for i in range(depth)):
            for name, out, into in (("fc1", hidden, width), ("fc2", width, hidden), ("fc3", hidden, width)):
                shapes[f"{block}mlp.{name}.weight"] = (out, into)
            shapes |= {f"{block}attn.{name}.weight": (width, width) for name in ("wq", "wk", "wv", "proj")}
            if part == "dec":
                shapes |= linear(f"{block}adaLN_modulation.1", 12 * width, width)
    shapes |= {"enc_register_module.registers": (registers, model["enc_dim"])}
    shapes |= linear("enc_to_latents.proj", channels, model["enc_dim"])
    shapes |= linear("dec_from_latents.proj", width, channels)
    shapes |= {"dec_registers_posemb_module.posembs": (1, 1, width, registers)}
    shapes |= {"dec_nested_dropout.dropout_mask_token": (width,), "dec_latent_dropout.nullcond": (width,)}
    shapes |= linear("dec_time_embedder.mlp.0", width, 256) | linear("dec_time_embedder.mlp.2", width, width)
    shapes |= linear("dec_to_patches.adaLN_modulation.1", 2 * width, width)
    shapes |= linear("dec_to_patches.proj", patch, width)
    arrays = {key: rng.normal(size=shape, scale=0.3) for key, shape in shapes.items()}
    for key, width in (("enc_posemb_module", model["enc_dim"]), ("dec_patches_posemb_module", model["dec_dim"])):
        arrays[f"{key}.posembs"] = np.moveaxis(sincos_2d(*model["grid"], width), -1, 0)[None]
    sides = {"enc": "encoder", "dec": "decoder"}
    return {f"{sides[key[:3]]}.module_dict.{key}": array.astype(np.float32) for key, array in arrays.items()}


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def foreign_layout(gradients, weights, shapes):
    """Gradients by key in our layout -> in the foreign one, by following every entry through the table."""
    numbered = {key: np.arange(a.size).reshape(a.shape) for key, a in weights.items()}
    foreign = {}
    for key, piece in match(numbered, RULES, shapes)[0].items():
        foreign[key] = np.empty(weights[key].shape, np.float32)
        foreign[key].flat[piece.value] = gradients[key]
    return foreign


def test_other_sizes_pass_too(tmp_path, capsys):
    """A folder of our own numbers: the checker takes every size from config.json and from the arrays.

    Latents are oblong and cover a corner of the position table.
    """
    model, rng = other_model(), np.random.default_rng(0)
    config, weights = {"model": model, "run": {"keep": [2, 3]}}, random_weights(model, rng)
    latents, noise = rng.normal(size=(2, 3, 3, 8, 20)).astype(np.float32)
    forward = {"latents": latents, "noise": noise, "t": np.array([0.1, 0.5, 0.8], np.float32)}
    sampling = {"noise_init": noise, "indices": rng.integers(0, 84, (3, 5)), "cfg_mid_args": np.array([3, 2, 2.0, 0])}
    train = {"keep_k": np.array([1, 5, 2])}

    shapes = flextok_arrays.shapes(model, (8, 20))
    params, report = from_state_dict(weights, shapes)
    assert str(report) == ""
    forward |= flextok_arrays.forward(config, params, forward)
    sampling |= flextok_arrays.sampling(config, params, sampling)
    train |= flextok_arrays.train(config, params, train, forward, weights)[0]
    gradients = {name.removeprefix("grad/"): train.pop(name) for name in list(train) if name.startswith("grad/")}
    train |= {f"grad/{key}": g for key, g in foreign_layout(gradients, weights, shapes).items()}
    del train["grad/decoder.module_dict.dec_latent_dropout.nullcond"]  # unused there, and so absent
    assert forward["velocity_k2"].shape == latents.shape and np.std(forward["velocity_k2"]) > 0.1

    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, arrays in (("weights", weights), ("forward", forward), ("sampling", sampling), ("train", train)):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    assert main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "units.npz is not in this folder" in output
    count = len(forward) + len(sampling) + len(train)
    # nullcond has no gradient in the file and is checked to be zero; seven arrays are inputs
    assert output.splitlines()[-1] == f"{count + 1 - 7} arrays checked, 0 missed, 7 not compared"


@pytest.mark.parametrize(
    ("files", "config", "sentence"),
    [
        (["weights", "forward"], None, "has no config.json"),
        (["weights", "forward"], "{", "config.json needs a model"),
        (["weights", "forward"], '{"model": {"enc_dim": 64}, "run": {"keep": [1, 4]}}', "lacks model.enc_depth"),
        (["weights", "forward"], ODD_PATCH, "do not make a model: "),
        (["forward"], "copy", "has no weights.npz"),
        (["weights"], "copy", "has no forward.npz"),
    ],
)
def test_an_odd_folder_is_refused(copy, capsys, files, config, sentence):
    folder = Path(copy(files))
    if config is None:
        (folder / "config.json").unlink()
    elif config != "copy":
        (folder / "config.json").write_text(config)
    assert main([str(folder)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_broken_file_or_no_folder_is_refused(copy, capsys, tmp_path):
    folder = Path(copy(["weights", "forward"]))
    (folder / "units.npz").write_bytes(b"PK\x03\x04 and nothing after")
    assert main([str(folder)]) == 2
    assert "units.npz cannot be read" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_compare_takes_neither_nan_nor_another_shape_for_agreement():
    golden = np.array([1.0, 2.0], np.float32)
    assert compare("x", golden + np.float32(1e-5), golden).verdict == OK
    assert compare("x", golden + np.float32(1e-4), golden).verdict == MISS
    assert compare("x", [1.0, np.nan], golden).verdict == MISS
    assert compare("x", [[1.0, 2.0]], golden).verdict == MISS
    assert compare("x", golden[:0], golden[:0]).verdict == MISS
    assert compare("grad/x", golden + np.float32(1e-4), golden).verdict == OK  # 2e-4 for a largest entry of 2
    assert compare("grad/x", golden + np.float32(3e-4), golden).verdict == MISS
    assert compare("indices", [3, 4], np.array([3, 5])).verdict == MISS


def test_arrays_without_a_partner_are_a_miss():
    rows = compare_all("file", {"ours": np.ones(2)}, {"theirs": np.ones(2), "given": np.ones(2)}, inputs=["given"])
    assert {row.name: row.verdict for row in rows if row.verdict == MISS} == {"file/ours": MISS, "file/theirs": MISS}


def test_entries_at_a_rounding_tie_are_ignored_and_counted():
    bounded = np.array([[0.500001, 1.0], [0.4, 1.0]], np.float32)
    golden = {"a_bounded": bounded, "a_codes": np.array([[1.0, 1.0], [0.0, 1.0]]), "a_indices": np.array([3, 2])}
    other_side = golden | {"a_codes": np.array([[0.0, 1.0], [0.0, 1.0]]), "a_indices": np.array([2, 2])}
    rows = {row.name: row for row in compare_all("f", other_side, golden)}
    assert {row.verdict for row in rows.values()} == {OK}
    assert "1 of 4 entries ignored" in rows["f/a_codes"].note and "1 of 2" in rows["f/a_indices"].note
    wrong = other_side | {"a_codes": np.array([[0.0, 1.0], [1.0, 1.0]]), "a_indices": np.array([2, 3])}
    assert [row.verdict for row in compare_all("f", wrong, golden)] == [OK, MISS, MISS]
