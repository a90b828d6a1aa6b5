"""What a task measures of a batch: its padding changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import textok
from jaxtok.build import build
from jaxtok.data import pipeline
from jaxtok.step import numeric, transforms
from jaxtok.tasks import OTHER_TEXT, SWAPPED
from jaxtok.tasks.tokenizer import another


def test_another_row_is_one_that_counts():
    assert another(jnp.ones(4, bool)).tolist() == [3, 0, 1, 2]
    some = another(jnp.array([True, False, True, True, False, False]))  # a bad record, and the end of the set
    assert some[jnp.array([0, 2, 3])].tolist() == [3, 0, 2]
    assert int(another(jnp.array([False, True, False]))[1]) != 1  # a blank is at least not its own
    assert another(jnp.ones(1, bool)).tolist() == [0]


def test_another_pictures_codes_and_text_are_never_those_of_a_blank():
    config = textok.get_config("tiny")
    task, change = build(config.task), transforms(config.data.eval)
    source = [build(config.data.eval.source)[i] for i in range(5)]
    batch = lambda n, size: numeric(next(pipeline.eval_batches(source[:n], change, batch_size=size)))
    rng = np.random.default_rng(0)
    trees = jax.eval_shape(task.init, jax.random.key(0), batch(5, 5))
    trees = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), trees)
    trees = [trees[name] for name in ("params", "mutable", "frozen")]
    evaluate = jax.jit(lambda batch: task.evaluate(*trees, batch, jax.random.key(0))["rows"])
    wanted, found, one = evaluate(batch(5, 5)), evaluate(batch(5, 8)), evaluate(batch(1, 1))
    for name in (SWAPPED, OTHER_TEXT):
        np.testing.assert_allclose(found[f"psnr/{name}"][:5], wanted[f"psnr/{name}"], rtol=1e-4)
        assert np.isnan(one[f"psnr/{name}"]).all()  # there is no other
    assert (
        np.abs(
            np.asarray(wanted[f"psnr/{SWAPPED}"]) - wanted[f"psnr/{task.samplers[0]['title']}@{task.token_counts[-1]}"]
        ).max()
        > 0.01
    )
