"""Masked grouped-query attention: plain, or by the fused kernel of a GPU or a TPU."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.model.sharding import in_mesh, partition


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


class Blocks(NamedTuple):
    """The slots of a cache that are attended to: the first ``number`` blocks of ``size``."""

    size: int
    number: int

    @property
    def slots(self) -> int:
        return self.size * self.number


def block_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, blocks: Blocks
) -> jax.Array:
    """`attention` over the blocks of a cache, whose bits more blocks than are needed do not change.

    Each block's softmax has its own maximum, and the blocks are added up one after the other (Milakov and
    Gimelshein, arXiv 1805.02867): one in which nothing may be attended to adds exact zeros.

    Args:
      query: ``[B, T, N, H]``.
      key, value: ``[B, M, S, H]`` of S = ``size * number`` slots, heads first as a cache lies.
      mask: ``[B, 1, T, S]`` bool; every query may attend somewhere.
      blocks: how the slots are divided.

    Returns:
      ``[B, T, N, H]`` in the dtype of ``query``.
    """
    rows, length, heads, width = query.shape
    of_cache = (*key.shape[:2], blocks.number, blocks.size, width)
    key, value = key.reshape(of_cache), value.reshape(of_cache)
    query = query.reshape(rows, length, key.shape[1], -1, width)
    # A product for each block: one over all of them would be added up in an order that their number decides.
    query = jnp.broadcast_to(query[:, None], (rows, blocks.number, *query.shape[1:]))
    scores = jnp.einsum("bktmgh,bmksh->bmktgs", query, key, preferred_element_type=jnp.float32)
    # [B, 1, T, S] -> [B, 1, K, T, 1, s]
    allowed = mask.reshape(rows, 1, length, blocks.number, blocks.size).swapaxes(2, 3)[..., None, :]
    scores = jnp.where(allowed, scores / math.sqrt(width), jnp.finfo(jnp.float32).min)
    peak = scores.max(-1, keepdims=True)
    shares = jnp.exp(scores - peak)
    of_block = jnp.exp(peak - peak.max(2, keepdims=True))
    read = jnp.einsum(
        "bmktgs,bmksh->bmktgh", shares.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    total, attended = (
        functools.reduce(operator.add, (x[:, :, k] for k in range(blocks.number)))
        for x in (of_block * shares.sum(-1, keepdims=True), of_block * read)
    )
    attended = (attended / total).transpose(0, 2, 1, 3, 4)
    return attended.reshape(rows, length, heads, width).astype(query.dtype)


def row_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, sequence_ids: jax.Array, kernel: str
) -> jax.Array:
    """Causal attention over whole rows, within equal sequence ids, by the kernel of that name.

    Under the mesh in context, "cudnn" and "splash" run shard by shard over the rules' batch and head
    axes: XLA cannot split a kernel. They hold no ``[T, T]`` array, neither forward nor backward.

    Args:
      query: ``[B, T, N, H]``.
      key, value: ``[B, T, M, H]``; query head n reads key-value head ``n // (N / M)``.
      sequence_ids: ``[B, T]`` int32; padding has id 0.
      kernel: what `choose_kernel` returned: "xla", "cudnn" or "splash".

    Returns:
      ``[B, T, N, H]`` in the dtype of ``query``. Padding is finite whatever the kernel; nothing reads it.
    """
    if kernel == "xla":
        return attention(query, key, value, causal_mask(sequence_ids))
    if kernel == "cudnn":
        return _per_shard(cudnn_attention)(query, key, value, sequence_ids)
    if kernel == "splash":
        # Imported where it is used: it brings Pallas along, which other platforms never need.
        from opd_jax.model.splash import splash_attention

        return _per_shard(splash_attention)(query, key, value, sequence_ids)
    raise ValueError(f"kernel must be xla, cudnn or splash: got {kernel!r}")


def _per_shard(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``kernel`` over the shards of the mesh in context; as it stands where `constrain` does nothing."""
    if not in_mesh():
        return kernel
    queries = partition("batch", "length", "heads", "head_dim")
    keys = partition("batch", "length", "kv_heads", "head_dim")
    return jax.shard_map(
        kernel,
        in_specs=(queries, keys, keys, partition("batch", "length")),
        out_specs=queries,
        check_vma=False,  # what a Pallas kernel writes does not say over which axes it varies
    )


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array, sequence_ids: jax.Array) -> jax.Array:
    """`row_attention` by cuDNN, for rows that hold one sequence each, padded on the right.

    cuDNN is told a length per row. Lengths are given even where rows are full, because without them its
    backward pass has returned NaN at some values of T (NVIDIA/cudnn-frontend issue 160), and a row that
    is all padding counts as full, because length 0 gives NaN before cuDNN 9.25 (issue 943).

    Args:
      query: ``[B, T, N, H]``, bfloat16 or float16.
      key, value: ``[B, T, M, H]``.
      sequence_ids: ``[B, T]`` int32.

    Returns:
      ``[B, T, N, H]``, zero on padding. NaN on a row that holds more than one sequence, or whose padding
      is not on the right: it would be attended across, and what ids say is known only when they arrive.
    """
    first = sequence_ids[:, :1]
    lengths = jnp.sum(sequence_ids == first, axis=1, dtype=jnp.int32)
    inside = jnp.arange(sequence_ids.shape[1]) < lengths[:, None]
    # The log-sum-exp is asked for although nothing reads it: a gradient program needs it, and so a
    # forward-only program runs the same cuDNN graph. A policy compared with itself shows no drift.
    attended, _ = jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
        return_residual=True,
    )
    one_sequence = jnp.all(sequence_ids == jnp.where(inside, first, 0), axis=1)
    attended = jnp.where(inside[:, :, None, None], attended, 0)
    return jnp.where(one_sequence[:, None, None, None], attended, jnp.nan)
