"""How heavy an adversarial term is, measured at the decoder's last layer (VQGAN, arXiv 2012.09841, equation 7).

Both gradients by that layer's kernel begin as gradients by the picture. These are computed once, serve the backward
pass too, and only the way from the picture to the kernel is gone twice: whatever lies behind or before it is not.
"""

import jax
import jax.numpy as jnp
from flax import traverse_util


def adaptive_weight(others, own, limits=(0.0, 1e4)):
    """|others| / (|own| + 1e-4) within `limits`, a constant. others, own: norms of gradients by the last kernel."""
    return jax.lax.stop_gradient(jnp.clip(others / (own + 1e-4), *limits))


def by_parameter(fn, params, path):
    """One pass of fn(params) -> (y, aux), and the way from y back to one array of `params`, nested dicts.

    Returns (y, aux, norm): norm(slope), of a gradient by y, is the norm of the gradient by the array at `path`,
    "decoder/conv_out/kernel"; no gradient passes it. ValueError where there is no such array.
    """
    flat = traverse_util.flatten_dict(params, keep_empty_nodes=True, sep="/")
    if path not in flat:
        kernels = [name for name in flat if name.startswith("decoder/") and name.endswith("/kernel")]
        raise ValueError(
            f'`adaptive` names the kernel of the decoder\'s last layer; there is no "{path}", but {kernels}.'
        )
    put = lambda array: traverse_util.unflatten_dict(flat | {path: array}, sep="/")
    y, back, aux = jax.vjp(lambda array: fn(put(array)), flat[path], has_aux=True)

    def norm(slope):
        (gradient,) = back(slope.astype(y.dtype))
        return jnp.sqrt(jnp.square(jax.lax.stop_gradient(gradient).astype(jnp.float32)).sum())

    return y, aux, norm


def by_picture(fn, x):
    """fn(x) -> (value, aux) gives (value, aux, its slope by x, a constant).

    Who differentiates this value finds that slope, and does not go back through fn to x again.
    """
    held = jax.lax.stop_gradient(x)
    value, back, aux = jax.vjp(fn, held, has_aux=True)
    slope = jax.lax.stop_gradient(back(jnp.ones_like(value))[0])
    return value + (slope * (x - held)).sum(), aux, slope
