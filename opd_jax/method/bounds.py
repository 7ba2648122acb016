"""Keeping weights within bounds, and a gate that always acts; the mean stays one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from opd_jax.method.arithmetic import quotient
from opd_jax.method.gates import ROUNDING, drift_size, masked
from opd_jax.method.scope import Scope, scope_count, scope_least, scope_total

Array = jax.Array

# A bracket of logarithms around 0 that holds the inverse of any mean in float32, were it of one in a million
# tokens, and its halvings: past 40 there is nothing to halve.
_WIDEST = 110.0
_HALVINGS = 40
# Nats; below it no two log-probs of float32 differ, and its inverse would overflow.
SMALLEST_DRIFT = 1e-20


def residual(w: Array, mask: Array, share: float | Array) -> Array:
    """Residual mix ``(1 - share) + share * w``, ``[B, T]``; 0 off the mask. Mean one if ``w`` has it.

    Args:
      w: ``[B, T]`` weights of mean one.
      mask: ``[B, T]``, nonzero on response tokens.
      share: how much of the gate is kept; 1 is the gate, 0 no gate.

    >>> w = jnp.array([[.5, .5, .5, 1.5, 1.5, 1.5], [1., 1., 0., 2., 9., 9.]])
    >>> residual(w, jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]), 0.5)
    Array([[0.75, 0.75, 0.75, 1.25, 1.25, 1.25],
           [1.  , 1.  , 0.5 , 1.5 , 0.  , 0.  ]], dtype=float32)
    """
    return masked(1.0 - share + share * w, mask)


def clip_weights(
    w: Array,
    mask: Array,
    low: float,
    high: float,
    *,
    scope: Scope = "minibatch",
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Weights clipped to ``[low, high]`` whose mean is one again: ``clip(c * w, low, high)``.

    The factor c is found by bisection, since clipping alone would move the mean. With scope ``none``
    there is no mean to keep and c is 1. Where too many weights are 0 for a mean of one within the
    bounds, the mean falls short.

    Args:
      w: ``[B, T]`` nonnegative weights.
      mask: ``[B, T]``, nonzero on response tokens.
      low, high: bounds, ``0 <= low <= 1 <= high``.
      scope, sequence_ids, axis_name: over what the mean is one, as in `normalise`.

    Raises:
      ValueError: the bounds do not enclose 1.

    >>> w = jnp.array([[0., 0., 1., 1., 1., 1.], [1., 1., 1., 1., 2., 2.]])
    >>> clip_weights(w, jnp.ones((2, 6)), 0.5, 2.0)  # two zeros take 1 of 12; 8 c + 2 * 2 c = 11
    Array([[0.5   , 0.5   , 0.9167, 0.9167, 0.9167, 0.9167],
           [0.9167, 0.9167, 0.9167, 0.9167, 1.8333, 1.8333]], dtype=float32)
    """
    if not 0 <= low <= 1 <= high:
        raise ValueError(
            f"bounds must enclose the mean of one: got {low} and {high}; use 0 <= low <= 1 <= high"
        )
    w = masked(w, mask)
    if scope == "none":
        return masked(jnp.clip(w, low, high), mask)
    count = scope_count(mask, scope, sequence_ids, axis_name)

    # Of logarithms, so that c may be as large as the smallest weight calls for.
    log_w = jnp.where(w > 0, jnp.log(jnp.where(w > 0, w, 1.0)), -jnp.inf)

    def clipped(log_c: Array) -> Array:
        return masked(jnp.clip(jnp.exp(log_c + log_w), low, high), mask)

    def excess(log_c: Array) -> Array:
        return scope_total(clipped(log_c), mask, scope, sequence_ids, axis_name) - count

    middle = 0.0 * count  # of the counts, as under shard_map a bracket must vary as they do
    return clipped(_bisect(excess, middle - _WIDEST, middle + _WIDEST))


def tau_for_ratio(
    cur: Array,
    old: Array,
    mask: Array,
    segments: Array,
    target: float,
    *,
    statistic: str = "signed_mean",
    axis_name: str | None = None,
) -> Array:
    """The tau at which the exponential gate reaches a target effective token ratio: it always acts.

    ``(sum g)^2 / (N sum g^2)`` falls as tau grows, from 1 at tau = 0 towards the share of tokens in
    the least drifted segments, so bisection finds the one tau between. Where drift is the same
    everywhere no tau acts and the weights stay one; a target below what can be reached gives a tau
    that is merely large.

    Args:
      cur, old, mask, segments, statistic, axis_name: as in `drift_gate`, over the whole minibatch.
      target: effective token ratio in (0, 1].

    Returns:
      Scalar tau per nat, detached.

    Raises:
      ValueError: ``target`` lies outside (0, 1].

    >>> old, segments = jnp.zeros((2, 6)), jnp.zeros((2, 6), int)
    >>> cur = old.at[1].set(jnp.log(3.))
    >>> tau_for_ratio(cur, old, jnp.ones((2, 6)), segments, 0.8)  # g = 1, 1/3: (6 + 2)^2 / (12 (6 + 6/9))
    Array(1., dtype=float32)
    """
    if not 0 < target <= 1:
        raise ValueError(f"an effective token ratio lies in (0, 1]: got a target of {target}; lower it")
    size = drift_size(cur, old, mask, segments, statistic)
    over: tuple[Scope, None, str | None] = ("minibatch", None, axis_name)
    least = scope_least(size, mask, *over)
    beyond = size - least
    count = scope_count(mask, *over)
    mean = quotient(scope_total(beyond, mask, *over), count)
    # Rounding is no drift: a tau that told apart what is equal would be a gate of noise.
    drifts = mean > jnp.maximum(ROUNDING * least, SMALLEST_DRIFT)
    beyond = beyond / jnp.where(drifts, mean, 1.0)

    def excess(log_tau: Array) -> Array:  # in units of 1 / mean
        g = jnp.exp(-jnp.exp(log_tau) * beyond)
        total, squares = scope_total(g, mask, *over), scope_total(jnp.square(g), mask, *over)
        return target * count * squares - jnp.square(total)

    # 1 / mean is where the gate acts on typical drift, 30 e-folds around it on any.
    log_tau = _bisect(excess, jnp.full_like(mean, -30.0), jnp.full_like(mean, 30.0))
    return jnp.where(drifts, jnp.exp(log_tau) / mean, 0.0)


def _bisect(excess: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Where the growing function ``excess`` crosses zero between ``low`` and ``high``."""

    def halve(bracket: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bracket
        middle = (low + high) / 2
        above = excess(middle) > 0
        return (jnp.where(above, low, middle), jnp.where(above, middle, high)), None

    (low, high), _ = jax.lax.scan(halve, (low, high), length=_HALVINGS)
    return (low + high) / 2
