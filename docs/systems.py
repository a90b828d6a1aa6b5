"""Writes docs/systems.md: python docs/systems.py

What is known of a system stands in docs/systems.toml. Its status and its parts are read off configs/ and tests/.
"""

import importlib
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE = "Beside them"  # the family that is not counted
PARTS = (
    "codec",
    "text_tower",
    "encoder",
    "quantizer",
    "nested_dropout",
    "decoder",
)  # of a Tokenizer, in the order of the data
LABELS = {"figure": "the paper's figure", "licence": "licence", "towers": "needs", "note": "note"}

INTRO = """\
<!-- Made by `python docs/systems.py` from docs/systems.toml, configs/ and tests/. Change those. -->
# Systems

The {total} systems that this suite is for, by family. Works: {works}, partly: {partly}, not yet: {not_yet}.

- **works**: there is a config, so that one command trains it, and a property test shows, at the smallest size at which
  it can be true, that its idea does what the paper says. What differs from the paper stands in the config's docstring.
- **partly**: there is a config; what it does not have yet stands below the table.
- **not yet**: there is no config.

Below each table, of each system: its parts, at a published size where there is one; its test; what its command measured
here, small models on emoji or shapes of 16 px or less (PSNR of held-out pictures, in dB); which published weights
are read, and by what (held against names and shapes, most also against small arrays of the reference; no published file
had been opened when this was written); **the paper's figure, not ours**, and only where the paper, or its authors' own
readme or code, was read for it; the licence of the published code and weights (where it is of the code alone, the
weights' card decides; jaxtok has code of none of them); and which other models the published form needs.
"""


def families():
    """docs/systems.toml: {family: {name of a config: facts}}."""
    return tomllib.loads((ROOT / "docs/systems.toml").read_text())


def test_of(key, facts):
    """The path of a system's property test, whether it is there or not."""
    return facts.get("test", f"tests/test_{key}.py")


def status(key, facts):
    """One of "works", "partly", "not yet". ValueError: a config without its test, and nothing is `missing`."""
    if not (ROOT / f"configs/{key}.py").exists():
        return "not yet"
    if "missing" in facts:
        return "partly"
    if (ROOT / test_of(key, facts)).exists():
        return "works"
    raise ValueError(
        f"configs/{key}.py has no {test_of(key, facts)}: write it, or name another `test`, or what is `missing`, "
        f"under {key} in docs/systems.toml."
    )


def parts(key, variant=""):
    """{part of the model of a config: its name and those of parts in it}."""
    model = importlib.import_module(f"configs.{key}").get_config(variant).task.model
    return {part: names(model[part]) for part in PARTS if model.get(part)} or {"model": names(model)}


def names(part):
    """The name of a part, and in brackets those of its kind among its fields: a quantizer round a quantizer."""
    kind = lambda field: str(field.get("name")).split(".")[0] if hasattr(field, "get") else None
    inner = [names(field) for field in part.values() if kind(field) == kind(part)]
    return f"{part.name}({', '.join(inner)})" if inner else part.name


def link(path):
    return f"[{path}](../{path})"


def row(key, facts):
    """A system's line in the table."""
    name, here = facts["name"], status(key, facts)
    if here != "not yet":
        name, here = f"[{name}](../configs/{key}.py)", f"**{here}**"
    return f"| {name} | {facts['idea']} | [{facts['arxiv']}](https://arxiv.org/abs/{facts['arxiv']}) | {here} |"


def details(key, facts):
    """What does not fit into the table, as a list."""
    lines = [f"- **{facts['name']}**, *{facts['title']}*"]
    if status(key, facts) != "not yet":
        variant = facts.get("variant", "")
        found = ", ".join(f"{part} `{name}`" for part, name in parts(key, variant).items())
        lines.append(f"parts of `configs/{key}.py{variant and ':'}{variant}`: {found}")
        if "missing" in facts:
            lines.append(f"missing: {facts['missing']}")
        if (ROOT / test_of(key, facts)).exists():
            lines.append(f"test: {link(test_of(key, facts))}")
        if "measured" in facts:
            lines.append(f"measured, seeds 0, 1, 2: {facts['measured']}")
    if "converter" in facts:
        lines.append(f"weights: {link(facts['converter'])} reads {facts['reads']}")
    lines += [f"{label}: {facts[fact]}" for fact, label in LABELS.items() if fact in facts]
    return "\n  - ".join(lines)


def page():
    """The text of docs/systems.md."""
    there = families()
    found = [status(*system) for family in there if family != BESIDE for system in there[family].items()]
    counts = {name.replace(" ", "_"): found.count(name) for name in ("works", "partly", "not yet")}
    text = INTRO.format(total=len(found), **counts)
    for family, systems in there.items():
        text += f"\n## {family}\n\n"
        if family == BESIDE:
            text += f"What the {len(found)} are built on, compared with or followed by; not counted above. Their tests "
            text += "show that they learn, or hold them against arrays of the reference.\n\n"
        text += "| system | idea | arXiv | status |\n|---|---|---|---|\n"
        text += "\n".join(row(*system) for system in systems.items()) + "\n\n"
        text += "\n".join(details(*system) for system in systems.items()) + "\n"
    return text


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # this checkout's configs, whatever is installed
    (ROOT / "docs/systems.md").write_text(page())
