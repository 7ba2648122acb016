"""Two rules of arithmetic that all of the method keeps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def wide(x: Any) -> Array:
    """``x`` in float32, or wider if it is: bfloat16 has no digits for a drift, let alone for its sums.

    >>> wide(jnp.ones((2, 6), jnp.bfloat16)).dtype, wide(jnp.ones((2, 6), int)).dtype
    (dtype('float32'), dtype('float32'))
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def quotient(total: Array, count: Array) -> Array:
    """``total / count``, and 0 where there is nothing to divide by, forward and backward.

    >>> quotient(jnp.array([6., 0.]), jnp.array([4., 0.]))
    Array([1.5, 0. ], dtype=float32)
    """
    some = count > 0
    return jnp.where(some, total / jnp.where(some, count, 1), 0.0)
