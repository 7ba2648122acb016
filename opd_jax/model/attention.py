"""Masked grouped-query attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_mask(sequence_ids: jax.Array) -> jax.Array:
    """Which positions may be attended to: earlier ones of the same sequence.

    Args:
      sequence_ids: ``[B, T]`` int32; positions attend only within equal ids.

    Returns:
      ``[B, 1, T, T]`` bool, query position before key position. Padding (id 0) attends to padding,
      which keeps its rows finite; nothing reads them.
    """
    t = sequence_ids.shape[1]
    causal = jnp.tril(jnp.ones((t, t), bool))
    same = sequence_ids[:, :, None] == sequence_ids[:, None, :]
    return (same & causal)[:, None]


def cache_mask(positions: jax.Array, slots: int) -> jax.Array:
    """Which cache slots may be attended to: slot s holds position s, so those up to one's own.

    Args:
      positions: ``[B, T]`` int32 of the queries.
      slots: S, the length of the cache.

    Returns:
      ``[B, 1, T, S]`` bool.
    """
    return (jnp.arange(slots) <= positions[:, :, None])[:, None]


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with float32 scores, scaled by ``1 / sqrt(H)``.

    Args:
      query: ``[B, T, N, H]``.
      key, value: ``[B, S, M, H]``; query head n reads key-value head ``n // (N / M)``.
      mask: ``[B, 1, T, S]`` bool, true where attention is allowed.

    Returns:
      ``[B, T, N, H]`` in the dtype of ``query``.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")
