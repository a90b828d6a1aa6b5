"""Rectified flow: x_t = t * noise + (1 - t) * x0 for t in [0, 1], velocity v = dx/dt = noise - x0."""

import jax
import jax.numpy as jnp

# ---- laws of the time that training draws: uniform u [B] -> t [B] ----


def mode_time(u, scale=0.25):
    """Mode sampling of SD3 (arXiv 2403.03206, section 3.1) with the given scale."""
    return 1 - u - scale * (jnp.square(jnp.cos(jnp.pi * u / 2)) - 1 + u)


def shifted_time(u, shift=1.0):
    """Uniform time moved towards noise: t = s u / (1 + (s - 1) u); shift 1 is uniform (arXiv 2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


# ---- the path ----


def interpolate(x0, noise, t):
    """The point x_t of the path. x0, noise [B ...], t [B]."""
    t = expand(t, x0)
    return t * noise + (1 - t) * x0


def expand(t, x):
    """[B] -> [B 1 1 ...], to broadcast against x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def velocity_from_x0(x_t, x0, t):
    """The velocity that a prediction of x0 means at x_t: (x_t - x0) / t."""
    return (x_t - x0) / expand(t, x_t)


# ---- guidance: both take v_cond, v_uncond, scale and a carried buffer, and return (v, buffer) ----


def cfg(v_cond, v_uncond, scale, buffer):
    """Classifier-free guidance (arXiv 2207.12598): v_u + scale (v_c - v_u)."""
    return v_uncond + scale * (v_cond - v_uncond), buffer


def apg(v_cond, v_uncond, scale, buffer, momentum=-0.5, eta=0.0, threshold=2.5):
    """Adaptive projected guidance (arXiv 2410.02416) as FlexTok applies it to velocities, a picture at a time.

    The difference is accumulated with (negative) momentum, clipped to the norm `threshold` (the buffer stays
    unclipped; threshold 0 does not clip), and its part parallel to v_cond is scaled by `eta`.
    """
    axes = tuple(range(1, v_cond.ndim))
    buffer = v_cond - v_uncond + momentum * buffer
    difference = buffer
    if threshold > 0:
        norm = jnp.sqrt(jnp.square(difference).sum(axes, keepdims=True))
        difference = difference * jnp.minimum(1.0, threshold / jnp.maximum(norm, 1e-12))
    unit = v_cond / jnp.maximum(jnp.sqrt(jnp.square(v_cond).sum(axes, keepdims=True)), 1e-12)
    parallel = (difference * unit).sum(axes, keepdims=True) * unit
    return v_cond + (scale - 1) * (difference - parallel + eta * parallel), buffer


# ---- the solver ----


def times(steps):
    """The times at which Euler steps from noise (t = 1) to data (t = 0) evaluate the velocity: float32 [steps]."""
    return jnp.arange(steps, 0, -1, dtype=jnp.float32) / steps


def euler(velocity, x, times, carry=None, schedule=None):
    """Euler steps from noise to data, in float32.

    Args:
      velocity: (x [B ...], t [], carry, what `schedule` holds for this step) -> (v [B ...], carry).
      x: the noise [B ...].
      times: [steps], falling to 0, which is not in it.
      carry: what velocity hands from step to step (a guidance buffer), or None.
      schedule: a tree of arrays [steps, ...], or None.

    Returns the data, and the trajectory [steps + 1, B ...] from noise to data (dead code where it is not used).
    """

    def step(state, now):
        (x, carry), (t, width, scheduled) = state, now
        v, carry = velocity(x, t, carry, scheduled)
        x = x - v.astype(jnp.float32) * width
        return (x, carry), x

    x = x.astype(jnp.float32)
    widths = times - jnp.append(times[1:], 0.0)
    (last, _), path = jax.lax.scan(step, (x, carry), (times, widths, schedule))
    return last, jnp.concatenate([x[None], path])


def heun(velocity, x, times, schedule=None):
    """Heun steps, of second order: as `euler` without a carry, velocity(x, t, scheduled) -> v. Returns the data.

    Two velocities a step, but one in the last, which ends at t = 0.
    """

    def step(x, now):
        (t, after), scheduled = now
        first = velocity(x, t, scheduled).astype(jnp.float32)
        second = velocity(x + (after - t) * first, after, scheduled).astype(jnp.float32)
        return x + (after - t) * (first + second) / 2, None

    head = jax.tree.map(lambda a: a[:-1], schedule)
    x, _ = jax.lax.scan(step, x.astype(jnp.float32), ((times[:-1], times[1:]), head))
    return x - times[-1] * velocity(x, times[-1], jax.tree.map(lambda a: a[-1], schedule)).astype(jnp.float32)
