import numpy as np
import pytest

from jaxtok.eval.usage import usage


def test_a_uniform_codebook_and_a_dead_one():
    n = 64
    indices = np.stack([np.arange(n) % 8, np.zeros(n, int)], 1)  # one position says 3 bits, the other nothing
    found = usage(indices, 16)
    assert [place["bits"] for place in found["positions"]] == pytest.approx([3, 0])
    assert [place["distinct"] for place in found["positions"]] == [8 / 64, 1 / 64]
    assert found["used"] == 8 / 16 and found["distinct_first"] == 8 / 64 and found["of_bits"] == 4
    shares = np.array([9 / 16] + [1 / 16] * 7)  # of all tokens together
    assert found["bits"] == pytest.approx(-(shares * np.log2(shares)).sum())
    assert found["perplexity"] == pytest.approx(2 ** found["bits"])
    assert found["shown"] == 4 and found["shown_position"] == 4
    assert usage(indices[:4], 16)["shown_position"] == 2  # four pictures show two bits, whatever the codes


def test_groups_have_a_codebook_each():
    rng = np.random.default_rng(0)
    indices = np.stack([rng.integers(0, 4, (500, 3)), rng.integers(0, 2, (500, 3))], 2)  # [n N G]
    found = usage(indices, (4, 4))
    alone = [usage(indices[..., g], 4) for g in range(2)]
    assert found["bits"] == pytest.approx(sum(one["bits"] for one in alone)) == pytest.approx(3, abs=0.01)
    assert found["used"] == (1 + 0.5) / 2 and found["of_bits"] == 4
    assert found["perplexity"] == pytest.approx(np.mean([one["perplexity"] for one in alone]))
    assert found["positions"][0]["distinct"] == 8 / 500  # pairs that occur
