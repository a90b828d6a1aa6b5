"""The rectified-flow objective."""

import jax.numpy as jnp


def flow_matching(outputs, batch):
    """Mean squared error between a flow decoder's prediction and its target (velocity or x0, whichever it trains).

    Over the elements of each sample, then over samples, float32: E |v - (noise - x0)|^2 (arXiv 2209.03003).
    """
    decoded = outputs["decoded"]
    return jnp.square(decoded.prediction.astype(jnp.float32) - decoded.target.astype(jnp.float32)).mean()
