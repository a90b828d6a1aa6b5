"""docs/systems.md: the page is what docs/systems.py makes, it is complete, and what it names is there."""

import importlib
import importlib.util
import re

import pytest
from ml_collections import ConfigDict

from tests import runs
from tests.test_configs import NAMES

spec = importlib.util.spec_from_file_location("systems", runs.ROOT / "docs/systems.py")
systems = importlib.util.module_from_spec(spec)
spec.loader.exec_module(systems)

FAMILIES = systems.families()
ENTRIES = {key: facts for family in FAMILIES.values() for key, facts in family.items()}
KEYS = {"name", "title", "arxiv", "idea", "figure", "licence", "towers", "note"}
KEYS |= {"variant", "test", "measured", "converter", "reads", "missing"}


def test_the_page_is_what_the_script_makes():
    assert (runs.ROOT / "docs/systems.md").read_text() == systems.page(), "run: python docs/systems.py"


def test_there_are_57_systems_and_every_config_has_an_entry():
    assert sum(len(family) for name, family in FAMILIES.items() if name != systems.BESIDE) == 57
    assert sum(len(family) for family in FAMILIES.values()) == len(ENTRIES)  # none stands in two families
    assert len({facts["name"] for facts in ENTRIES.values()}) == len(ENTRIES)
    assert set(NAMES) <= set(ENTRIES)


@pytest.mark.parametrize("key", ENTRIES)
def test_what_an_entry_says_has_the_right_form_and_what_it_names_is_there(key):
    facts = ENTRIES[key]
    assert {"name", "title", "arxiv", "idea", "licence"} <= set(facts) <= KEYS
    assert re.fullmatch(r"\d\d(0[1-9]|1[0-2])\.\d{5}", facts["arxiv"])
    assert len(facts["idea"].split()) <= 25 and not any("|" in text or "\n" in text for text in facts.values())
    if "figure" in facts:  # says where it was read
        assert re.search(r"\((paper|readme|code)(, (paper|readme|code))*\)$", facts["figure"])
    assert ("converter" in facts) == ("reads" in facts)
    if "converter" in facts:
        assert (runs.ROOT / facts["converter"]).exists()
    if "test" in facts or key in NAMES and "missing" not in facts:
        assert (runs.ROOT / systems.test_of(key, facts)).exists()
    assert ("measured" in facts) == (key in NAMES and key not in FAMILIES[systems.BESIDE])
    if "measured" in facts:
        assert re.search(r"\(`python -m tests\.\w+[\w ]*`\)$", facts["measured"])
    if key in NAMES:
        assert facts["arxiv"] in importlib.import_module(f"configs.{key}").__doc__


def test_the_status_follows_from_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "ROOT", tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "tests").mkdir()
    assert systems.status("new", {}) == "not yet" == systems.status("new", {"missing": "video"})
    (tmp_path / "configs/new.py").touch()
    assert systems.status("new", {"missing": "video"}) == "partly"
    with pytest.raises(ValueError, match="configs/new.py has no tests/test_new.py"):
        systems.status("new", {})
    (tmp_path / "tests/test_new.py").touch()
    assert systems.status("new", {}) == "works"
    assert systems.status("new", {"missing": "video"}) == "partly"
    with pytest.raises(ValueError, match="has no tests/test_other.py"):
        systems.status("new", {"test": "tests/test_other.py"})


def test_the_parts_are_those_of_the_config():
    assert systems.parts("flextok")["codec"] == "codecs.identity.Identity"
    parts = systems.parts("flextok", "d18_d28")
    assert list(parts) == ["codec", "encoder", "quantizer", "nested_dropout", "decoder"]  # in the order of the data
    assert parts["codec"] == "codecs.vae.VAE" and parts["decoder"] == "decoders.flow.FlowDecoder"
    assert systems.parts("ar_flextok") == {"model": "generate.ar.AR"}


def test_a_part_inside_a_part_of_its_kind_is_named():
    inner, other = dict(name="quantizers.b.B"), dict(name="nn.c.c")
    part = dict(name="quantizers.a.A", quantizer=inner, time=other, options=dict(k=1))
    assert systems.names(ConfigDict(part)) == "quantizers.a.A(quantizers.b.B)"
