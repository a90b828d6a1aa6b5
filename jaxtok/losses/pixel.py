"""How far a one-pass decoder's picture is from its target."""

import jax.numpy as jnp


def l1(outputs, batch):
    """Mean absolute difference of prediction and target, over all elements, float32."""
    return jnp.abs(_difference(outputs["decoded"])).mean()


def l2(outputs, batch):
    """Mean squared difference of prediction and target, over all elements, float32."""
    return jnp.square(_difference(outputs["decoded"])).mean()


def _difference(decoded):
    return decoded.prediction.astype(jnp.float32) - decoded.target.astype(jnp.float32)
