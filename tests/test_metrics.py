import io
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.metrics import Logger, format_table
from tests import runs


def lines(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_each_log_is_one_line_on_disk_before_the_run_ends(tmp_path):
    logger = Logger(tmp_path / "made" / "here", total_steps=4)
    logger.log(1, {"loss": 0.5, "grad_norm": jnp.float32(2.0)})
    logger.log(2, {"loss": np.float32(0.25)})
    assert lines(tmp_path / "made" / "here") == [{"step": 1, "loss": 0.5, "grad_norm": 2.0}, {"step": 2, "loss": 0.25}]
    logger.close()


def test_what_is_no_number_is_null_in_the_file_and_shown_on_the_screen(tmp_path, capsys):
    logger = Logger(tmp_path, total_steps=2)
    logger.log(1, {"loss": math.nan, "up": jnp.inf, "down": -math.inf, "fine": 1.0})
    logger.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "up": None, "down": None, "fine": 1.0}]
    assert "loss nan" in capsys.readouterr().out


def test_resume_repeats_no_step_and_survives_a_line_cut_short(tmp_path, capsys):
    first = Logger(tmp_path, total_steps=100)
    for step in (10, 20, 30, 40):
        first.log(step, {"loss": float(step)})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "lo')  # a kill in the middle of a write
    capsys.readouterr()

    second = Logger(tmp_path, total_steps=100, start_step=25)
    assert "dropped 2 lines past step 25" in (said := capsys.readouterr().out) and "1 broken" in said
    second.log(30, {"loss": -1.0})
    second.close()
    assert lines(tmp_path) == [{"step": 10, "loss": 10.0}, {"step": 20, "loss": 20.0}, {"step": 30, "loss": -1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_in_a_bucket_the_file_is_written_anew_and_nothing_lands_here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with runs.bucket(tmp_path):
        for start in (0, 2):
            logger = Logger("gs://bucket/run", total_steps=4, start_step=start)
            for step in (start + 1, start + 2, start + 3):
                logger.log(step, {"loss": float(start)})
            logger.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "bucket/run")] == [
        (1, 0), (2, 0), (3, 2), (4, 2), (5, 2)
    ]  # fmt: skip
    assert list((tmp_path / "here").iterdir()) == []


def test_a_run_from_step_0_begins_an_empty_file(tmp_path):
    for _ in range(2):
        logger = Logger(tmp_path, total_steps=2)
        logger.log(0, {"psnr": 10.0})
        logger.close()
    assert lines(tmp_path) == [{"step": 0, "psnr": 10.0}]


def test_a_kill_during_resume_leaves_the_old_file(tmp_path, monkeypatch):
    logger = Logger(tmp_path, total_steps=9)
    logger.log(5, {"loss": 1.0})
    logger.close()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Logger(tmp_path, total_steps=9, start_step=4)
    assert lines(tmp_path) == [{"step": 5, "loss": 1.0}]


def test_only_process_0_writes_and_speaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    logger = Logger(tmp_path, total_steps=2, tensorboard=True)
    logger.log(1, {"loss": 1.0})
    logger.print("hello")
    logger.table("title", [{"a": 1}])
    logger.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_without_a_terminal_each_log_is_a_plain_line(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    logger = Logger(tmp_path, total_steps=50)
    logger.log(10, {"loss": 0.5, "images_per_s": 640.4, "unseen": 3.0})
    logger.log(20, {"loss": 0.25})
    logger.log(20, {"eval/psnr": 14.0})  # goes to the file alone
    logger.close()
    out, err = capsys.readouterr()
    # 10 steps took 10 s and 30 are to come.
    assert out.splitlines() == ["step 10/50  loss 0.5000  640 images/s", "step 20/50  loss 0.2500  00:30 left"]
    assert err == "" and "\r" not in out


def test_a_terminal_has_a_live_bar_and_messages_above_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    logger = Logger(tmp_path, total_steps=40, start_step=10)
    assert "10/40" in terminal.getvalue()
    logger.log(20, {"loss": 0.5, "images_per_s": 640.0})
    logger.print("saved")
    logger.log(30, {"loss": 0.25, "images_per_s": 650.0})
    logger.close()
    shown = terminal.getvalue().split("\r")
    assert any("20/40" in text and "loss 0.5000  640 images/s" in text for text in shown)
    last = [text for text in shown if " 75%" in text][-1].rstrip()
    assert "loss 0.2500  650 images/s" in last and last.endswith("left")
    assert capsys.readouterr().out == "saved\n"


def test_log_refuses_an_array_and_names_the_metric(tmp_path):
    logger = Logger(tmp_path, total_steps=2)
    with pytest.raises(ValueError, match=r"metric 'per_token' has the shape \(3,\)"):
        logger.log(1, {"loss": 1.0, "per_token": jnp.zeros(3)})
    assert lines(tmp_path) == []
    logger.close()


def test_close_twice_and_nothing_after(tmp_path):
    logger = Logger(tmp_path, total_steps=2)
    logger.close()
    logger.close()
    logger.log(1, {"loss": 1.0})
    assert lines(tmp_path) == []


def test_table_is_aligned_and_tells_counts_from_quantities(tmp_path, capsys):
    rows = [
        {"codec": "ours", "tokens": 1, "psnr": 14.0, "ssim": "0.291"},
        {"codec": "WebP q0", "tokens": 256, "psnr": 9.5, "ssim": ""},
    ]
    logger = Logger(tmp_path, total_steps=2)
    logger.table("held out", rows)
    logger.close()
    assert capsys.readouterr().out.splitlines() == [
        "held out",
        "codec    tokens   psnr   ssim",
        "-------  ------  -----  -----",
        "ours          1  14.00  0.291",
        "WebP q0     256  9.500",
    ]
    assert format_table("none", []).splitlines()[0] == "none"
    with pytest.raises(ValueError, match="'held out': row 1 has the columns"):
        format_table("held out", [{"k": 1}, {"k": 1, "psnr": 2.0}])


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    seen = []
    writer = types.SimpleNamespace(write_scalars=lambda *call: seen.append(call), close=lambda: seen.append("closed"))
    fake = types.SimpleNamespace(SummaryWriter=lambda folder: seen.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "clu.metric_writers", fake)
    logger = Logger(tmp_path, total_steps=2, tensorboard=True)
    logger.log(1, {"loss": 0.5})
    logger.close()
    assert seen == [str(tmp_path / "tensorboard"), (1, {"loss": 0.5}), "closed"]


def test_tensorboard_without_its_extra_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "clu.metric_writers", None)
    with pytest.raises(ImportError, match=r"jaxtok\[tensorboard\]"):
        Logger(tmp_path, total_steps=2, tensorboard=True)
