"""What a critic may be shown in the place of a picture, so that it cannot learn few pictures by heart."""

import jax
import jax.numpy as jnp


def diffaugment(key, x, color=True, translation=0.125, cutout=0.5):
    """DiffAugment (arXiv 2006.10738): pictures [B H W C] -> like them, each by draws of its own; gradients pass.

    Args:
      key: of the draws.
      x: in a range whose middle is 0: that is what comes in from beyond an edge, and what a cut leaves.
      color: whether brightness moves by up to 0.5, saturation is multiplied by 0 to 2 and contrast by 0.5 to 1.5.
      translation: the largest shift, as a share of either side; 0: none.
      cutout: the side of the square that is cut out, as a share of either side of the picture; 0: none.
    """
    keys, batch, sides = iter(jax.random.split(key, 7)), len(x), x.shape[1:3]
    if color:
        draw = lambda low, high: jax.random.uniform(next(keys), (batch, 1, 1, 1), x.dtype, low, high)
        around = lambda x, axes, factor: (x - (mean := x.mean(axes, keepdims=True))) * factor + mean
        x = x + draw(-0.5, 0.5)
        x = around(x, 3, draw(0, 2))
        x = around(x, (1, 2, 3), draw(0.5, 1.5))
    if translation:
        for axis, side in zip((1, 2), sides, strict=True):
            most = int(side * translation + 0.5)
            x = shift(x, jax.random.randint(next(keys), (batch,), -most, most + 1), axis)
    if cutout:
        inside = []  # [B H], [B W]
        for side in sides:
            size = int(side * cutout + 0.5)
            start = jax.random.randint(next(keys), (batch, 1), 0, side + (1 - size % 2)) - size // 2
            places = jnp.arange(side)
            inside.append((places >= start) & (places < start + size))
        x = jnp.where((inside[0][:, :, None] & inside[1][:, None, :])[..., None], 0, x)
    return x


def shift(x, by, axis):
    """Moves each of x [B H W C] by its own by [B] places towards the end of an axis; what comes in is 0."""
    n = x.shape[axis]
    places = jnp.arange(n) - by[:, None]  # [B n], where each comes from
    spread = lambda y: y.reshape(len(x), *(n if i == axis else 1 for i in range(1, x.ndim)))
    y = jnp.take_along_axis(x, spread(jnp.clip(places, 0, n - 1)), axis)
    return jnp.where(spread((places >= 0) & (places < n)), y, 0)
