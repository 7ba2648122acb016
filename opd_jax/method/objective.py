"""The paper on one page: drift-gated on-policy distillation (arXiv 2606.24084).

A student's rollouts are trained on several times; by then the student has drifted from the policy
that sampled them. The drift is measured on the sampled tokens, averaged over segments, and turned
into detached weights of mean one on the loss. Symbols and their order are the paper's; every array
is ``[B, T]``, every log-probability a float32 nat at the sampling temperature.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.method.gates import EPS, Scope, drift, drift_gate
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
    tau: float = 1.0,
    statistic: str = "signed_mean",
    scope: Scope = "minibatch",
    reduction: Reduction = "token_mean",
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
    eps: float = EPS,
) -> Objective:
    """Gate a base loss by drift and average it over the response tokens.

    Args:
      cur: log pi_theta(y_t), the sampled token under the parameters being trained.
      old: log pi_old(y_t), the same under the behaviour policy.
      mask: m, nonzero on response tokens.
      base: an unreduced loss from `opd_jax.method.losses`.
      segments: ids from `opd_jax.method.segments`; None for no gate.
      tau, statistic, scope, eps: of the gate, see `drift_gate`.
      reduction: ``token_mean``, or ``seq_mean_token_mean``, the mean over sequences of their token means.
        The paper's formula is the first; its code base averages micro-batches of one sequence, which
        is the second with ``scope="sequence"``.
      sequence_ids: of packed rows, to tell sequences apart; by default a row is one.
      axis_name: mapped axis to sum over under shard_map or pmap.

    >>> cur, old = jnp.log(jnp.array([[2., 1.]])), jnp.zeros((1, 2))
    >>> objective(cur, old, jnp.ones((1, 2)), jnp.array([[3., 6.]]), jnp.array([[0, 1]])).loss
    Array(5., dtype=float32)
    """
    m = mask.astype(bool)

    # d = cur - old: how far the policy has moved on the token it sampled.
    d = jax.lax.stop_gradient(drift(cur, old, m))

    # s = mean_segment d,  g = exp(-tau |s|),  w = sg(g / gbar): far segments count less, mean one.
    w = (
        m.astype(jnp.float32)
        if segments is None
        else drift_gate(
            cur,
            old,
            m,
            segments,
            tau=tau,
            statistic=statistic,
            scope=scope,
            sequence_ids=sequence_ids,
            axis_name=axis_name,
            eps=eps,
        )
    )

    # L = sum(m w base) / sum(m): the only division by a token count, over the whole batch.
    gated = w * jnp.where(m, base, 0.0)
    if reduction == "token_mean":
        loss = token_mean(gated, m, axis_name)
    elif reduction == "seq_mean_token_mean":
        loss = sequence_mean(gated, m, sequence_ids, axis_name)
    else:
        raise ValueError(f"reduction must be token_mean or seq_mean_token_mean: got {reduction!r}")
    return Objective(loss=loss, drift=d, weights=w)


def token_mean(values: Array, mask: Array, axis_name: str | None = None) -> Array:
    """``sum(m * values) / (sum(m) + eps)`` over the whole batch, all devices of ``axis_name`` included.

    >>> token_mean(jnp.array([[1., 3., 99.]]), jnp.array([[1, 1, 0]]))
    Array(2., dtype=float32)
    """
    return _weighted_mean(values, mask.astype(jnp.float32), axis_name)


def sequence_mean(
    values: Array, mask: Array, sequence_ids: Array | None = None, axis_name: str | None = None
) -> Array:
    """The mean over sequences of the mean over each one's tokens; long ones count no more than short.

    >>> sequence_mean(jnp.array([[1., 3.], [8., 99.]]), jnp.array([[1, 1], [1, 0]]))
    Array(5., dtype=float32)
    """
    length = segment_total(mask.astype(bool), sequence_segments(mask, sequence_ids))
    return _weighted_mean(values, jnp.where(mask.astype(bool), 1.0 / jnp.maximum(length, 1), 0.0), axis_name)


def _weighted_mean(values: Array, share: Array, axis_name: str | None) -> Array:
    total = jnp.sum(share * jnp.where(share > 0, values, 0.0))
    count = jnp.sum(share)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / (count + EPS)
