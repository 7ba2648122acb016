"""What is logged of every update, as (sum, count) pairs and fixed-bin histograms.

Both add up across micro-batches, devices and updates; a mean, a ratio of moments or a percentile is
formed only where it is read (`readings`, `percentiles`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.method.arithmetic import quotient, wide
from opd_jax.method.gates import masked
from opd_jax.method.losses import importance_ratio, k3

Array = jax.Array
Sums = dict[str, tuple[Array, Array]]

# Histogram edges, the outer bins open-ended. Bins grow by 19% away from the value of no drift at all,
# which has a narrow bin of its own: drift lives near 0 and weights near 1, on many scales.
_STEPS = tuple(5e-4 * 2 ** (i / 4) for i in range(53))  # 0.0005 to 4.1
DRIFT_EDGES = (*(-x for x in reversed(_STEPS)), *_STEPS)
WEIGHT_EDGES = (*(1 - x for x in reversed(_STEPS) if x < 1), *(1 + x for x in _STEPS))
SCORE_EDGES = _STEPS  # of |s|


def masked_sum(values: Array, mask: Array) -> tuple[Array, Array]:
    """(sum, count) of ``values`` over the mask; their quotient is the masked mean.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> masked_sum(jnp.array([[1., 2., 3., 4., 5., 6.], [7., 8., 9., 10., jnp.nan, 99.]]), mask)
    (Array(55., dtype=float32), Array(10., dtype=float32))
    """
    return jnp.sum(masked(values, mask)), jnp.sum(mask.astype(bool)).astype(jnp.float32)


def histogram(values: Array, mask: Array, edges: tuple[float, ...]) -> Array:
    """Counts of masked values below, between and above ``edges``: ``[len(edges) + 1]`` float32.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> x = jnp.array([[-9., .1, .2, .5, .6, 1.], [.7, .8, .9, 7., 99., jnp.nan]])
    >>> histogram(x, mask, (0., .5, 1.))  # an edge belongs to the bin above it
    Array([1., 2., 5., 2.], dtype=float32)
    """
    bin_ = jnp.searchsorted(jnp.asarray(edges), values.ravel(), side="right")
    counts = jnp.zeros(len(edges) + 1, jnp.float32)
    return counts.at[bin_].add(mask.ravel().astype(bool).astype(jnp.float32))


def effective_token_ratio(weights: Array, mask: Array) -> Array:
    """``(sum w)^2 / (N sum w^2)``: the share of tokens that still count; 1 when all weigh the same.

    The same formula over importance ratios is their effective sample size (Kish, 1965), per token.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> w = jnp.array([[2., 2., 2., 2., 2., 0.], [0., 0., 0., 0., 9., 9.]])
    >>> effective_token_ratio(w, mask)  # 10^2 / (10 * 20): half of the tokens
    Array(0.5, dtype=float32)
    """
    total, count = masked_sum(weights, mask)
    squares, _ = masked_sum(jnp.square(wide(weights)), mask)
    return jnp.where(squares > 0, quotient(jnp.square(total), count * squares), 1.0)


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
    """Every-step readings of one batch; `readings` turns their totals into the figures that are logged.

    Args:
      cur, old, tea: log-probs ``[B, T]`` of the sampled token: student, behaviour, teacher.
      d, w: drift and weights ``[B, T]``.
      mask: ``[B, T]``.
      clip: the ratio's bounds below and above 1, whose crossings are counted.

    Returns:
      name -> (sum, count), with ``rho = exp(d)``:

      - ``drift``, ``drift_abs``: d and |d|;
      - ``weight``, ``weight_square``, ``ratio``, ``ratio_square``: first and second moments of w and rho;
      - ``clip_fraction``: tokens whose ratio lies outside the bounds;
      - ``kl_old_k1``, ``kl_old_k3``: ``-d`` and ``rho - 1 - d``, the two estimates of KL(old || cur);
      - ``kl_teacher_k1``, ``kl_teacher_k3``: with ``r = tea - cur``, ``-r`` and ``exp(r) - 1 - r`` on the
        sampled tokens, weighted by rho, which makes them estimates of the student's present reverse KL
        to the teacher.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> d = jnp.log(jnp.array([[2., 2., 2., 1., 1., 1.], [1., 1., .5, .5, 9., 9.]]))
    >>> old = jnp.full((2, 6), -3.)
    >>> sums = drift_diagnostics(old + d, old, old + d, d, jnp.ones((2, 6)), mask, clip=(0.2, 0.2))
    >>> sums["drift"]  # 3 log 2 - 2 log 2 over ten tokens
    (Array(0.6931, dtype=float32), Array(10., dtype=float32))
    >>> sums["clip_fraction"][0], sums["ratio"][0]  # 2 and 1/2 lie outside; 3 * 2 + 5 + 2 / 2
    (Array(5., dtype=float32), Array(12., dtype=float32))
    """
    cur, old, tea, d, w = (masked(x, mask) for x in (cur, old, tea, d, w))
    rho = importance_ratio(cur, old)
    low, high = clip
    r = tea - cur
    return {
        "drift": masked_sum(d, mask),
        "drift_abs": masked_sum(jnp.abs(d), mask),
        "weight": masked_sum(w, mask),
        "weight_square": masked_sum(jnp.square(w), mask),
        "ratio": masked_sum(rho, mask),
        "ratio_square": masked_sum(jnp.square(rho), mask),
        "clip_fraction": masked_sum(((rho < 1 - low) | (rho > 1 + high)).astype(jnp.float32), mask),
        "kl_old_k1": masked_sum(-d, mask),
        "kl_old_k3": masked_sum(k3(d), mask),
        "kl_teacher_k1": masked_sum(-rho * r, mask),
        "kl_teacher_k3": masked_sum(rho * k3(r), mask),
    }


def support_mass(logprobs_on_support: Array, mask: Array) -> tuple[Array, Array]:
    """(sum, count) of the probability that lies on a support, from ``[B, T, K]`` log-probs.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> log_p = jnp.log(jnp.array([.5, .25])) * jnp.ones((2, 6, 1))
    >>> support_mass(log_p, mask)  # ten times 3/4
    (Array(7.5, dtype=float32), Array(10., dtype=float32))
    """
    return masked_sum(jnp.sum(jnp.exp(wide(logprobs_on_support)), axis=-1), mask)


def topk_overlap(ids_a: Array, ids_b: Array, mask: Array) -> tuple[Array, Array]:
    """(sum, count) of ``|A and B| / K`` of two sets of ids a position, ``[B, T, K]`` each.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> a = jnp.array([1, 2]) * jnp.ones((2, 6, 1), int)
    >>> b = a + jnp.array([0, 1, 2, 0, 1, 2])[:, None]  # both, one or none in common
    >>> topk_overlap(a, b, mask)  # 1 + .5 + 0 + 1 + .5 + 0 and 1 + .5 + 0 + 1
    (Array(5.5, dtype=float32), Array(10., dtype=float32))
    """
    same = jnp.any(ids_a[..., :, None] == ids_b[..., None, :], axis=-1)
    return masked_sum(jnp.mean(same.astype(jnp.float32), axis=-1), mask)


def readings(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Means from totals, and what follows from moments: the figures that are logged.

    ``effective_token_ratio`` comes from the moments of w, and ``importance_ess``, the effective sample
    size of the importance ratios as a share of the tokens, from those of rho.

    >>> w = jnp.array([[2., 2., 2., 2., 2., 2.], [0., 0., 0., 0., 0., 0.]])
    >>> mask = jnp.ones((2, 6))
    >>> readings({"weight": masked_sum(w, mask), "weight_square": masked_sum(w**2, mask)})  # 1^2 / 2
    {'weight': 1.0, 'effective_token_ratio': 0.5}
    """
    means = {name: float(total) / float(count) if count else 0.0 for name, (total, count) in sums.items()}
    for moment, name in (("weight", "effective_token_ratio"), ("ratio", "importance_ess")):
        square = means.pop(f"{moment}_square", None)
        if square is not None:
            means[name] = means[moment] ** 2 / square if square else 1.0
    return means


def percentiles(counts: Sequence[float], edges: Sequence[float], percents: Sequence[float]) -> list[float]:
    """Percentiles of a `histogram`, linear within a bin; the open outer bins end at their edge.

    An empty histogram has none: NaN.

    >>> x = jnp.array([[.1, .2, .3, .4, .5, .6], [.7, .8, 1.2, 1.4, 1.6, 1.8]])
    >>> counts = histogram(x, jnp.ones((2, 6)), (0., 1., 2.))
    >>> [float(n) for n in counts]
    [0.0, 8.0, 4.0, 0.0]
    >>> percentiles(counts, (0., 1., 2.), (25, 50, 75))  # 3 and 6 of the 8 below 1, 1 of the 4 above
    [0.375, 0.75, 1.25]
    """
    borders = [edges[0], *edges, edges[-1]]
    total = float(sum(counts))
    values = []
    for percent in percents:
        wanted, below, value = total * percent / 100, 0.0, float("nan")
        for bin_, count in enumerate(counts):
            if count and below + count >= wanted:
                share = (wanted - below) / count
                value = float(borders[bin_] + share * (borders[bin_ + 1] - borders[bin_]))
                break
            below += count
        values.append(value)
    return values
