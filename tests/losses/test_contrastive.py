"""InfoNCE, and books that must name what a teacher sees."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok.losses.contrastive import FeatureHead, Prediction, info_nce
from jaxtok.structs import Codes

GOLDEN = Path(__file__).parent.parent / "goldens" / "one_d" / "fqgan_dual_quant.npz"
HEAD = FeatureHead(width=16, depth=1, head_dim=8)


class Tower(nn.Module):
    """Features that are the picture, times a parameter."""

    @nn.compact
    def __call__(self, images):
        return images * self.param("scale", nn.initializers.ones, ())


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def outputs(z):
    return {"codes": Codes(z, None, jnp.ones(z.shape[:2], bool))}


def test_it_is_the_reference_value():
    with np.load(GOLDEN) as golden:
        ours = info_nce(jnp.asarray(golden["pred_feat"]), jnp.asarray(golden["teacher_feat"]))
        assert float(ours) == pytest.approx(float(golden["infonce"]), rel=1e-5)


def test_by_hand():
    x = jnp.eye(3)
    assert float(info_nce(x, x)) == pytest.approx(float(np.log(np.e + 2) - 1), rel=1e-6)
    assert float(info_nce(x, x, 0.5)) == pytest.approx(float(np.log(np.e**2 + 2) - 2), rel=1e-6)
    assert float(info_nce(x, x[::-1])) > float(info_nce(x, x))
    assert float(info_nce(0 * x, x)) == pytest.approx(np.log(3), rel=1e-6)  # a guess


def test_only_its_channels_are_read_and_the_tower_gets_no_gradient():
    term, z = Prediction(HEAD, (2, 5), Tower()), normal(4, 6, 8)
    batch = {"image": normal(4, 2, 2, 7, seed=1)}
    variables = jax.jit(term.init)(jax.random.key(0), outputs(z), batch)
    assert set(variables["params"]) == {"head", "out", "tower"} and variables["params"]["out"]["kernel"].shape == (
        16,
        7,
    )
    loss = lambda params, z: term.apply({"params": params}, outputs(z), batch)
    params, slope = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], z)
    assert (slope[..., :2] == 0).all() and (slope[..., 5:] == 0).all() and (np.abs(slope[..., 2:5]) > 0).all()
    assert params["tower"]["scale"] == 0 and optax.tree.norm(params["head"]) > 0


def test_no_layer_follows_where_the_target_is_as_wide():
    term = Prediction(HEAD, (0, 8), Tower())
    shapes = jax.eval_shape(term.init, jax.random.key(0), outputs(normal(4, 6, 8)), {"image": normal(4, 2, 2, 16)})
    assert set(shapes["params"]) == {"head", "tower"}


def test_classes_are_learned_from_the_code_that_knows_them_and_not_from_the_other():
    """Of 32 examples of 4 classes, each may be taken for its 7 like: at best log 8, and log 32 for a guess."""
    label = jnp.arange(32) % 4
    z = jnp.concatenate([normal(4, 3)[label], normal(32, 3, seed=1)], -1)[:, None] + 0 * normal(32, 2, 6)
    tx, batch = optax.adam(3e-3), {"label": label}

    def learned(channels):
        term = Prediction(HEAD, channels, classes=4, temperature=0.1)
        held = z if channels[0] == 0 else z.at[..., 3:].set(0)  # the control: channels that say nothing
        loss = lambda params: term.apply({"params": params}, outputs(held), batch)

        def step(carry, _):
            params, state = carry
            value, slope = jax.value_and_grad(loss)(params)
            updates, state = tx.update(slope, state)
            return (optax.apply_updates(params, updates), state), value

        params = term.init(jax.random.key(0), outputs(held), batch)["params"]
        return jax.lax.scan(step, (params, tx.init(params)), length=60)[1][-1]

    assert jax.jit(learned, static_argnums=0)((0, 3)) < np.log(8) + 0.1
    assert jax.jit(learned, static_argnums=0)((3, 6)) > np.log(32) - 0.1


def test_a_target_is_needed_and_one_only():
    for fields in (dict(), dict(tower=Tower(), classes=3)):
        with pytest.raises(ValueError, match="either a tower or a number of `classes`"):
            Prediction(HEAD, (0, 8), **fields).init(jax.random.key(0), outputs(normal(4, 6, 8)), {})
