"""Sums, extremes and quantiles over a scope: over which tokens a weight's mean is one.

``none``         nothing is normalised
``sequence``     each sequence by itself
``microbatch``   the arrays given
``minibatch``    these and, under shard_map or pmap, those of all devices of ``axis_name``; under jit
                 arrays are global already
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from opd_jax.method.arithmetic import wide
from opd_jax.method.segments import segment_largest, sequence_segments, sequence_total

Array = jax.Array
Scope = Literal["none", "sequence", "microbatch", "minibatch"]


def scope_total(
    values: Array, mask: Array, scope: Scope, sequence_ids: Array | None, axis_name: str | None
) -> Array:
    """Sum of the masked ``values`` over the scope, broadcastable to ``[B, T]``.

    Raises:
      ValueError: an unknown scope, or ``none``, which has no sums.

    >>> x = jnp.array([[1., 2., 3., 4., 5., 6.], [1., 1., 1., 1., jnp.nan, jnp.nan]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> scope_total(x, mask, "minibatch", None, None)  # 21 + 4
    Array(25., dtype=float32)
    >>> scope_total(x, mask, "sequence", None, None)
    Array([[21., 21., 21., 21., 21., 21.],
           [ 4.,  4.,  4.,  4.,  0.,  0.]], dtype=float32)
    """
    mask, values = mask.astype(bool), wide(values)
    if scope == "sequence":
        return sequence_total(values, mask, sequence_ids)
    if scope not in ("microbatch", "minibatch"):
        raise ValueError(f"scope must be none, sequence, microbatch or minibatch: got {scope!r}")
    total = jnp.sum(jnp.where(mask, values, 0.0))
    if axis_name is not None and scope == "minibatch":
        total = jax.lax.psum(total, axis_name)
    return total


def scope_count(mask: Array, scope: Scope, sequence_ids: Array | None, axis_name: str | None) -> Array:
    """Number of valid tokens of the scope as float32, broadcastable to ``[B, T]``.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> scope_count(mask, "minibatch", None, None)
    Array(10., dtype=float32)
    >>> scope_count(mask, "sequence", None, None)
    Array([[6., 6., 6., 6., 6., 6.],
           [4., 4., 4., 4., 0., 0.]], dtype=float32)
    """
    return scope_total(mask.astype(bool).astype(jnp.float32), mask, scope, sequence_ids, axis_name)


def scope_least(
    values: Array, mask: Array, scope: Scope, sequence_ids: Array | None, axis_name: str | None
) -> Array:
    """Smallest of the masked ``values`` over the scope; 0 where there are none, and for scope ``none``.

    >>> x = jnp.array([[3., 2., 3., 4., 5., 6.], [9., 8., 7., 8., -1., jnp.nan]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> scope_least(x, mask, "minibatch", None, None)
    Array(2., dtype=float32)
    >>> scope_least(x, mask, "sequence", None, None)
    Array([[2., 2., 2., 2., 2., 2.],
           [7., 7., 7., 7., 0., 0.]], dtype=float32)
    """
    mask = mask.astype(bool)
    if scope == "none":
        return jnp.zeros(())
    if scope == "sequence":
        return jnp.where(mask, -segment_largest(-values, sequence_segments(mask, sequence_ids)), 0.0)
    if scope not in ("microbatch", "minibatch"):
        raise ValueError(f"scope must be none, sequence, microbatch or minibatch: got {scope!r}")
    least = jnp.min(jnp.where(mask, values, jnp.inf))
    if axis_name is not None and scope == "minibatch":
        least = jax.lax.pmin(least, axis_name)
    return jnp.where(jnp.isfinite(least), least, 0.0)


def masked_quantile(x: Array, mask: Array, q: float, axis_name: str | None = None) -> Array:
    """Quantile of the valid values of the whole batch, linear between neighbours; inf if there are none.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> x = jnp.array([[1., 2., 3., 4., 5., 6.], [7., 8., 9., 10., 99., 99.]])
    >>> masked_quantile(x, mask, 0.5)  # halfway between the fifth and the sixth of ten
    Array(5.5, dtype=float32)
    """
    values = jnp.where(mask.astype(bool), x, jnp.inf).ravel()
    if axis_name is not None:
        values = jax.lax.all_gather(values, axis_name, tiled=True)
    values = jnp.sort(values)
    place = q * (jnp.sum(jnp.isfinite(values)) - 1).astype(jnp.float32)
    below = jnp.maximum(jnp.floor(place), 0).astype(jnp.int32)
    low, high = values[below], values[below + 1]  # past the end the last, of which there is no share
    share = place - below
    return jnp.where(share > 0, low + share * (jnp.where(share > 0, high, low) - low), low)
