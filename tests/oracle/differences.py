"""Central differences of losses that are functions of their own position alone."""

from __future__ import annotations

import numpy as np

STEP = 1e-6


def derivative(loss, x) -> tuple[np.ndarray, np.ndarray]:
    """d loss[b, t] / d x[b, t, ...], and where it exists: off the kinks of a max or a clip.

    ``loss`` maps ``x``, ``[B, T]`` or ``[B, T, K]``, to ``[B, T]``. All positions move at once, since none
    depends on another; the K values of a position move one after another.
    """
    x = np.asarray(x, np.float64)
    flat = x.reshape(*x.shape[:2], -1)
    middle, slope, smooth = loss(x), np.zeros(flat.shape), np.zeros(flat.shape, bool)
    for k in range(flat.shape[-1]):
        shift = np.zeros(flat.shape)
        shift[..., k] = STEP
        above, below = loss(x + shift.reshape(x.shape)), loss(x - shift.reshape(x.shape))
        slope[..., k] = (above - below) / (2 * STEP)
        # At a kink within reach, the two one-sided slopes differ by far more than curvature makes them.
        smooth[..., k] = abs(above - 2 * middle + below) / STEP < 2e-5 * (1 + abs(slope[..., k]))
    return slope.reshape(x.shape), smooth.reshape(x.shape)
