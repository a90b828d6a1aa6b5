"""Interpolation as a matrix, for what jax.image does otherwise than the models that were trained with it."""

import numpy as np


def cubic(size, to, scale=None):
    """float32 [to size]: the matrix that takes `size` values to `to`, without anti-aliasing.

    Half-pixel centres; `scale` is how many times as dense the new values lie, to / size by default. The kernel is
    PyTorch's, a = -0.75, where jax.image has -0.5 (Keys 1981); beyond the ends the last value goes on.
    """
    a = -0.75
    place = (np.arange(to) + 0.5) / (scale or to / size) - 0.5
    first = np.floor(place).astype(int)
    matrix = np.zeros((to, size))
    for k in range(-1, 3):
        d = np.abs(place - first - k)
        near, far = ((a + 2) * d - (a + 3)) * d**2 + 1, ((d - 5) * d + 8) * a * d - 4 * a
        np.add.at(matrix, (np.arange(to), np.clip(first + k, 0, size - 1)), np.where(d <= 1, near, far))
    return matrix.astype(np.float32)
