"""The drift gate: from two log-probabilities a token to one detached weight a token.

    d = cur - old            drift, on the sampled token
    s = mean of d            over the token's segment: the signed mean
    g = exp(-tau |s|)        the gate
    w = sg(g / gbar)         mean one over the scope

Nothing behind the mask is ever read: values there are replaced before the first subtraction, so NaN
or infinity in the padding can reach neither a value nor a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.method.arithmetic import quotient, wide
from opd_jax.method.scope import Scope, scope_count, scope_least, scope_total
from opd_jax.method.segments import segment_total

Array = jax.Array

ROUNDING = 1e-6  # by which means of equal drift may differ in float32, as a share of them


def masked(x: Array, mask: Array) -> Array:
    """``x`` with zeros behind the mask, so that neither its value nor its gradient is read there; float32.

    >>> x = jnp.array([[1., 2., 3., 4., 5., 6.], [7., 8., 9., 10., jnp.nan, jnp.inf]])
    >>> masked(x, jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]))
    Array([[ 1.,  2.,  3.,  4.,  5.,  6.],
           [ 7.,  8.,  9., 10.,  0.,  0.]], dtype=float32)
    """
    return jnp.where(mask.astype(bool), wide(x), 0.0)


def drift(cur: Array, old: Array, mask: Array) -> Array:
    """Drift ``d = cur - old`` of the sampled tokens, ``[B, T]`` nats; 0 off the mask.

    >>> cur = jnp.array([[-1., -1., -1., -2., -2., -2.], [-1., -1., -1., -1., -9., jnp.nan]])
    >>> old = jnp.array([[-1., -2., -3., -1., -2., -3.], [-1., -1., -2., -2., jnp.nan, -1.]])
    >>> drift(cur, old, jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]))
    Array([[ 0.,  1.,  2., -1.,  0.,  1.],
           [ 0.,  0.,  1.,  1.,  0.,  0.]], dtype=float32)
    """
    return masked(cur, mask) - masked(old, mask)


def _mean(d: Array, mask: Array, segments: Array) -> Array:
    """Mean of ``d`` over each token's segment, valid tokens only."""
    inside = mask.astype(bool) & (segments >= 0)
    ids = jnp.where(inside, segments, -1)
    count = jnp.maximum(segment_total(inside, ids), 1)
    near = segment_total(d, ids) / count
    # Once more around that: added up one by one, sixteen thousand terms are off by 1e-4 of their mean, which
    # at large drift is a weight; what is left over is off by 1e-4 of next to nothing.
    return near + segment_total(d - near, ids) / count


def _root(x: Array) -> Array:
    """Square root whose gradient at 0 is 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


# s of a segment, from the drift of its tokens. The paper uses the signed mean; it names the others
# among its limitations.
STATISTICS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "signed_mean": _mean,
    "mean_abs": lambda d, mask, segments: _mean(jnp.abs(d), mask, segments),
    "rms": lambda d, mask, segments: _root(_mean(jnp.square(d), mask, segments)),
    "positive": lambda d, mask, segments: _mean(jnp.maximum(d, 0.0), mask, segments),
    "negative": lambda d, mask, segments: _mean(jnp.minimum(d, 0.0), mask, segments),
}

# g of a segment, from |s|, the least |s| of its scope, tau and a floor. Only ratios of g matter once it
# is normalised: ``exp`` is relative to the least drifted segment, which no drift can underflow.
MAPS: dict[str, Callable[[Array, Array, Any, float], Array]] = {
    "exp": lambda size, least, tau, floor: jnp.exp(-tau * jnp.maximum(size - least, 0.0)),
    "clipped_exp": lambda size, least, tau, floor: jnp.maximum(jnp.exp(-tau * size), floor),
    # All or nothing at |s| = 1 / tau. The least drifted segment always stays, or nothing might; and with it
    # those of equal drift, whose means differ by rounding.
    "hard": lambda size, least, tau, floor: (
        tau * size <= jnp.maximum(1.0, tau * least * (1 + ROUNDING))
    ).astype(size.dtype),
}


def segment_score(d: Array, mask: Array, segments: Array, *, statistic: str = "signed_mean") -> Array:
    """Score ``s`` of the segment that each token belongs to, ``[B, T]`` nats; 0 off the mask.

    Args:
      d: drift ``[B, T]``.
      mask: ``[B, T]``, nonzero on response tokens.
      segments: ids ``[B, T]`` from `opd_jax.method.segments`.
      statistic: a key of `STATISTICS`.

    Raises:
      ValueError: an unknown statistic.

    >>> d = jnp.array([[1., -1., 2., 4., 0., 6.], [-3., -1., 1., 2., 0., 0.]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> segment_score(d, mask, segments)  # 1 and -1 cancel
    Array([[ 0. ,  0. ,  3. ,  3. ,  3. ,  3. ],
           [-2. , -2. ,  1.5,  1.5,  0. ,  0. ]], dtype=float32)
    >>> segment_score(d, mask, segments, statistic="mean_abs")
    Array([[1. , 1. , 3. , 3. , 3. , 3. ],
           [2. , 2. , 1.5, 1.5, 0. , 0. ]], dtype=float32)
    """
    if statistic not in STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}: got {statistic!r}")
    return STATISTICS[statistic](masked(d, mask), mask, segments)


def gate(
    cur: Array,
    old: Array,
    mask: Array,
    segments: Array,
    *,
    tau: float | Array = 1.0,
    statistic: str = "signed_mean",
    map: str = "exp",
    floor: float = 0.1,
) -> Array:
    """Gate ``g`` of each token's segment, ``[B, T]`` in [0, 1]; 0 off the mask.

    Args:
      cur: ``[B, T]`` log-prob of the sampled token under the parameters being trained, nats.
      old: ``[B, T]`` the same under the behaviour policy.
      mask: ``[B, T]``, nonzero on response tokens.
      segments: ids ``[B, T]`` from `opd_jax.method.segments`.
      tau: sharpness per nat, 1 in the paper.
      statistic: a key of `STATISTICS`.
      map: ``exp``, the paper's ``exp(-tau |s|)``; ``clipped_exp``, the same but at least ``floor``;
        ``hard``, 1 where ``|s| <= 1 / tau`` and else 0.
      floor: of ``clipped_exp``, in (0, 1].

    Raises:
      ValueError: an unknown statistic or map, or a floor outside (0, 1].

    >>> old = jnp.full((2, 6), -3.)
    >>> cur = old + jnp.log(jnp.array([[2., 2., 2., .5, 1., 1.], [1., 1., 2., 2., 9., 9.]]))
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> gate(cur, old, mask, segments)  # exp(-log 2); log 2 and log 1/2 cancel
    Array([[0.5, 0.5, 1. , 1. , 1. , 1. ],
           [1. , 1. , 0.5, 0.5, 0. , 0. ]], dtype=float32)
    """
    size = drift_size(cur, old, mask, segments, statistic)
    return map_gate(size, jnp.zeros(()), mask, tau=tau, map=map, floor=floor)


def drift_size(cur: Array, old: Array, mask: Array, segments: Array, statistic: str) -> Array:
    """``|s|`` of each token's segment, ``[B, T]`` nats, detached."""
    # The gate weighs the loss and is no part of it: detached here, once, for every way of using it.
    d = drift(jax.lax.stop_gradient(cur), jax.lax.stop_gradient(old), mask)
    return jnp.abs(segment_score(d, mask, segments, statistic=statistic))


def map_gate(size: Array, least: Array, mask: Array, *, tau: float | Array, map: str, floor: float) -> Array:
    """``g`` from ``|s|``, relative to the ``least`` of the scope, ``[B, T]``; 0 off the mask."""
    if map not in MAPS:
        raise ValueError(f"map must be one of {', '.join(MAPS)}: got {map!r}")
    if not 0 < floor <= 1:
        raise ValueError(f"floor must lie in (0, 1]: got {floor}; 1 switches the gate off")
    # A temperature that is learnt, or found from the drift, is no path for a gradient either.
    return masked(MAPS[map](size, least, jax.lax.stop_gradient(tau), floor), mask)


def normalise(
    g: Array,
    mask: Array,
    *,
    scope: Scope = "minibatch",
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
    eps: float = 0.0,
) -> Array:
    """Weights ``w = g / gbar`` with ``gbar`` the mean of ``g`` over the scope's valid tokens.

    Within its scope ``sum(m * w) = sum(m)``, unless all of ``g`` is 0. The paper does not print the
    scope; ``minibatch``, the whole optimizer batch, is our default. ``sequence`` is what a gate written
    into a loop over single-sequence micro-batches does.

    Args:
      g: ``[B, T]``, nonnegative.
      mask: ``[B, T]``, nonzero on response tokens.
      scope: ``none`` returns ``g``; ``sequence`` normalises each sequence; ``microbatch`` the arrays
        given here; ``minibatch`` these and, under shard_map or pmap, all devices of ``axis_name``.
      sequence_ids: ``[B, T]`` int32 of packed rows, for ``sequence``; by default a row is one.
      axis_name: mapped axis to sum over; under jit the sums are global without it.
      eps: added to both denominators, as formulas of this kind often have it; the paper prints none, and
        nothing here needs it: an empty scope is 0.

    Raises:
      ValueError: an unknown scope.

    >>> g = jnp.array([[.5, .5, 1., 1., 1., 1.], [1., 1., .5, .5, 9., 9.]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> normalise(g, mask)  # gbar = 8 / 10
    Array([[0.625, 0.625, 1.25 , 1.25 , 1.25 , 1.25 ],
           [1.25 , 1.25 , 0.625, 0.625, 0.   , 0.   ]], dtype=float32)
    >>> normalise(g, mask, scope="sequence")  # gbar = 5 / 6 and 3 / 4
    Array([[0.6   , 0.6   , 1.2   , 1.2   , 1.2   , 1.2   ],
           [1.3333, 1.3333, 0.6667, 0.6667, 0.    , 0.    ]], dtype=float32)
    """
    g = masked(g, mask)
    if scope == "none":
        return g
    total = scope_total(g, mask, scope, sequence_ids, axis_name)
    count = scope_count(mask, scope, sequence_ids, axis_name)
    return quotient(g, quotient(total, count + eps) + eps)


def relative_gate(
    cur: Array,
    old: Array,
    mask: Array,
    segments: Array,
    *,
    tau: float | Array = 1.0,
    statistic: str = "signed_mean",
    map: str = "exp",
    floor: float = 0.1,
    scope: Scope = "minibatch",
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
    others: Array | None = None,
) -> Array:
    """The gate up to a factor that `normalise` cancels: ``exp(-tau (|s| - min |s|))``, ``[B, T]``.

    The minimum runs over the scope, so that a drift of thousands of nats cannot underflow the mean to
    zero. Control arms (`opd_jax.method.controls`) are made from this. Arguments are those of `gate`
    and `normalise`, and ``others``, the weights ``[B, T]`` that the gate is going to be multiplied by:
    where they are 0 a token is no part of the minimum.

    >>> cur, old = jnp.array([[-900.], [-901.]]) * jnp.ones((2, 6)), jnp.zeros((2, 6))
    >>> segments = jnp.zeros((2, 6), int)
    >>> relative_gate(cur, old, jnp.ones((2, 6)), segments)  # exp(-901) is 0 in float32, exp(-1) is not
    Array([[1.    , 1.    , 1.    , 1.    , 1.    , 1.    ],
           [0.3679, 0.3679, 0.3679, 0.3679, 0.3679, 0.3679]], dtype=float32)
    """
    size = drift_size(cur, old, mask, segments, statistic)
    counted = mask.astype(bool) if others is None else mask.astype(bool) & (others > 0)
    least = scope_least(size, counted, scope, sequence_ids, axis_name)
    return map_gate(size, least, mask, tau=tau, map=map, floor=floor)


def drift_gate(
    cur: Array,
    old: Array,
    mask: Array,
    segments: Array,
    *,
    tau: float | Array = 1.0,
    statistic: str = "signed_mean",
    map: str = "exp",
    floor: float = 0.1,
    scope: Scope = "minibatch",
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
    eps: float = 0.0,
) -> Array:
    """The drift gate of arXiv 2606.24084: detached weights ``w = sg(g / gbar)``, ``[B, T]``.

    Equal to ``normalise(gate(...))`` up to ``eps``, and safe from underflow: it is made from
    `relative_gate`, so that the least drifted segment always counts, with map ``hard`` as well. Arguments are
    those of `gate` and `normalise`.

    >>> old = jnp.full((2, 6), -3.)
    >>> cur = old + jnp.log(jnp.array([[2., 2., 2., .5, 1., 1.], [1., 1., 2., 2., 9., 9.]]))
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> drift_gate(cur, old, mask, segments)  # g = 1/2 on four tokens, 1 on six: over 8 / 10
    Array([[0.625, 0.625, 1.25 , 1.25 , 1.25 , 1.25 ],
           [1.25 , 1.25 , 0.625, 0.625, 0.   , 0.   ]], dtype=float32)
    """
    g = relative_gate(
        cur,
        old,
        mask,
        segments,
        tau=tau,
        statistic=statistic,
        map=map,
        floor=floor,
        scope=scope,
        sequence_ids=sequence_ids,
        axis_name=axis_name,
    )
    return normalise(g, mask, scope=scope, sequence_ids=sequence_ids, axis_name=axis_name, eps=eps)
