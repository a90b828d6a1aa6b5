import re

import numpy as np
import pytest

from jaxtok.pretrained.convert import convert, flatten, match, unflatten

RULES = (
    (r"layers\.(\d+)\.(?:q)\.weight", r"blocks/qk[\1,:,0]", "(h d) i -> i h d"),
    (r"layers\.(\d+)\.(?:k)\.weight", r"blocks/qk[\1,:,1]", "(h d) i -> i h d"),
    (r"head\.weight", "head/kernel", "o i -> i o"),
    (r"table", "table", "1 n -> n"),
    (r"optimizer\..*", None, "optimizer"),
)
LIKE = {"blocks": {"qk": np.zeros((2, 6, 2, 2, 3), np.float32)}, "head": {"kernel": np.zeros((6, 5), np.float32)}}
TABLE = {"table": np.arange(4.0)}


@pytest.fixture
def foreign():
    rng = np.random.default_rng(0)
    keys = [f"layers.{i}.{name}.weight" for i in range(2) for name in "qk"]
    arrays = {key: rng.normal(size=(6, 6)) for key in keys}
    return arrays | {"head.weight": rng.normal(size=(5, 6)), "table": np.arange(4.0)[None]}


def test_every_entry_lands_where_the_rule_says(foreign):
    tree, report = convert(foreign, RULES, LIKE, TABLE)
    assert str(report) == ""
    assert {path: leaf.shape for path, leaf in flatten(tree).items()} == {
        path: leaf.shape for path, leaf in flatten(LIKE).items()
    }
    assert tree["blocks"]["qk"].dtype == np.float32
    # input 4, layer 1, k, head 1, channel 2 of head: row 1 * 3 + 2 of the foreign [out in]
    assert tree["blocks"]["qk"][1, 4, 1, 1, 2] == np.float32(foreign["layers.1.k.weight"][5, 4])
    assert tree["head"]["kernel"][3, 2] == np.float32(foreign["head.weight"][2, 3])


def test_missing_keys_are_all_named(foreign):
    del foreign["layers.1.q.weight"], foreign["head.weight"]
    with pytest.raises(ValueError, match=re.escape("blocks/qk[1,:,0]")) as error:
        convert(foreign, RULES, LIKE, TABLE)
    assert "head/kernel" in str(error.value) and "qk[0" not in str(error.value)


def test_mismatches_are_all_named(foreign):
    foreign |= {"head.weight": np.zeros((6, 5)), "layers.0.q.weight": np.zeros((5, 6))}
    foreign |= {"layers.2.k.weight": np.zeros((6, 6))}  # one layer more than we have
    _, report = match(foreign, RULES, LIKE, TABLE)
    assert [entry.partition(":")[0] for entry in sorted(report.mismatched)] == [
        "head.weight", "layers.0.q.weight", "layers.2.k.weight",
    ]  # fmt: skip
    assert report.missing == []  # a key that does not fit is listed once
    with pytest.raises(ValueError, match="outside"):
        convert(foreign, RULES, LIKE, TABLE)


def test_two_keys_for_one_place_are_an_error(foreign):
    rules = ((r"tail\.weight", "head/kernel", "o i -> i o"), *RULES)
    with pytest.raises(ValueError, match="already filled by head.weight"):
        convert(foreign | {"tail.weight": np.zeros((5, 6))}, rules, LIKE, TABLE)


def test_a_rule_that_leads_out_of_our_tree_is_an_error(foreign):
    rules = ((r"extra", "nowhere", "n -> n"), *RULES)
    with pytest.raises(ValueError, match="our tree has no nowhere"):
        convert(foreign | {"extra": np.zeros(3)}, rules, LIKE, TABLE)


@pytest.mark.parametrize("wrong", [1e-3, np.nan])
def test_a_fixed_table_that_differs_is_an_error(foreign, wrong):
    foreign["table"][0, 2] += wrong
    with pytest.raises(ValueError, match="differs from this table"):
        convert(foreign, RULES, LIKE, TABLE)


def test_unknown_keys_warn_and_keys_set_aside_are_counted(foreign):
    foreign |= {"surprise": np.zeros(3), "optimizer.step": np.zeros(())}
    with pytest.warns(UserWarning, match="surprise"):
        _, report = convert(foreign, RULES, LIKE, TABLE)
    assert report.unused == ["surprise"]
    assert report.set_aside == {"optimizer": ["optimizer.step"]}


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
