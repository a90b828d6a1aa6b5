"""The page shows what the models give, one program serves every number of tokens, and a browser can use it."""

import dataclasses
import re
import sys

import numpy as np
import pytest
from PIL import Image

import jaxtok
from configs import ar_flextok
from jaxtok import demo
from jaxtok.data.emoji import ATTRIBUTION
from jaxtok.data.images import BadRecord
from jaxtok.data.shapes import Shapes
from tests import browser, runs

TEST_PICTURES = {"size": 16, "split": "test", "n": 12}  # the tiny run's


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    runs.alone(runs.tiny(), path)
    return path


@pytest.fixture(scope="module")
def generator(tokenizer):
    config = ar_flextok.get_config("tiny")
    config.task.tokenizer = str(tokenizer)
    runs.alone(config, tokenizer.parent / "ar")
    return tokenizer.parent / "ar"


@pytest.fixture(scope="module")
def view(tokenizer):
    return demo.open_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def drawer(generator):
    return demo.open_generator(generator)


# ---- without a browser ----


def test_any_number_of_tokens_gives_what_the_tokenizer_gives_by_one_program(view, tokenizer):
    loaded = jaxtok.load(tokenizer)
    picture, _ = view.held_out()
    codes = view.encode(picture[None])
    indices = loaded.encode(picture[None])
    made = {}
    for k in range(1, view.tokens + 1):
        made[k], line = demo.rebuild(view, picture, codes, k, "one step")
        error, bits = np.mean((picture / 255.0 - made[k] / 255.0) ** 2), k * np.log2(64_000)
        assert f"{k} of 8 tokens · {bits:.1f} bits, {bits / 8:.1f} bytes" in line
        assert float(re.search(r"PSNR ([\d.]+) dB", line)[1]) == pytest.approx(-10 * np.log10(error), abs=0.006)
    assert view.decode.func._cache_size() == 1
    assert (made[3] != made[8]).any()
    guided, _ = demo.rebuild(view, picture, codes, 3, "2 steps, guided")
    for k, found, options in ((3, made[3], dict(steps=1)), (3, guided, dict(steps=2, guidance=1.5))):
        wanted = np.asarray(loaded.decode(indices[:, :k], seed=0, **options))[0]
        assert np.abs(found.astype(int) - wanted).max() <= 1  # the same but for rounding
    view = view._replace(bits=None)
    assert "4 of 8 tokens · continuous · PSNR" in demo.rebuild(view, picture, codes, 4, "one step")[1]


def test_held_out_pictures_are_those_of_the_run_and_their_makers_are_named(view):
    shapes = Shapes(**TEST_PICTURES)
    known = {shapes[i]["image"].tobytes(): shapes[i]["caption"] for i in range(len(shapes))}
    drawn = [view.held_out() for _ in range(30)]
    assert all(known[picture.tobytes()] == caption for picture, caption in drawn)
    assert len({picture.tobytes() for picture, _ in drawn}) > 1
    emoji = dict(eval=dict(source=dict(name="data.sources.Emoji", split="test", size=16)))
    assert (view.credit, demo.pictures(emoji)[1]) == ("", ATTRIBUTION)
    assert demo.pictures(None) == (None, "")
    gone = dict(eval=dict(source=dict(name="data.sources.Folder", path="nowhere")))
    assert demo.pictures(gone) == (None, "")


def test_a_file_becomes_the_middle_of_its_picture(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (255, 0, 0)
    wide[:2, 20:40] = (0, 0, 255)  # its upper edge
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = demo.fit(tmp_path / "wide.png", (10, 10, 3))
    assert found.shape == (10, 10, 3) and found.dtype == np.uint8
    assert (found[2:, 1:-1] == (255, 0, 0)).all() and found[0, 5, 2] > 200
    exif = Image.Exif()
    exif[274] = 3  # upside down
    Image.fromarray(wide).save(tmp_path / "turned.png", exif=exif)
    assert demo.fit(tmp_path / "turned.png", (10, 10, 3))[-1, 5, 2] > 200
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(BadRecord, match="broken.png: no picture of a known format"):
        demo.fit(tmp_path / "broken.png", (10, 10, 3))


def test_samples_are_those_of_the_generator_by_one_program(drawer, generator):
    loaded = jaxtok.load(generator)
    assert len(drawer.classes) == 40 and drawer.tokens == 8
    codes, others = drawer.draw(7, 3), drawer.draw(7, 4)
    # the page draws all tokens and shows the first k, and these are the sample of k
    few = loaded.sample(labels=[7] * demo.SAMPLES, seed=3, tokens=3, guidance=1.5)
    np.testing.assert_array_equal(codes.indices[:, :3], few)
    assert (codes.indices != others.indices).any()
    made = {k: np.asarray(drawer.decode(codes, k, demo.jax.random.key(0))).astype(int) for k in (1, 3, 8)}
    assert made[1].shape == (demo.SAMPLES, 16, 16, 3) and (made[1] != made[8]).any()
    assert np.abs(made[3] - np.asarray(loaded.decode(few, seed=0))).max() <= 1  # the same but for rounding
    assert drawer.decode.func._cache_size() == 1


def test_pixels_are_drawn_as_squares():
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    found = demo.large(picture)
    assert found.shape == (320, 480, 3)
    np.testing.assert_array_equal(found[::160, ::160], picture)
    assert (found[:160, :160] == picture[0, 0]).all()


def test_what_cannot_be_shown_is_said_before_the_page_opens(tokenizer, generator, tmp_path, capsys, monkeypatch):
    def says(*flags):
        with pytest.raises(SystemExit) as stopped:
            demo.main(flags)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    pytest.importorskip("gradio")
    assert "nowhere is no folder or file here" in says(f"--checkpoint={tmp_path}/nowhere")
    assert "is no workdir of a run" in says(f"--checkpoint={tmp_path}")
    assert "is a generator: give it as --generator" in says(f"--checkpoint={generator}")
    assert "is a tokenizer: give it as" in says(f"--checkpoint={tokenizer}", f"--generator={tokenizer}")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'pip install "jaxtok[demo-page]"' in says(f"--checkpoint={tokenizer}")


def test_a_generator_that_the_page_cannot_ask_is_refused(generator, monkeypatch):
    bound, spec = demo.load(generator)
    bound.task = dataclasses.replace(bound.task, text_tower=bound.task.model)
    monkeypatch.setattr(demo, "load", lambda checkpoint: (bound, spec))
    with pytest.raises(ValueError, match="reads texts or draws no codes"):
        demo.open_generator(generator)


# ---- in one ----


@pytest.fixture(scope="module")
def served(view, drawer):
    """The URL of the page."""
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    if browser.executable() is None:
        pytest.skip(f"No browser here: none of {', '.join(browser.NAMES)} is on the PATH (apt-get install chromium).")
    blocks = demo.page(view, drawer, "jaxtok: tiny")
    _, url, public = demo.launch(blocks, prevent_thread_lock=True, quiet=True)
    assert public is None and url.startswith("http://127.0.0.1:") and not blocks.analytics_enabled
    yield url
    blocks.close()


def test_the_page_in_a_browser(served, tmp_path):
    red, half = np.zeros((50, 90, 3), np.uint8), np.full((40, 40, 3), 255, np.uint8)
    red[..., 0], half[:, :20] = 255, 0
    for name, picture in (("red", red), ("half", half)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_text("no picture")

    with browser.open_page(served) as (page, wrong):
        page.set_default_timeout(60_000)
        numbers, source = page.locator("#numbers"), lambda part: page.locator(f"#{part} img").get_attribute("src")
        said = lambda text: page.locator("#numbers", has_text=text).wait_for()
        caption = lambda text: page.locator("#caption", has_text=text).wait_for()
        said("8 of 8 tokens")  # a held-out picture, before anything is asked
        first = source("seen")

        page.set_input_files("input[type=file]", tmp_path / "red.png")
        caption("red.png")
        assert page.request.get(source("seen")).ok and source("seen") != first
        all_tokens, psnr = source("made"), numbers.inner_text()
        page.fill("#tokens input[type=number]", "2")
        page.keyboard.press("Tab")
        said("2 of 8 tokens · 31.9 bits, 4.0 bytes")
        assert source("made") != all_tokens and numbers.inner_text().split("PSNR")[1] != psnr.split("PSNR")[1]

        page.set_input_files("input[type=file]", tmp_path / "broken.png")
        page.get_by_text("broken.png: no picture of a known format").wait_for()
        caption("red.png")  # what was there stays
        page.set_input_files("input[type=file]", tmp_path / "half.png")
        caption("half.png")
        said("2 of 8 tokens")
        page.get_by_label("2 steps, guided").check()
        page.get_by_role("button", name="A held-out picture").click()
        page.wait_for_function("document.querySelector('#caption').innerText.includes('a ')")  # of Shapes

        page.get_by_role("button", name="Sample").click()
        page.locator("#samples img").wait_for()
        before = source("samples")
        page.fill("#drawn input[type=number]", "1")
        page.keyboard.press("Tab")
        page.wait_for_function("before => document.querySelector('#samples img').src != before", arg=before)
        assert wrong == []
