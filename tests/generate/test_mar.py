"""Masked autoregression: whom a place hears, the law of masks, a sampler that fills every place once, what it learns.

Words of four tokens of two channels, [a, b]: a is one of four, b is a + 1 in nine of ten; the tokens of a word are
equal. After 400 steps, the share of sampled words whose tokens are all equal, and of tokens in which b is a + 1, drawn
in four steps and in one (`python -m tests.generate.test_mar`):

    seed    equal, 4 steps   1 step   b is a + 1, 4 steps   1 step
    0                0.658    0.015                 0.925    0.939
    1                0.879    0.014                 0.934    0.930
    2                0.956    0.017                 0.946    0.939

Tokens of one step do not hear of each other, so that words drawn at once are as good as shuffled.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.generate import sampling
from jaxtok.generate.mar import MAR, MASKED, cosine
from jaxtok.generate.masked import counts
from tests.generate import models
from tests.generate.models import CLASSES, N, noisy, run
from tests.generate.test_bits import learn

SIZES = (5, 4, 3)
RNG = jax.random.key(7)


def mar(sizes=SIZES, length=N, width=16, **fields):
    head = dict(depth=1, inner=16, block=dict(head_dim=8))
    fields = dict(classes=CLASSES, depth=2, block=dict(head_dim=8), buffer=2, dropout=0.0) | fields
    return MAR(sizes, length, width, head=head, **fields)


@pytest.fixture(scope="module")
def trained():
    """(module, parameters at which nothing is zero, codes, condition)."""
    module, condition = mar(), {"label": jnp.arange(4) % CLASSES}
    codes = jnp.stack([jax.random.randint(jax.random.key(g), (4, N), 0, n) for g, n in enumerate(SIZES)], -1)
    keys = {"params": jax.random.key(0), "train": jax.random.key(1)}
    return module, noisy(jax.jit(partial(module.init, keys, method="loss"))(codes, condition), 0.3), codes, condition


def hide(codes, places):
    return codes.at[:, np.array(places)].set(MASKED)


def test_every_place_reads_every_known_token_and_the_class(trained):
    module, params, codes, condition = trained
    shown = hide(codes, [1, 3, 4])
    features = lambda codes, condition: run(module, "__call__", params, codes, condition)
    there = features(shown, condition)
    for other in (
        features(shown.at[:, 0, 2].set((codes[:, 0, 2] + 1) % 3), condition),
        features(hide(shown, [8]), condition),
        features(shown, {"label": (condition["label"] + 1) % CLASSES}),
    ):
        assert (np.abs(there - other).max((0, 2)) > 1e-4).all()


def test_room_for_the_known_ones_alone_changes_nothing(trained):
    """Samples with three, two, one and no known tokens."""
    module, params, codes, condition = trained
    shown = jnp.where(jnp.arange(N)[None, ::-1, None] < jnp.arange(3, -1, -1)[:, None, None], codes, MASKED)
    whole = run(module, "__call__", params, shown, condition)
    np.testing.assert_allclose(run(module, "__call__", params, shown, condition, known=3), whole, atol=1e-5)
    assert np.abs(run(module, "__call__", params, shown, condition, known=2)[0] - whole[0]).max() > 1e-3


def test_a_sample_is_what_whole_passes_draw_place_by_place(trained):
    """Three steps, guided by a schedule; every place is filled once, those of a step by the features before it."""
    module, params, _, condition = trained
    rising, steps = partial(sampling.linear, scale=3.0), 3
    drawn = run(module, "sample", params, RNG, condition, steps=steps, guidance=rising, temperature=0.9)
    assert drawn.shape == (4, N, 3) and drawn.min() >= 0 and (drawn < np.array(SIZES)).all()
    left = counts(N, steps, cosine)
    assert left.tolist() == [7, 4, 0]
    order = np.argsort(jax.random.uniform(jax.random.fold_in(RNG, steps), (4, N)), -1)
    codes = np.full((4, N, 3), MASKED)
    for step, (before, after) in enumerate(zip([N, *left], left, strict=False)):
        features = [run(module, "__call__", params, codes, condition, null=jnp.full(4, null)) for null in (False, True)]
        features = sampling.guide(*features, rising(N - after, N))
        start = min(after, N - 4)  # at most four a step: all draw in a window of so many
        here = order[:, start : start + 4, None]
        key = jax.random.fold_in(RNG, step)
        choose = lambda logits, g, key=key: sampling.draw(jax.random.fold_in(key, g), logits, 0.9)
        new = module.apply(params, jnp.take_along_axis(features, here, 1), choose, method="draw")
        for place in range(after, before):
            for sample in range(4):
                codes[sample, order[sample, place]] = new[sample, place - start]
    np.testing.assert_array_equal(drawn, codes)


def test_masks_follow_the_cut_normal_law(trained):
    """Of at least seven tenths, rounded up; the mean share of the law is 0.871."""
    module, params, codes, condition = trained
    many = jnp.tile(codes, (500, 1, 1)), {"label": jnp.tile(condition["label"], 500)}
    scores = run(module, "loss", params, *many, rngs={"train": RNG})
    count = np.asarray(scores.weight.sum(-1))
    share = np.linspace(0.7, 1, 20_001)
    density = np.exp(-0.5 * ((share - 1) / 0.25) ** 2)
    wanted = (np.ceil(N * share) * density).sum() / density.sum()
    assert set(np.unique(scores.weight)) == {0, 1} and set(np.unique(count)) == {7, 8, 9}
    assert abs(count.mean() - wanted) < 5 * count.std() / len(count) ** 0.5


def test_conditions_are_dropped_at_the_given_rate(trained):
    _, params, codes, _ = trained
    models.drops_conditions(mar(null_rate=0.3), params, codes[0], RNG)


def test_errors_say_what_is_wrong(trained):
    module, params, codes, _ = trained
    models.refuses_what_cannot_be(module, params, codes, RNG)
    with pytest.raises(ValueError, match="is no permutation of the 3 channels"):
        mar().clone(head=dict(inner=8, order=(0, 1, 1), block=dict(head_dim=8))).init(
            {"params": RNG, "train": RNG}, codes, {"label": jnp.zeros(4, int)}, method="loss"
        )


def words(key, size):
    """Codes int [size 4 2]."""
    first, chance, other = jax.random.split(key, 3)
    a = jax.random.randint(first, (size, 1), 0, 4)
    b = jnp.where(jax.random.bernoulli(chance, 0.9, (size, 1)), (a + 1) % 4, jax.random.randint(other, (size, 1), 0, 4))
    return jnp.broadcast_to(jnp.stack([a, b], -1), (size, 4, 2))


def shares(seed=0):
    """{steps: (words of equal tokens, tokens whose b is a + 1)} of samples."""
    module = mar((4, 4), 4, 32, classes=0, depth=1, block=dict(head_dim=16))
    params, _ = learn(module, words, steps=400, seed=seed)
    found = {}
    for steps in (4, 1):
        drawn = run(module, "sample", params, jax.random.key(3), steps=steps, batch=1024)
        found[steps] = (
            float((drawn == drawn[:, :1]).all((1, 2)).mean()),
            float((drawn[..., 1] == (drawn[..., 0] + 1) % 4).mean()),
        )
    return found


def test_places_hear_of_each_other_over_steps_and_channels_within_one():
    found = shares()
    assert found[4][0] > 0.5 and found[1][0] < 0.1
    assert min(follow for _, follow in found.values()) > 0.85


if __name__ == "__main__":
    for number in range(3):
        print(f"seed {number}:", shares(number), flush=True)
