"""The gated objective over micro-batches, exact and in one sweep.

The normaliser runs over the whole optimizer batch, which no micro-batch sees. But g is detached and w is
linear in it, so that

    L = sum(m w base) / sum(m)  =  sum(m g base) / (gbar sum(m))

needs three sums that add up: ``sum(m g base)`` (and its gradient), ``sum(m g)`` and ``sum(m)``. Gates are
kept relative to the least drifted segment seen so far and rescaled when a smaller one comes, as an
online softmax does. Weights that are not linear in g, or need the whole batch to be made (clipped,
shuffled, a target ratio), take a forward-only sweep first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.method.arithmetic import quotient
from opd_jax.method.gates import drift_size, map_gate, masked
from opd_jax.method.scope import scope_least

Array = jax.Array


class Share(NamedTuple):
    """What one micro-batch, or several merged, adds to the objective."""

    weighted: Array  # scalar: sum(m g base), the only part that is differentiated
    total: Array  # scalar: sum(m g)
    tokens: Array  # scalar: sum(m)
    least: Array  # scalar: the |s| that g is relative to


def share(
    cur: Array,
    old: Array,
    mask: Array,
    base: Array,
    segments: Array | None,
    *,
    tau: float | Array = 1.0,
    statistic: str = "signed_mean",
) -> Share:
    """The share of one micro-batch; arguments as in `objective`, map ``exp`` and scope ``minibatch``.

    >>> old = jnp.full((2, 6), -3.)
    >>> cur = old + jnp.log(jnp.array([[2., 2., 1., 1., 1., 1.], [1., 1., 2., 2., 9., 9.]]))
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> base = jnp.array([[8., 8., 4., 4., 4., 4.], [4., 4., 8., 8., 99., 99.]])
    >>> part = share(cur, old, mask, base, segments)
    >>> part.weighted, part.total, part.tokens  # 4 * 8/2 + 6 * 4, 4/2 + 6, 10
    (Array(40., dtype=float32), Array(8., dtype=float32), Array(10., dtype=float32))
    """
    tokens = jnp.sum(mask.astype(bool)).astype(jnp.float32)
    if segments is None:
        return Share(jnp.sum(masked(base, mask)), tokens, tokens, jnp.zeros(()))
    size = drift_size(cur, old, mask, segments, statistic)
    # An empty micro-batch is relative to nothing: infinity, which any other replaces.
    least = jnp.where(tokens > 0, scope_least(size, mask, "microbatch", None, None), jnp.inf)
    g = map_gate(size, least, mask, tau=tau, map="exp", floor=1.0)
    return Share(jnp.sum(g * masked(base, mask)), jnp.sum(g), tokens, least)


def rescale(part: Array, least: Array, onto: Array, tau: float | Array) -> Array:
    """A sum of gates relative to ``least`` as one relative to ``onto <= least``.

    >>> rescale(jnp.ones((2, 6)), jnp.log(8.), jnp.log(2.), 1.0)  # exp(log 2 - log 8)
    Array([[0.25, 0.25, 0.25, 0.25, 0.25, 0.25],
           [0.25, 0.25, 0.25, 0.25, 0.25, 0.25]], dtype=float32)
    """
    # An empty part is relative to infinity, whatever tau, and is 0 as it stands.
    return part * jnp.exp(-tau * jnp.where(jnp.isfinite(least), least - onto, 0.0))


def merge(a: Share, b: Share, tau: float | Array = 1.0) -> Share:
    """Two shares as one. Gradients of ``weighted`` are rescaled by `rescale` in the same way.

    >>> near = Share(*jnp.array([40., 8., 10., 0.]))
    >>> far = Share(*jnp.array([40., 8., 10., jnp.log(2.)]))  # its gates count half
    >>> merge(near, far)[:3]
    (Array(60., dtype=float32), Array(12., dtype=float32), Array(20., dtype=float32))
    """
    least = jnp.minimum(a.least, b.least)
    return Share(
        weighted=rescale(a.weighted, a.least, least, tau) + rescale(b.weighted, b.least, least, tau),
        total=rescale(a.total, a.least, least, tau) + rescale(b.total, b.least, least, tau),
        tokens=a.tokens + b.tokens,
        least=least,
    )


def divisor(whole: Share, eps: float = 0.0) -> Array:
    """What ``weighted``, and its gradient, are divided by: ``gbar sum(m)``, the one division of all.

    1 where there is no token, and nothing to divide. With ``eps``, ``gbar`` is that of `normalise`.

    >>> whole = Share(*jnp.array([40., 8., 10., 0.]))
    >>> divisor(whole), whole.weighted / divisor(whole)  # gbar = .8 times ten tokens
    (Array(8., dtype=float32), Array(5., dtype=float32))
    """
    gbar = quotient(whole.total, whole.tokens + eps) + eps
    by = gbar * whole.tokens
    return jnp.where(by > 0, by, 1.0)
