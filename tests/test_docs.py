"""The pages are true: the system that docs/add_a_system.md adds works as printed, and what any page names exists."""

import importlib
import importlib.util
import re
import sys
import tomllib

import jax
import numpy as np
import pytest

import configs
from configs import flextok
from jaxtok import train
from jaxtok.build import build
from jaxtok.checkpoint import Checkpoints
from tests import runs, test_configs

PAGES = sorted([runs.ROOT / "README.md", *runs.ROOT.glob("docs/**/*.md")])
HOUSE = ("jaxtok", "configs", "docs", "launch", "tests")
FILES = [*runs.ROOT.glob("*"), *(path for room in HOUSE for path in (runs.ROOT / room).rglob("*"))]
EXTRAS = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


# ---- the walk-through ----


@pytest.fixture(scope="module")
def onebit(tmp_path_factory):
    """The pages' files in a folder on sys.path: every python block whose first line is a comment with its name."""
    pages = [(runs.ROOT / f"docs/{name}.md").read_text() for name in ("add_a_system", "faq")]
    folder = tmp_path_factory.mktemp("own")
    for name, code in re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", "\n".join(pages), re.M | re.S):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "onebit"]:
        del sys.modules[name]


def test_the_system_of_the_walk_through_trains_and_its_codes_come_back(onebit, tmp_path):
    config = importlib.import_module("onebit.config").get_config("tiny")
    assert config.task.model.quantizer.name == "onebit.quantizer.LFQ"
    metrics = runs.alone(config, tmp_path)
    losses = runs.logged(tmp_path)
    assert losses[config.total_steps] < 0.9 * losses[min(losses)]
    assert all(np.isfinite(value) for value in metrics.values())

    model, checkpoints = build(config.task).model, Checkpoints(tmp_path)
    variables = {"params": checkpoints.restore_params(), **checkpoints.restore_params(which="mutable")}
    images = np.stack([build(config.data.eval.source)[i]["image"] for i in range(4)])
    codes = model.apply(variables, images, method="encode")
    assert codes.indices.shape == (4, 8) and codes.z.shape == (4, 8, 10)
    assert len(np.unique(codes.indices)) > 8  # the encoder says something
    found = model.apply(variables, codes.indices, 8, method="lookup")
    np.testing.assert_array_equal(found.z, codes.z)
    pictures = [model.apply(variables, c, jax.random.key(0), steps=2, method="decode") for c in (codes, found)]
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].shape == images.shape and pictures[0].std() > 0.01


def test_the_tests_of_the_walk_through_pass(onebit):
    module = importlib.import_module("onebit.test_onebit")
    tests = [test for name, test in vars(module).items() if name.startswith("test_")]
    assert len(tests) >= 3
    for test in tests:
        test()


def test_the_config_of_the_walk_through_would_pass_in_the_house(onebit, monkeypatch):
    monkeypatch.setattr(test_configs, "load", lambda name: importlib.import_module(f"onebit.{name}"))
    test_configs.test_every_variant_builds_and_an_unknown_one_lists_them("config")


# ---- what pages name ----


def offences(text, folder, own=None):
    """What a page in `folder` names and is not there. `own`: a second place where its files may lie."""
    text = re.sub(r"\*\(planned\)\*.*?(?=\n\n|\n\||\Z)", "", text, flags=re.S)  # to the end of the paragraph or row
    fences = re.findall(r"^```(?!python\n#).*?\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    codes = [re.sub(r"\\\n", " ", fence) for fence in fences] + re.findall(r"`([^`]+)`", prose)
    found = []
    for code in codes:
        for line in code.splitlines():
            words = re.split(r"[\s\"'(),;|]+", re.sub(r"'\(.*?\)'", "X", line))
            found += [offence for word in words if (offence := wrong_name(word.rstrip(".:"), folder, own))]
            found += wrong_flags(line, own)
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose):
        found += wrong_link("".join(target), folder, text)
    return found


def wrong_name(word, folder, own):
    """A sentence if a word looks like a file of the repository, a module, a part or an extra, and is none."""
    word = re.sub(r"^--config=", "", word)
    if re.search(r"[<>{}*=]|(^|/)NAME\b|\.jsonl?$", word):  # placeholders, and what runs write
        return None
    if extras := re.fullmatch(r"(?:jaxtok|\.)\[([\w,-]+)\](?:==.*)?", word):
        unknown = set(extras[1].split(",")) - EXTRAS.keys()
        return f"{word}: pyproject.toml has no extra {unknown}" if unknown else None
    path, _, _ = word.partition(":")
    if re.fullmatch(r"[\w./-]+\.(py|md|sh|toml)", path) or re.match(rf"({'|'.join(HOUSE)})/", path):
        if "/" not in path:
            there = any(file.name == path for file in FILES) or (own and (own / path).exists())
        else:
            there = any((root / path).exists() for root in (runs.ROOT, runs.ROOT / "jaxtok", folder, own) if root)
        return None if there else f"{word}: there is no such file"
    rooms = {file.stem for file in (runs.ROOT / "jaxtok").iterdir() if file.stem[0] != "_"}
    first, *rest = word.split(".")
    if rest and all(name.isidentifier() for name in rest) and (first in HOUSE or first in rooms):
        is_key = any(is_in(config(variant), word) for variant in flextok.VARIANTS)
        return None if is_key or exists(word) else f"{word}: there is no such module, part or key"
    return None


def wrong_flags(line, own):
    """A sentence for every --config.KEY= that the config of the command does not have, and for a variant it lacks."""
    keys = re.findall(r"--config\.([\w.]+)=", line)
    if re.search(r"--config=(\S*NAME|FILE)", line) or not (keys or "--config=" in line):
        return []
    named = re.search(r"--config=([\w/.]+):?(\w*)", line)
    name, variant = named.groups() if named else ("configs/flextok.py", "")
    try:
        chosen = config(variant, name, own)
    except ValueError as error:
        return [f"{line}: {error}"]
    return [f"{line}: the config has no key {key}" for key in keys if not is_in(chosen, key)]


def wrong_link(target, folder, text):
    if re.match(r"https?://|mailto:", target):
        return []
    place, _, anchor = target.partition("#")
    path = folder / place if place else None
    if path and not path.exists():
        return [f"the link {target} leads nowhere"]
    headings = re.findall(r"^#+ (.*)", path.read_text() if path else text, re.M) if anchor else []
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return [f"the link {target} leads to no heading"] if anchor and anchor not in anchors else []


def config(variant="", name="configs/flextok.py", own=None):
    name = f"configs/{name}.py" if name in configs.NAMES else name
    path = next(root / name for root in (runs.ROOT, own) if root and (root / name).exists())
    spec = importlib.util.spec_from_file_location("a_config_of_the_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def is_in(node, key):
    """Whether a config has the dotted key."""
    for name in key.removeprefix("config.").split("."):
        if not hasattr(node, "keys") or name not in node:
            return False
        node = node[name]
    return True


def exists(name):
    """Whether a dotted name is a module, or stands in one: below jaxtok, from the top, or in Flax for its `nn`."""
    for path in (f"jaxtok.{name}", name, re.sub(r"^nn\.", "flax.linen.", name)):
        names = path.split(".")
        for k in range(len(names), 0, -1):
            try:
                thing = importlib.import_module(".".join(names[:k]))
            except ModuleNotFoundError:
                continue
            for attribute in names[k:]:
                thing = getattr(thing, attribute, None)
            if thing is not None:
                return True
            break
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page, onebit):
    assert offences(page.read_text(), page.parent, onebit) == []


def test_every_key_of_a_config_is_explained():
    table = (runs.ROOT / "docs/design.md").read_text().split("## 5. Configs")[1].split("## 6.")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    assert sorted(key for row in rows for key in row) == sorted([*train.KEYS, "stages"])


@pytest.mark.parametrize(
    "line, says",
    [
        ("see `jaxtok/nn/atention.py`", "no such file"),
        ("see `trian.py`, *(planned)* `evaluate_me.py`", "trian.py"),
        ("in `jaxtok.data.imags.BadRecord`", "no such module"),
        ("| `quantizers.fsq.FSK` | *(planned)* `quantizers.vq.VQ` |", "quantizers.fsq.FSK"),
        ("`data.trian.source` is a key", "no such module, part or key"),
        ("```\npython -m jaxtok.trian\n```", "jaxtok.trian"),
        ("```\npython -m jaxtok.train --config=configs/flextok.py:d19 --workdir=x\n```", 'no variant "d19"'),
        ("```\npython -m jaxtok.train --config=configs/flextok.py \\\n --config.bach_size=3\n```", "no key bach_size"),
        ("`--config.mesh.sfdp=8`", "no key mesh.sfdp"),
        ('`pip install "jaxtok[dmeo]"`', "dmeo"),
        ("[there](nowhere.md)", "leads nowhere"),
        ("[there](design.md#9-nowhere)", "no heading"),
        ('<img src="nowhere.png">', "leads nowhere"),
    ],
)
def test_a_wrong_name_is_caught(line, says):
    [offence] = offences(line, runs.ROOT / "docs")
    assert says in offence
