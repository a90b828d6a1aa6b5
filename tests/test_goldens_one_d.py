"""Our quantizers against arrays of the references, and the checker against files with faults."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.goldens import one_d_quantizers, one_d_tokenizers
from tests.goldens.__main__ import main
from tests.goldens.compare import MISS, OK, SKIPPED, compare_all

FOLDER = Path(__file__).parent / "goldens" / "one_d"
FILES = sorted(name for name in one_d_quantizers.FILES if (FOLDER / f"{name}.npz").exists())

# What is neither fed to a quantizer nor one of its outputs.
OTHERS = {
    "fqgan_dual_quant": {"teacher_feat", "pred_feat", "infonce"},
    "tokenbridge": {
        *("boundaries", "channel_order", "z", "mask", "targets_reordered", "channel_logits", "loss"),
        "greedy_tokens_reordered",  # which are the head's, in one_d_generators
    },
}


def load(name):
    with np.load(FOLDER / f"{name}.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module", params=FILES)
def computed(request):
    """(name, golden arrays, ours, inputs, tolerances)."""
    golden = load(request.param)
    with jax.default_matmul_precision("highest"):
        return request.param, golden, *one_d_quantizers.FILES[request.param](golden)


def test_every_array_of_a_quantizer_agrees(computed):
    name, golden, ours, inputs, tolerances = computed
    rows = compare_all(name, ours, golden, inputs, tolerances=tolerances)
    assert [row for row in rows if row.verdict == MISS and row.name.split("/", 1)[1] in ours] == []
    assert sum(row.verdict == OK for row in rows) == len(ours) > 0
    of_a_model = {key for key in golden if key.startswith("param/")} if name == "tokenbridge" else set()
    if name not in one_d_tokenizers.FILES:  # where the rest is answered for
        assert golden.keys() - ours.keys() - set(inputs) - of_a_model == OTHERS.get(name, set())


def test_a_wrong_entry_of_any_array_is_found(computed):
    """One entry off by three tolerances, or by one; nothing else misses."""
    name, golden, ours, inputs, tolerances = computed
    for key in ours:
        rtol, atol = tolerances.get(key, (0, 1))
        array = golden[key].copy()
        step = 1 if array.dtype.kind in "biu" else 3 * (atol + rtol * np.abs(array.flat[-1]))
        array.reshape(-1)[-1:] += np.asarray(step, array.dtype)
        rows = compare_all(name, ours, golden | {key: array}, [k for k in golden if k not in ours], None, tolerances)
        assert [row.name for row in rows if row.verdict == MISS] == [f"{name}/{key}"]


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of these files; {file: {array: value}} replaces arrays, and None takes one away."""

    def make(names, changes=None):
        for name in names:
            arrays = load(name) | (changes or {}).get(name, {})
            np.savez(tmp_path / f"{name}.npz", **{key: array for key, array in arrays.items() if array is not None})
        return str(tmp_path)

    return make


def test_a_folder_is_checked_file_by_file(folder, capsys):
    path = folder(["lfq_asymmetric", "robusttok_anneal", "tokenbridge"])
    shutil.copy(FOLDER / "lfq_asymmetric.npz", f"{path}/something_else.npz")
    assert main([path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "something_else.npz: 5 arrays not compared, for no code here answers to this file" in lines
    names = [line.split()[0] for line in lines]
    assert names.count("lfq_asymmetric/indices_pre") == names.count("tokenbridge/dequant") == 1
    unanswered = [line for line in lines if line.startswith("tokenbridge/boundaries ")]
    assert SKIPPED in unanswered[0]


def test_a_wrong_file_is_found_by_the_program(folder, capsys):
    ratio = load("robusttok_anneal")["ratio"]
    assert main([folder(["robusttok_anneal"], {"robusttok_anneal": {"ratio": ratio + 1e-4}})]) == 1
    output = capsys.readouterr().out
    assert "robusttok_anneal/ratio" in output and "3 arrays checked, 1 missed, 1 not compared" in output


def test_an_array_that_our_code_does_not_take_is_a_miss(folder, capsys):
    z = load("lfq_asymmetric")["z"][:, :-1]  # one channel fewer than bits
    assert main([folder(["lfq_asymmetric"], {"lfq_asymmetric": {"z": z}})]) == 1
    assert "our code does not take these arrays: LFQ has 8 bits" in capsys.readouterr().out


def test_a_file_without_an_input_is_refused(folder, capsys):
    assert main([folder(["lfq_asymmetric"], {"lfq_asymmetric": {"bits": None}})]) == 2
    assert "lfq_asymmetric.npz lacks 'bits', which our code is fed" in capsys.readouterr().err


def test_a_folder_of_unknown_files_is_refused(tmp_path, capsys):
    shutil.copy(FOLDER / "lfq_asymmetric.npz", tmp_path / "something_else.npz")
    assert main([str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_other_sizes_pass_too(tmp_path, capsys):
    """Files of our own numbers: every size comes from the arrays."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    table = normal(11, 4)
    inputs = {
        "vq_l2": {"z": normal(3, 4, 2, 2), "weight": normal(3, 4, 2, 2), "param/embedding.weight": table},
        "lfq_groups": {"z": normal(1, 9, 5, 1), "weight": normal(1, 9, 5, 1)},
        "omnitokenizer_codebook": {
            **{"z": normal(3, 5, 1, 4, 2), "embeddings_before": normal(7, 5), "z_avg_before": normal(7, 5)},
            "N_before": rng.uniform(1, 2, 7).astype(np.float32),
        },
        "lfq_asymmetric": {"z": normal(2, 5, 3), "bits": np.array([1, 4])},
    }
    given = {  # outputs whose shape or entries the code reads
        "vq_l2": {},
        "lfq_groups": {"indices": np.zeros(15, int), "indices_eval": rng.integers(0, 8, 15)},
        "omnitokenizer_codebook": {"encodings": np.zeros((3, 1, 4, 2), int)},
        "lfq_asymmetric": {},
    }
    count = 0
    for name, arrays in inputs.items():
        outputs = given[name]
        for _ in range(2):  # the second time with true indices
            outputs = {key: np.asarray(x) for key, x in one_d_quantizers.FILES[name](arrays | outputs)[0].items()}
        np.savez(tmp_path / f"{name}.npz", **arrays, **outputs)
        count += len(outputs)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{count} arrays checked, 0 missed, ")
