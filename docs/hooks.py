"""The site beyond the pages of docs/: the README, the commands, the configs, the notebooks, and what pages link to.

There is one rule for links: a page may link to any file of the repository, as it lies there. On the site the README and
the notebooks are pages, a folder of configs is the page of configs, and any other file is a page that shows it.
"""

import argparse
import ast
import importlib
import json
import os.path
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

from mkdocs.structure.files import File

# The order of the pages. Those that are not there are left out, those that are not here come last.
NAV = {
    "Start": "index quick_start notebooks/quickstart notebooks/train_your_own notebooks/generate faq",
    "Use": "commands data codes generate metrics pretrained export",
    "Systems": "systems configs flextok kl_vae quantizers add_a_system",
    "Inside": "design performance sharding_and_scale faults",
}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_config(config):
    names = {path.relative_to(config.docs_dir).with_suffix("").as_posix() for path in pages(config)}
    names |= {"quick_start", "commands", "configs"}
    nav, listed = [], " ".join(NAV.values()).split()
    for section, wanted in (*NAV.items(), ("More", " ".join(sorted(names - set(listed))))):
        if there := [f"{name}.md" for name in wanted.split() if name in names]:
            nav.append({section: there})
    config.nav = nav
    return config


def on_files(files, config):
    root = Path(config.docs_dir).parent
    made = {
        "quick_start.md": (root / "README.md").read_text(),
        "commands.md": commands(root),
        "configs.md": configs(root),
    }
    made |= {f"notebooks/{path.stem}.md": notebook(path) for path in pages(config) if path.suffix == ".ipynb"}
    texts = made | {uri(path, root): path.read_text() for path in pages(config) if path.suffix == ".md"}
    for page, text in list(texts.items()):
        for path in targets(text, folder(page, root)):
            if (name := uri(path, root)).startswith("source/"):
                language = path.suffix.removeprefix(".") or "text"
                made[name] = f"# {path.relative_to(root)}\n\n````{language}\n{path.read_text()}\n````\n"
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    root = Path(config.docs_dir).parent
    here = folder(page.file.src_uri, root)

    def rewritten(link):
        path = resolve(link[2], here)
        if path is None:
            return link[0]
        place = os.path.relpath(uri(path, root), os.path.dirname(page.file.src_uri) or ".")
        return f"{link[1]}{place}{link[3] or ''}{link[4]}"

    if page.file.src_uri.startswith("source/"):
        return markdown
    return "".join(LINK.sub(rewritten, part) if prose else part for prose, part in split(markdown))


# ---- links ----


def pages(config):
    """What in docs/ becomes a page."""
    found = Path(config.docs_dir).rglob("*")
    return sorted(path for path in found if path.suffix in (".md", ".ipynb") and ".ipynb_checkpoints" not in path.parts)


def split(text):
    """[(whether it is prose, part), ...]: links count outside fenced code only."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
    return [(i % 2 == 0, part) for i, part in enumerate(parts)]


def folder(page, root):
    """Where a page's links start from."""
    return root if page == "quick_start.md" else root / "docs" / os.path.dirname(page)


def targets(text, here):
    """The files that a page links to."""
    found = [resolve(link[2], here) for prose, part in split(text) if prose for link in LINK.finditer(part)]
    return [path for path in found if path is not None]


def resolve(target, here):
    """The path that a link leads to, or None: it leads to the web, or nowhere, which mkdocs then says."""
    path = Path(os.path.normpath(here / target))
    return path if ":" not in target and path.exists() else None


def uri(path, root):
    """Where on the site a file of the repository is."""
    name = path.relative_to(root).as_posix()
    if name == "README.md":
        return "quick_start.md"
    if name == "configs":
        return "configs.md"
    if name.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", name.removeprefix("docs/"))
    return f"source/{name}.md"


# ---- pages that are made ----


def notebook(path):
    """A notebook as a page, without outputs."""
    parts = [f"*A notebook: docs/notebooks/{path.name}, which runs from top to bottom.*"]
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([parts[1], parts[0], *parts[2:]]) + "\n"


def configs(root):
    """Every config: its docstring and its variants."""
    parts = ["# Configs", "One file, one published system. These are their own words, `configs/NAME.py`."]
    for path in sorted((root / "configs").glob("*.py")):
        if path.stem not in ("__init__", "__main__", "common"):
            module = importlib.import_module(f"configs.{path.stem}")
            title, _, text = module.__doc__.partition("\n")
            variants = ", ".join(f"`{name}`" if name else "none" for name in module.VARIANTS)
            parts += [f"## {path.stem}", f"**{title}**", text.strip("\n"), f"Variants: {variants}."]
    return "\n\n".join(parts) + "\n"


def commands(root):
    """Every command and its options, read off the code."""
    found = {}
    for path in sorted((root / "jaxtok").rglob("*.py")):
        text = path.read_text()
        if '\nif __name__ == "__main__":' in text and path != root / "jaxtok/__main__.py":  # which hands on to these
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__")
            what, rows = (absl_options if "flags.DEFINE" in text else argparse_options)(name, text)
            found[tuple(rows)] = name, what  # one command may have two names: the deeper one is printed
    parts = ["# Commands", "Options are `--NAME=VALUE`. Every command has `--help`."]
    for rows, (name, what) in found.items():
        table = ["| option | is |", "|---|---|", *(f"| `{option}` | {text} |" for option, text in rows)]
        parts += [f"## {name.removeprefix('jaxtok.')}", f"`python -m {name}`: {what}", "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def first_sentence(docstring):
    """What a command does, without how it is called."""
    return re.sub(r":? python -m .*", "", docstring.split("\n")[0]).rstrip(".") + "."


def absl_options(name, text):
    """(What a module does, [(--name, what it is)] of the flags that it defines)."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    named = [(getattr(call.func, "attr", ""), call) for call in calls]
    required = {flag for name, call in named if "mark_flag" in name for flag in ast.literal_eval(call.args[0])}
    rows = []
    for name, call in named:
        if name.startswith("DEFINE_"):
            strings = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            must = strings[0] in required or any(keyword.arg == "required" for keyword in call.keywords)
            rows.append((f"--{strings[0]}", strings[-1] + " (required)" * must))
    return first_sentence(ast.get_docstring(ast.parse(text))), rows


def argparse_options(name, text):
    """(What a module does, [(--name or NAME, what it is)] of the parser that it makes)."""

    class Made(Exception):
        pass

    def stop(parser, *args, **kwargs):
        raise Made(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), mock.patch.object(sys, "argv", [name]):
        try:
            runpy.run_module(name, run_name="__main__")
        except Made as made:
            parser = made.args[0]
    actions = parser._actions[1:]  # without --help
    rows = [(action.option_strings[0] if action.option_strings else action.dest.upper(), action) for action in actions]
    rows = [(option, (action.help or "") + " (required)" * action.required) for option, action in rows]
    return first_sentence(parser.description), rows
