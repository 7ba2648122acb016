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
from typing import Literal

import jax
import jax.numpy as jnp

from opd_jax.method.segments import segment_largest, segment_total, sequence_segments

Array = jax.Array
Scope = Literal["none", "sequence", "microbatch", "minibatch"]

EPS = 1e-8


def drift(cur: Array, old: Array, mask: Array) -> Array:
    """Drift ``d = cur - old`` of the sampled tokens, ``[B, T]`` nats; 0 off the mask.

    >>> drift(jnp.array([[-1., -3.]]), jnp.array([[-2., jnp.nan]]), jnp.array([[1, 0]]))
    Array([[1., 0.]], dtype=float32)
    """
    mask = mask.astype(bool)
    return jnp.where(mask, cur, 0.0) - jnp.where(mask, old, 0.0)


def _mean(d: Array, mask: Array, segments: Array) -> Array:
    """Mean of ``d`` over each token's segment, valid tokens only."""
    inside = mask.astype(bool) & (segments >= 0)
    ids = jnp.where(inside, segments, -1)
    count = segment_total(inside, ids)
    return segment_total(d, ids) / jnp.maximum(count, 1)


# s of a segment, from the drift of its tokens. The paper uses the signed mean; it names the others
# among its limitations.
STATISTICS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "signed_mean": _mean,
    "mean_abs": lambda d, mask, segments: _mean(jnp.abs(d), mask, segments),
    "rms": lambda d, mask, segments: jnp.sqrt(_mean(jnp.square(d), mask, segments)),
    "positive": lambda d, mask, segments: _mean(jnp.maximum(d, 0.0), mask, segments),
    "negative": lambda d, mask, segments: _mean(jnp.minimum(d, 0.0), mask, segments),
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

    >>> d, ids = jnp.array([[1., -1., 4.]]), jnp.array([[0, 0, 1]])
    >>> segment_score(d, jnp.ones((1, 3)), ids)
    Array([[0., 0., 4.]], dtype=float32)
    """
    if statistic not in STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}: got {statistic!r}")
    return STATISTICS[statistic](d, mask, segments)


def gate(
    cur: Array,
    old: Array,
    mask: Array,
    segments: Array,
    *,
    tau: float = 1.0,
    statistic: str = "signed_mean",
) -> Array:
    """Gate ``g = exp(-tau |s|)`` of each token's segment, ``[B, T]`` in (0, 1]; 0 off the mask.

    Args:
      cur: ``[B, T]`` log-prob of the sampled token under the parameters being trained, nats.
      old: ``[B, T]`` the same under the behaviour policy.
      mask: ``[B, T]``, nonzero on response tokens.
      segments: ids ``[B, T]`` from `opd_jax.method.segments`.
      tau: sharpness, 1 in the paper.
      statistic: a key of `STATISTICS`.

    >>> old, ids = jnp.zeros((1, 3)), jnp.array([[0, 0, 1]])
    >>> gate(jnp.log(jnp.array([[2., 2., 1.]])), old, jnp.ones((1, 3)), ids).round(3)
    Array([[0.5, 0.5, 1. ]], dtype=float32)
    """
    return jnp.where(mask.astype(bool), jnp.exp(log_gate(cur, old, mask, segments, tau, statistic)), 0.0)


def log_gate(cur: Array, old: Array, mask: Array, segments: Array, tau: float, statistic: str) -> Array:
    """``-tau |s|``, ``[B, T]``: the gate before the exponential, which may underflow."""
    # The gate weighs the loss and is no part of it: detached here, once, for every way of using it.
    d = drift(jax.lax.stop_gradient(cur), jax.lax.stop_gradient(old), mask)
    return -tau * jnp.abs(segment_score(d, mask, segments, statistic=statistic))


def normalise(
    g: Array,
    mask: Array,
    *,
    scope: Scope = "minibatch",
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
    eps: float = EPS,
) -> Array:
    """Weights ``w = g / (gbar + eps)`` with ``gbar`` the mean of ``g`` over the scope's valid tokens.

    Within its scope ``sum(m * w) = sum(m)``. The paper does not print the scope; ``minibatch``, the
    whole optimizer batch, is our default. ``sequence`` is what a gate written into a loop over
    single-sequence micro-batches does.

    Args:
      g: ``[B, T]``, nonnegative.
      mask: ``[B, T]``, nonzero on response tokens.
      scope: ``none`` returns ``g``; ``sequence`` normalises each sequence; ``microbatch`` the arrays
        given here; ``minibatch`` these and, under shard_map or pmap, all devices of ``axis_name``.
      sequence_ids: ``[B, T]`` int32 of packed rows, for ``sequence``; by default a row is one.
      axis_name: mapped axis to sum over; under jit the sums are global without it.
      eps: keeps an empty scope finite; the paper prints none.

    Raises:
      ValueError: an unknown scope.

    >>> normalise(jnp.array([[1., 3., 9.]]), jnp.array([[1, 1, 0]]))
    Array([[0.5, 1.5, 0. ]], dtype=float32)
    """
    mask = mask.astype(bool)
    g = jnp.where(mask, g, 0.0)
    if scope == "none":
        return g
    total, count = _scope_sums(g, mask, scope, sequence_ids, axis_name)
    return g / (total / (count + eps) + eps)


def _scope_sums(
    g: Array, mask: Array, scope: str, sequence_ids: Array | None, axis_name: str | None
) -> tuple[Array, Array]:
    """Sum of ``g`` and number of valid tokens over the scope, broadcastable to ``[B, T]``."""
    if scope == "sequence":
        ids = sequence_segments(mask, sequence_ids)
        return segment_total(g, ids), segment_total(mask, ids)
    if scope not in ("microbatch", "minibatch"):
        raise ValueError(f"scope must be none, sequence, microbatch or minibatch: got {scope!r}")
    total, count = jnp.sum(g), jnp.sum(mask)
    if axis_name is not None and scope == "minibatch":
        total, count = jax.lax.psum((total, count), axis_name)
    return total, count


def drift_gate(
    cur: Array,
    old: Array,
    mask: Array,
    segments: Array,
    *,
    tau: float = 1.0,
    statistic: str = "signed_mean",
    scope: Scope = "minibatch",
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
    eps: float = EPS,
) -> Array:
    """The drift gate of arXiv 2606.24084: detached weights ``w = sg(g / gbar)``, ``[B, T]``.

    Equal to ``normalise(gate(...))`` up to eps, but exponentiates ``-tau (|s| - min |s|)`` with the
    minimum over the scope: the normaliser cancels the shift, and a drift of thousands of nats cannot
    underflow the mean to zero. Arguments are those of `gate` and `normalise`.

    >>> old, ids = jnp.zeros((1, 3)), jnp.array([[0, 0, 1]])
    >>> drift_gate(jnp.log(jnp.array([[2., 2., 1.]])), old, jnp.ones((1, 3)), ids)
    Array([[0.75, 0.75, 1.5 ]], dtype=float32)
    """
    inside = mask.astype(bool)
    log_g = log_gate(cur, old, mask, segments, tau, statistic)
    if scope != "none":
        log_g -= _scope_max(log_g, inside, scope, sequence_ids, axis_name)
    return normalise(
        jnp.exp(jnp.where(inside, log_g, 0.0)),
        mask,
        scope=scope,
        sequence_ids=sequence_ids,
        axis_name=axis_name,
        eps=eps,
    )


def _scope_max(
    log_g: Array, mask: Array, scope: str, sequence_ids: Array | None, axis_name: str | None
) -> Array:
    """Largest ``log_g`` of the scope's valid tokens, finite even where there are none."""
    if scope == "sequence":
        return segment_largest(log_g, sequence_segments(mask, sequence_ids))
    largest = jnp.max(jnp.where(mask, log_g, -jnp.inf))
    if axis_name is not None and scope == "minibatch":
        largest = jax.lax.pmax(largest, axis_name)
    return jnp.where(jnp.isfinite(largest), largest, 0.0)
