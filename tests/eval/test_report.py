"""Tables, plots and the page: eval.rate_distortion, plots, sections, report."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from jaxtok.eval import plots, rate_distortion, report, sections
from jaxtok.eval.reconstruction import jpeg_webp


def images(n=3, size=32):
    y, x = np.mgrid[:size, :size] / size
    phase = np.arange(n).reshape(n, 1, 1, 1)
    return (127 + 120 * np.sin(6 * x[..., None] + 4 * y[..., None] + phase * np.ones(3))).astype(np.uint8)


def test_smaller_pictures_cost_fewer_bytes_and_are_scored_at_full_size():
    rows = jpeg_webp(images(), (50,), (1, 0.25), {"gap": lambda a, b: np.abs(a.astype(float) - b).mean((1, 2, 3))})
    assert [row["codec"] for row in rows] == ["JPEG q50", "JPEG q50 at 0.25", "WebP q50", "WebP q50 at 0.25"]
    for full, small in (rows[:2], rows[2:]):
        assert small["bytes"] < full["bytes"] and full["gap"] < small["gap"] < 30


def test_a_front_rises_and_reaches_fewer_bytes_than_any_quality_does_alone():
    codecs = rate_distortion.codec_rows(images())
    assert list(codecs) == ["JPEG", "WebP"]
    for rows in codecs.values():
        best = rate_distortion.front(rows)
        assert all(np.diff([row["bytes"] for row in best]) > 0) and all(np.diff([row["psnr"] for row in best]) > 0)
        assert best[0]["bytes"] < min(row["bytes"] for row in rows if " at " not in row["codec"])
        assert best[-1]["psnr"] == max(row["psnr"] for row in rows) > 30


def test_less_lpips_is_better():
    rows = [{"bytes": b, "lpips": x} for b, x in ((3, 0.2), (1, 0.5), (2, 0.6), (2, 0.3))]
    assert [row["lpips"] for row in rate_distortion.front(rows, "lpips")] == [0.5, 0.3, 0.2]


def test_the_table_of_equal_bytes_and_equal_psnr():
    curve = [{"codec": "JPEG", "bytes": 100.0, "psnr": 20.0}, {"codec": "JPEG", "bytes": 200.0, "psnr": 30.0}]
    points = [{"tokens": 1, "bytes": 2.0, "psnr": 19.0}, {"tokens": 9, "bytes": 150.0, "psnr": 31.0}]
    first, last = rate_distortion.table(points, {"JPEG": curve})
    assert first["JPEG, no more bytes"] == "from 100 on" and first["JPEG bytes, same PSNR"] == "100"
    assert last["JPEG, no more bytes"] == "20.00" and last["JPEG bytes, same PSNR"] == "never"


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    points = [{"tokens": k, "bytes": 2.0 * k, "psnr": 15 + k, "ssim": 0.1 * k} for k in (1, 2, 4)]
    curves = {score: rate_distortion.codec_rows(images()) for score in ("psnr", "ssim")}
    plots.rate_distortion(
        {"a": points, "b": points[:1]}, curves, {"psnr": "PSNR (dB)", "ssim": "SSIM"}, tmp_path / "rate.png"
    )
    plots.positions([3.0, 2.0], 4.0, 3.5, tmp_path / "positions.png")
    for name in ("rate.png", "positions.png"):
        picture = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert min(picture.shape[:2]) > 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_without_matplotlib_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    notes = []
    found, section = sections.codebook(np.arange(8).reshape(4, 2), 8, tmp_path, notes)
    assert notes == ['Plots need matplotlib: pip install "jaxtok[eval]"'] and not section.pictures
    assert found["used"] == 1


def test_continuous_tokens_have_no_bytes(tmp_path):
    task = types.SimpleNamespace(
        model=types.SimpleNamespace(quantizer=types.SimpleNamespace(vocabulary=None)),
        samplers=({"title": "mean"},),
        token_counts=(4,),
        titles=lambda: ["original", "4 tokens"],
    )
    rows = {"index": np.arange(3), "psnr/mean@4": np.array([20.0, np.inf, 30.0]), "ssim/mean@4": np.ones(3)}
    kept = {name: [(0.0, i, np.zeros((2, 16, 16, 3), np.uint8)) for i in range(2)] for name in sections.GALLERY}
    notes = []
    metrics, parts = sections.tokenizer(
        task, (rows, kept, {}), None, None, "alex", {}, None, lambda i: i + 100, tmp_path, notes
    )
    assert metrics == {"reconstruction": {"mean": {"4": {"psnr": np.inf, "ssim": 1.0}}}}
    assert len(parts) == 1 and "pictures 100, 101 of the source" in list(parts[0].pictures.values())[0]
    assert "continuous" in notes[0]
    assert json.loads(report.to_json(metrics))["reconstruction"]["mean"]["4"]["psnr"] is None


def test_the_page_escapes_and_holds_its_pictures(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    table = {"numbers": [{"a<b": "1", "c": 2.5}, {"a<b": "3", "c": "x & y"}]}
    text = report.page("run & more", ["<script>"], [report.Section("S", ["p"], table, {tmp_path / "a.png": "red"})])
    assert "<script>" not in text and "&lt;script&gt;" in text and "run &amp; more" in text
    assert "<th>a&lt;b</th>" in text and "<td>x &amp; y</td>" in text
    assert text.count("<tr>") == 3 and 'src="data:image/png;base64,iVBOR' in text
    assert 'name="viewport"' in text and "http" not in text
