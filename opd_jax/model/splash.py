"""Splash attention: the flash kernel that jax ships for TPUs, on rows as they are laid out here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from opd_jax.errors import InputError

LANES = 128  # of a TPU's vector registers: the kernel reads positions this many at a time
LARGEST_BLOCK = 512
RESIDUALS = "splash_attention"  # the name a remat policy saves output and log-sum-exp under


def block_size(length: int) -> int:
    """Positions a tile of scores is wide and high: the largest multiple of 128 up to 512 that divides T.

    The kernel refuses a tile that does not divide the row. 512 x 512 float32 scores are 1 MiB: larger
    tiles read keys less often, but they must fit a core's vector memory next to the query, key and
    value tiles, and above the diagonal of a causal mask more of each is computed for nothing.
    """
    if length % LANES:
        raise InputError(f"splash attention reads {LANES} positions at a time: rows have {length}; pad them")
    return max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if length % size == 0)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sequence_ids: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within equal sequence ids, without ever holding ``[T, T]`` scores.

    Equals `attention` under `causal_mask` up to rounding, padding included: every position may attend
    at least to itself, so that no softmax is empty. Scores and softmax are float32.

    Args:
      query: ``[B, T, N, H]``, bfloat16 or float32; T a multiple of 128.
      key, value: ``[B, T, M, H]``; query head n reads key-value head ``n // (N / M)``.
      sequence_ids: ``[B, T]`` int32.
      interpret: run the kernel as plain JAX, which any device can, slowly.

    Returns:
      ``[B, T, N, H]`` in the dtype of ``query``.
    """
    _, length, heads, width = query.shape
    tile = block_size(length)
    kernel = make_splash_mha(
        # Computed inside the kernel from positions; a mask held in memory would be [T, T].
        MultiHeadMask([CausalMask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        # Not the fused backward kernel: it writes the query's gradient once per block of keys.
        block_sizes=BlockSizes(
            block_q=tile,
            block_kv=tile,
            block_q_dkv=tile,
            block_kv_dkv=tile,
            block_q_dq=tile,
            block_kv_dq=tile,
        ),
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    # The kernel does not scale. In float32, so that a bfloat16 query is rounded once.
    query = (query.astype(jnp.float32) * width**-0.5).astype(query.dtype)
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    attended = jax.vmap(kernel)(query, key, value, SegmentIds(sequence_ids, sequence_ids))
    return jnp.swapaxes(attended, 1, 2)
