"""The site of docs/ builds, strictly; every page is on it, every link leads somewhere, and it is true of the code."""

import html
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests import runs

mkdocs = pytest.importorskip("mkdocs")


def build(root, site):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(runs.ROOT / "mkdocs.yml"), strict=True, docs_dir=str(root / "docs"), site_dir=str(site))
    build(config)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("site")
    build(runs.ROOT, path)
    return path


def article(path):
    """What is on a page, without the frame that all pages have."""
    return re.search(r"<article.*?</article>", path.read_text(), re.S)[0]


def text(path):
    return html.unescape(re.sub(r"<[^>]+>", "", article(path)))


def test_every_page_is_there_and_in_the_menu(site):
    wanted = [path.relative_to(runs.ROOT / "docs").with_suffix("") for path in (runs.ROOT / "docs").rglob("*.md")]
    wanted += [path.relative_to(runs.ROOT / "docs").with_suffix("") for path in (runs.ROOT / "docs").rglob("*.ipynb")]
    wanted += [Path("quick_start"), Path("commands"), Path("configs")]
    menu = re.search(r'<nav class="md-nav md-nav--primary".*?</nav>\s*</div>', (site / "index.html").read_text(), re.S)[
        0
    ]
    for name in wanted:
        page = site / name / "index.html" if name != Path("index") else site / "index.html"
        assert page.exists(), name
        assert f'href="{name}/"' in menu or name == Path("index"), name


def test_every_link_leads_somewhere_and_nothing_is_fetched_from_elsewhere(site):
    seen = 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        whole = page.read_text()
        for kind, target in re.findall(r'<(a|img|script|link)\b[^>]*?\b(?:href|src)="([^"]+)"', whole):
            url = urlparse(html.unescape(target))
            if url.scheme or url.netloc:
                assert kind == "a", f"{page.relative_to(site)} fetches {target}"
                continue
            path = (page.parent / unquote(url.path)).resolve() if url.path else page
            path = path / "index.html" if path.is_dir() else path
            assert path.exists(), f"{page.relative_to(site)}: {target}"
            if url.fragment and path.suffix == ".html":
                assert f'id="{unquote(url.fragment)}"' in path.read_text(), f"{page.relative_to(site)}: {target}"
            seen += 1
    assert seen > 500


def test_lists_and_tables_are_lists_and_tables(site):
    for page in site.rglob("index.html"):
        if "source" in page.relative_to(site).parts:
            continue
        paragraphs = re.findall(r"<p>(.*?)</p>", article(page), re.S)
        wrong = [p for p in paragraphs if re.search(r"^\s*([-*] |\|)", p, re.M) or "```" in p]
        assert wrong == [], f"{page.relative_to(site)}: a blank line is missing before {wrong[:1]}"


def test_the_readme_and_the_files_that_pages_link_to_are_pages(site):
    assert "ten minutes on two CPU" in text(site / "quick_start/index.html").replace("\n", " ")
    shown = text(site / "source/jaxtok/generate/__init__.py/index.html")
    code = (runs.ROOT / "jaxtok/generate/__init__.py").read_text()
    assert re.sub(r"\s+", " ", code).strip() in re.sub(r"\s+", " ", shown)
    assert 'href="../source/jaxtok/generate/__init__.py/"' in article(site / "generate/index.html")


@pytest.mark.parametrize("name", ["tokenize", "generate", "demo"])  # absl's, argparse's
def test_the_options_of_a_command_are_those_that_it_takes(site, name):
    section = re.split(r"<h2 ", article(site / "commands/index.html"))
    [section] = [part for part in section if part.startswith(f'id="{name}"')]
    listed = set(re.findall(r"<code>--(\w+)</code>", section))
    if name == "tokenize":
        env = os.environ | {"PYTHONPATH": str(runs.ROOT)}
        command = [sys.executable, "-m", "jaxtok.tokenize", "--helpshort"]
        said = subprocess.run(command, env=env, capture_output=True, text=True).stdout
        wanted = set(re.findall(r"^\s+(?:! )?--(?:\[no\])?(\w+):", said, re.M)) - {"tokenize"}
    else:
        module = importlib.import_module({"generate": "jaxtok.generate.__main__"}.get(name, f"jaxtok.{name}"))
        text = Path(module.__file__).read_text()
        wanted = set(re.findall(r'add\("--(\w+)"', text)) | set(
            re.findall(r'^        \("(\w+)", (?:int|float),', text, re.M)
        )
        wanted |= {"decode"} if name == "generate" else set()
    assert listed == wanted and listed


def test_every_command_is_listed(site):
    listed = set(re.findall(r"<p><code>python -m ([\w.]+)</code>", article(site / "commands/index.html")))
    named = set()
    for page in [runs.ROOT / "README.md", *(runs.ROOT / "docs").glob("*.md")]:
        named |= set(re.findall(r"python -m (jaxtok[\w.]*)", page.read_text()))
    assert named <= listed and "jaxtok.train" in listed


def test_every_config_and_variant_is_listed(site):
    page = text(site / "configs/index.html")
    for path in (runs.ROOT / "configs").glob("*.py"):
        if path.stem not in ("__init__", "__main__", "common"):
            module = importlib.import_module(f"configs.{path.stem}")
            assert module.__doc__.splitlines()[0] in page
            assert ", ".join(name or "none" for name in module.VARIANTS) in page


@pytest.mark.parametrize("link", ["nowhere.md", "../jaxtok/nowhere.py", "index.md#nowhere"])
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path, link):
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "jaxtok").mkdir()
    (tmp_path / "README.md").write_text("# A readme\n")
    (tmp_path / "docs/index.md").write_text("# A page\n\n[itself](index.md) [above](../README.md)\n")
    build(tmp_path, tmp_path / "site")
    (tmp_path / "docs/index.md").write_text(f"# A page\n\n[there]({link})\n")
    with pytest.raises(Abort):
        build(tmp_path, tmp_path / "site")
