"""The paper on one page: drift-gated on-policy distillation (arXiv 2606.24084).

A student's rollouts are trained on several times; by then the student has drifted from the policy
that sampled them. The drift is measured on the sampled tokens, averaged over segments, and turned
into detached weights of mean one on the loss. Symbols and their order are the paper's; every array
is ``[B, T]``, every log-probability a float32 nat at the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.method.arithmetic import quotient
from opd_jax.method.gates import drift, map_gate, masked, normalise, segment_score
from opd_jax.method.scope import Scope, scope_least, scope_total
from opd_jax.method.segments import segment_total, sequence_segments

Array = jax.Array
Reduction = Literal["token_mean", "seq_mean_token_mean"]


class Objective(NamedTuple):
    """The value to differentiate, and what went into it."""

    loss: Array  # scalar: sum(m w base) / sum(m)
    drift: Array  # [B, T]: d, detached; 0 off the mask
    weights: Array  # [B, T]: w, detached; 0 off the mask


def objective(
    cur: Array,
    old: Array,
    mask: Array,
    base: Array,
    segments: Array | None,
    *,
    reduction: Reduction = "token_mean",
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
    **gate: Any,
) -> Objective:
    """Gate a base loss by drift and average it over the response tokens.

    Args:
      cur: log pi_theta(y_t), the sampled token under the parameters being trained.
      old: log pi_old(y_t), the same under the behaviour policy.
      mask: m, nonzero on response tokens.
      base: an unreduced loss from `opd_jax.method.losses`.
      segments: ids from `opd_jax.method.segments`; None for no gate.
      reduction: ``token_mean``, or ``seq_mean_token_mean``, the mean over sequences of their token means.
        The paper's formula is the first; its code base averages micro-batches of one sequence, which
        is the second with ``scope="sequence"``.
      sequence_ids: of packed rows, to tell sequences apart; by default a row is one.
      axis_name: mapped axis to sum over under shard_map or pmap. The loss is then one number on all
        devices, and its gradient is right after ``jax.lax.pmean`` over the axis.
      gate: tau, statistic, map, floor, scope, eps, reweigh, others and bound of `drift_weights`.

    >>> old = jnp.full((2, 6), -3.)
    >>> cur = old + jnp.log(jnp.array([[2., 2., 1., 1., 1., 1.], [1., 1., 2., 2., 9., 9.]]))
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> base = jnp.array([[8., 8., 4., 4., 4., 4.], [4., 4., 8., 8., 99., 99.]])
    >>> objective(cur, old, mask, base, segments).loss  # w = 5/8 or 5/4: every token costs 5
    Array(5., dtype=float32)
    >>> objective(cur, old, mask, base, None).loss  # 56 / 10
    Array(5.6, dtype=float32)
    """
    d, w = drift_weights(cur, old, mask, segments, sequence_ids=sequence_ids, axis_name=axis_name, **gate)
    # L = sum(m w base) / sum(m): the only division by a token count, over the whole batch.
    loss = weighted_loss(base, w, mask, reduction=reduction, sequence_ids=sequence_ids, axis_name=axis_name)
    return Objective(loss=loss, drift=d, weights=w)


def drift_weights(
    cur: Array,
    old: Array,
    mask: Array,
    segments: Array | None,
    *,
    tau: float | Array = 1.0,
    statistic: str = "signed_mean",
    map: str = "exp",
    floor: float = 0.1,
    scope: Scope = "minibatch",
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
    eps: float = 0.0,
    reweigh: Callable[[Array], Array] | None = None,
    others: Array | None = None,
    bound: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array]:
    """Drift ``d`` and weights ``w`` of a batch, ``[B, T]`` each, detached and 0 off the mask.

    Args:
      cur, old, mask, segments, sequence_ids, axis_name: as in `objective`.
      tau, statistic, map, floor: of the gate, see `gate`.
      scope, eps: of the normaliser, see `normalise`.
      reweigh: g to another g before the normaliser: a control arm (`opd_jax.method.controls`).
      others: ``[B, T]`` further weights, detached, that multiply g before the normaliser (`combine`).
      bound: w to w after it: `clip_weights`, `residual`.

    >>> old = jnp.full((2, 6), -3.)
    >>> cur = old + jnp.log(jnp.array([[2., 2., 1., 1., 1., 1.], [1., 1., 2., 2., 9., 9.]]))
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> drift_weights(cur, old, mask, segments)[1]  # 1/2 on four tokens, 1 on six: over 8 / 10
    Array([[0.625, 0.625, 1.25 , 1.25 , 1.25 , 1.25 ],
           [1.25 , 1.25 , 0.625, 0.625, 0.   , 0.   ]], dtype=float32)
    """
    m = mask.astype(bool)

    # d = cur - old: how far the policy has moved on the token it sampled.
    d = jax.lax.stop_gradient(drift(cur, old, m))

    # s = mean of d over the segment,  g = exp(-tau |s|): segments that drifted far count less.
    h = m.astype(jnp.float32) if others is None else masked(others, m)
    g = m.astype(jnp.float32)
    if segments is not None:
        s = segment_score(d, m, segments, statistic=statistic)
        # g is relative to the least |s|, which gbar cancels: of those that will count in the scope. A control
        # hands the gate of any segment to any, so that all of the batch are among them.
        counted, reach = (m & (h > 0), scope) if reweigh is None else (m, _crossing(scope))
        least = scope_least(jnp.abs(s), counted, reach, sequence_ids, axis_name)
        g = map_gate(jnp.abs(s), least, m, tau=tau, map=map, floor=floor)
    if reweigh is None:
        g = g * h
    else:
        g = reweigh(g) * h
        if scope != "none":
            # Where a control left none that float32 tells from 0 all are alike, and what is alike weighs one.
            g = jnp.where(scope_total(g, m, scope, sequence_ids, axis_name) > 0, g, h)

    # w = sg(g / gbar): mean one.
    w = normalise(g, m, scope=scope, sequence_ids=sequence_ids, axis_name=axis_name, eps=eps)
    return d, w if bound is None else bound(w)


def _crossing(scope: Scope) -> Scope:
    return "minibatch" if scope == "sequence" else scope


def weighted_loss(
    base: Array,
    w: Array,
    mask: Array,
    *,
    reduction: Reduction = "token_mean",
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """A base loss under any weights, reduced to a scalar; arguments as in `objective`.

    >>> base = jnp.array([[8., 8., 4., 4., 4., 4.], [4., 4., 8., 8., 99., 99.]])
    >>> w = jnp.array([[.5, .5, .5, .5, .5, .5], [2., 2., 1., 1., 0., 0.]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> weighted_loss(base, w, mask)  # (16 + 32) / 10
    Array(4.8, dtype=float32)
    >>> weighted_loss(base, w, mask, reduction="seq_mean_token_mean")  # (16 / 6 + 32 / 4) / 2
    Array(5.3333, dtype=float32)
    """
    share = token_share(mask, reduction=reduction, sequence_ids=sequence_ids)
    total, count = jnp.sum(share * masked(w, mask) * masked(base, mask)), jnp.sum(share)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return quotient(total, count)


def token_share(
    mask: Array, *, reduction: Reduction = "token_mean", sequence_ids: Array | None = None
) -> Array:
    """How much a token counts in the mean, ``[B, T]``: 1, or 1 over the length of its sequence.

    Sums of it are what `weighted_loss` divides by: tokens, or sequences.

    Raises:
      ValueError: an unknown reduction.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
    >>> token_share(mask, reduction="seq_mean_token_mean")
    Array([[0.2 , 0.2 , 0.2 , 0.2 , 0.2 , 0.  ],
           [0.25, 0.25, 0.25, 0.25, 0.  , 0.  ]], dtype=float32)
    """
    m = mask.astype(bool)
    if reduction == "token_mean":
        return m.astype(jnp.float32)
    if reduction == "seq_mean_token_mean":
        length = segment_total(m, sequence_segments(m, sequence_ids))
        return masked(1.0 / jnp.maximum(length, 1), m).astype(jnp.float32)
    raise ValueError(f"reduction must be token_mean or seq_mean_token_mean: got {reduction!r}")


def token_mean(values: Array, mask: Array, axis_name: str | None = None) -> Array:
    """``sum(m * values) / sum(m)`` over the whole batch, all devices of ``axis_name`` included.

    >>> base = jnp.array([[8., 8., 4., 4., 4., 4.], [4., 4., 8., 8., 99., 99.]])
    >>> token_mean(base, jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]))  # 56 / 10
    Array(5.6, dtype=float32)
    """
    return weighted_loss(values, jnp.ones(mask.shape), mask, axis_name=axis_name)
