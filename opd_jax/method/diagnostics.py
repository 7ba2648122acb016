"""What is logged of every update, as (sum, count) pairs and fixed-bin histograms.

Both add up across micro-batches, devices and updates; a mean is formed only where it is read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opd_jax.method.losses import importance_ratio

Array = jax.Array
Sums = dict[str, tuple[Array, Array]]

# Histogram edges, the outer bins open-ended. Bins grow by 19% away from the value of no drift at all,
# which has a narrow bin of its own: drift lives near 0 and weights near 1, on many scales.
_STEPS = tuple(5e-4 * 2 ** (i / 4) for i in range(53))  # 0.0005 to 4.1
DRIFT_EDGES = (*(-x for x in reversed(_STEPS)), *_STEPS)
WEIGHT_EDGES = (*(1 - x for x in reversed(_STEPS) if x < 1), *(1 + x for x in _STEPS))


def masked_sum(values: Array, mask: Array) -> tuple[Array, Array]:
    """(sum, count) of ``values`` over the mask; their quotient is the masked mean."""
    mask = mask.astype(bool)
    return jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask).astype(jnp.float32)


def histogram(values: Array, mask: Array, edges: tuple[float, ...]) -> Array:
    """Counts of masked values below, between and above ``edges``: ``[len(edges) + 1]`` float32.

    >>> histogram(jnp.array([[-9., .1, .6, 7.]]), jnp.array([[1, 1, 1, 0]]), (0., .5, 1.))
    Array([1., 1., 1., 0.], dtype=float32)
    """
    bin_ = jnp.searchsorted(jnp.asarray(edges), values.ravel(), side="right")
    counts = jnp.zeros(len(edges) + 1, jnp.float32)
    return counts.at[bin_].add(mask.ravel().astype(jnp.float32))


def effective_token_ratio(weights: Array, mask: Array) -> tuple[Array, Array]:
    """``(sum w)^2 / (N sum w^2)``: the share of tokens that still count; 1 when all weigh the same.

    Returned as (numerator, denominator).

    >>> a, b = effective_token_ratio(jnp.array([[2., 0.]]), jnp.ones((1, 2)))
    >>> float(a / b)
    0.5
    """
    total, count = masked_sum(weights, mask)
    squares, _ = masked_sum(jnp.square(weights), mask)
    return jnp.square(total), count * squares


def drift_diagnostics(
    cur: Array,
    old: Array,
    tea: Array,
    d: Array,
    w: Array,
    mask: Array,
    *,
    clip: tuple[float, float],
) -> Sums:
    """Every-step readings of one batch.

    Args:
      cur, old, tea: log-probs ``[B, T]`` of the sampled token: student, behaviour, teacher.
      d, w: drift and weights ``[B, T]``.
      mask: ``[B, T]``.
      clip: the ratio's bounds below and above 1, whose crossings are counted.

    Returns:
      name -> (sum, count):

      - ``drift``, ``drift_abs``: mean of d and of |d|;
      - ``effective_token_ratio``: of w;
      - ``clip_fraction``: tokens whose ratio lies outside the bounds;
      - ``kl_old_k3``: ``rho - 1 - d``, the drift as an estimate of KL(old || cur);
      - ``kl_teacher_k1``: ``cur - tea`` on the sampled tokens, weighted by the ratio, which makes it
        an estimate of the student's present reverse KL to the teacher.
    """
    inside = mask.astype(bool)
    cur, old, tea = (jnp.where(inside, x, 0.0) for x in (cur, old, tea))
    rho = importance_ratio(cur, old)
    low, high = clip
    return {
        "drift": masked_sum(d, mask),
        "drift_abs": masked_sum(jnp.abs(d), mask),
        "effective_token_ratio": effective_token_ratio(w, mask),
        "clip_fraction": masked_sum(((rho < 1 - low) | (rho > 1 + high)).astype(jnp.float32), mask),
        "kl_old_k3": masked_sum(rho - 1.0 - d, mask),
        "kl_teacher_k1": masked_sum(rho * (cur - tea), mask),
    }
