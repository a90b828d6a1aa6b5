"""Names become parts; a wrong name or key says the nearest right one."""

import functools
import sys

import pytest
from ml_collections import ConfigDict

from jaxtok.build import build
from jaxtok.nn import flow
from jaxtok.quantizers.fsq import FSQ


def test_parts_are_built_from_the_inside_out():
    spec = ConfigDict(
        dict(
            a=dict(name="quantizers.fsq.FSQ", levels=[8, 5]),
            b=(dict(name="nn.flow.shifted_time", shift=4.0), 3),
        )
    )
    built = build(spec)
    assert built["a"] == FSQ(levels=(8, 5))
    time, three = built["b"]
    assert three == 3 and isinstance(time, functools.partial) and time.func is flow.shifted_time
    assert time(0.5) == pytest.approx(0.8)


def test_a_full_import_path_names_a_part_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("class Part:\n    def __init__(self, size):\n        self.size = size\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert build(dict(name="mine.Part", size=3)).size == 3
    sys.modules.pop("mine")


def test_a_part_whose_own_import_fails_says_so(tmp_path, monkeypatch):
    (tmp_path / "broken_part.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        build(dict(name="broken_part.Part"))


@pytest.mark.parametrize(
    "spec, error, words",
    [
        (
            dict(name="quantizers.fqs.FSQ"),
            ValueError,
            'no part "quantizers.fqs.FSQ". Did you mean "quantizers.fsq.FSQ"',
        ),
        (dict(name="quantizers.fsq.FSK"), ValueError, 'Did you mean "quantizers.fsq.FSQ"'),
        (dict(name="quantiser.fsq.FSQ"), ValueError, 'Did you mean "quantizers.fsq.FSQ"'),
        (dict(name="FSQ"), ValueError, 'no part "FSQ"'),
        (dict(name="quantizers.fsq.FSQ", level=(8,)), TypeError, 'no key "level". Did you mean "levels"'),
        (dict(name="nn.flow.shifted_time", shfit=1.0), TypeError, 'no key "shfit". Did you mean "shift"'),
        (dict(name="encoders.latent1d.Latent1D", width=3), TypeError, "needs depth, registers, channels"),
    ],
)
def test_errors_name_the_nearest(spec, error, words):
    with pytest.raises(error) as caught:
        build(spec)
    assert words in str(caught.value)
