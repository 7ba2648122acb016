"""Qwen3, as pure functions over a nested dict of stacked arrays.

One layer is written once (`_layer`); training attends over the row (`hidden_states`), sampling over a
cache (`decode`). Layers are scanned, so that compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.model.attention import attention, cache_mask, causal_mask
from opd_jax.model.config import Qwen3Config
from opd_jax.model.sharding import constrain
from opd_jax.types import Params

# Turns a layer's query, key and value into attended values and whatever the layer leaves behind.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


def rotary_angles(positions: jax.Array, config: Qwen3Config) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine ``[B, T, H/2]`` float32 of ``position * theta^(-2i/H)``."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding of ``x [B, T, heads, H]`` in Hugging Face's half-split layout."""
    cos, sin = (part[:, :, None] for part in angles)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def _layer(
    x: jax.Array,
    layer: Params,
    angles: tuple[jax.Array, jax.Array],
    attend: Attend,
    config: Qwen3Config,
) -> tuple[jax.Array, Any]:
    """One pre-norm transformer layer on ``x [B, T, D]``."""
    eps, dtype = config.rms_norm_eps, x.dtype
    layer = jax.tree.map(lambda w: w.astype(dtype), layer)

    h = rms_norm(x, layer["attention_norm"], eps)
    query = jnp.einsum("btd,dnh->btnh", h, layer["query"])
    key = jnp.einsum("btd,dmh->btmh", h, layer["key"])
    value = jnp.einsum("btd,dmh->btmh", h, layer["value"])
    query = rotate(rms_norm(query, layer["query_norm"], eps), angles)
    key = rotate(rms_norm(key, layer["key_norm"], eps), angles)
    query = constrain(query, "batch", "length", "heads", "head_dim")
    key = constrain(key, "batch", "length", "kv_heads", "head_dim")
    value = constrain(value, "batch", "length", "kv_heads", "head_dim")
    attended, left_behind = attend(query, key, value)
    # Contracted over one axis, not two: a CPU then sums a step of decoding in the order of a whole row.
    attended = attended.reshape(*x.shape[:2], -1)
    x = x + jnp.einsum("bti,id->btd", attended, layer["output"].reshape(-1, x.shape[-1]))

    h = rms_norm(x, layer["mlp_norm"], eps)
    gate = jnp.einsum("btd,df->btf", h, layer["gate"])
    up = jnp.einsum("btd,df->btf", h, layer["up"])
    gated = constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp")
    x = x + jnp.einsum("btf,fd->btd", gated, layer["down"])
    return constrain(x, "batch", "length", "width"), left_behind


def _embed(params: Params, tokens: jax.Array, config: Qwen3Config) -> jax.Array:
    x = params["embed"][tokens].astype(config.compute_dtype)
    return constrain(x, "batch", "length", "width")


def hidden_states(
    params: Params,
    tokens: jax.Array,
    config: Qwen3Config,
    *,
    positions: jax.Array | None = None,
    sequence_ids: jax.Array | None = None,
) -> jax.Array:
    """The residual stream after the last layer: what the vocabulary head (`logits`) reads.

    Every layer is recomputed in the backward pass. That bounds memory by one layer's activations, and
    it keeps the forward computation of a gradient program the same as that of a forward-only one: both
    give the same bits, which is why a policy compared with itself shows no drift.

    Args:
      params: parameters as `parameter_table` lays them out.
      tokens: ``[B, T]`` int32.
      config: dimensions.
      positions: ``[B, T]`` int32; 0, 1, ... along the row by default.
      sequence_ids: ``[B, T]`` int32; one sequence per row by default.

    Returns:
      ``[B, T, D]`` in the compute dtype.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if sequence_ids is None:
        sequence_ids = jnp.ones_like(tokens)
    mask, angles = causal_mask(sequence_ids), rotary_angles(positions, config)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple]:
        return attention(query, key, value, mask), ()

    def body(x: jax.Array, layer: Params) -> tuple[jax.Array, tuple]:
        return _layer(x, layer, angles, attend, config)

    x, _ = jax.lax.scan(jax.checkpoint(body), _embed(params, tokens, config), params["layers"])
    return x


def head(params: Params) -> jax.Array:
    """The vocabulary matrix ``[D, V]``, be it stored apart or tied to the embedding."""
    return params["head"] if "head" in params else params["embed"].T


def logits(hidden: jax.Array, params: Params, config: Qwen3Config) -> jax.Array:
    """The vocabulary head, final norm included: ``[..., D] -> [..., V]`` float32."""
    hidden = rms_norm(hidden, params["norm"], config.rms_norm_eps)
    matrix = head(params).astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, matrix, preferred_element_type=jnp.float32)


def forward(
    params: Params,
    tokens: jax.Array,
    config: Qwen3Config,
    *,
    positions: jax.Array | None = None,
    sequence_ids: jax.Array | None = None,
) -> jax.Array:
    """Logits ``[B, T, V]`` float32 of every position; arguments as in `hidden_states`.

    For small vocabularies and tests; training reads log-probabilities through `token_logprobs`, which
    never holds a ``[B, T, V]`` array.
    """
    hidden = hidden_states(params, tokens, config, positions=positions, sequence_ids=sequence_ids)
    return logits(hidden, params, config)


@struct.dataclass
class Cache:
    """Keys and values of the past; slot s of a row holds that row's position s."""

    key: jax.Array  # [L, B, S, M, H]
    value: jax.Array  # [L, B, S, M, H]


def empty_cache(config: Qwen3Config, rows: int, slots: int) -> Cache:
    """A cache for ``rows`` sequences of at most ``slots`` tokens each."""
    shape = (
        config.num_hidden_layers,
        rows,
        slots,
        config.num_key_value_heads,
        config.head_dim,
    )
    zeros = jnp.zeros(shape, config.compute_dtype)
    zeros = constrain(zeros, "layers", "batch", "length", "kv_heads", "head_dim")
    return Cache(zeros, zeros)


def decode(
    params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache, config: Qwen3Config
) -> tuple[jax.Array, Cache]:
    """Read further tokens of each row on top of what the cache holds.

    A padding token may be read too: it writes a slot beyond the row's length, which the row's next
    token overwrites before any position may attend to it.

    Args:
      params: parameters.
      tokens: ``[B, T]`` int32, T = 1 for a step of sampling, the prompt's length for a prefill.
      positions: ``[B, T]`` int32, each below S.
      cache: ``[L, B, S, M, H]`` twice.
      config: dimensions.

    Returns:
      The residual stream ``[B, T, D]`` after the last layer, and the cache with these tokens added.
    """
    mask, angles = cache_mask(positions, cache.key.shape[2]), rotary_angles(positions, config)
    rows = jnp.arange(tokens.shape[0])[:, None]

    # The cache is carried whole and written in place; scanned over, every layer of it would be copied.
    def body(carry: tuple[jax.Array, Cache], at: tuple[Params, jax.Array]) -> tuple[tuple, None]:
        (x, cache), (layer, index) = carry, at

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Cache]:
            keys = cache.key.at[index, rows, positions].set(key)
            values = cache.value.at[index, rows, positions].set(value)
            return attention(query, keys[index], values[index], mask), Cache(keys, values)

        return _layer(x, layer, angles, attend, config), None

    layers = params["layers"], jnp.arange(config.num_hidden_layers)
    (x, cache), _ = jax.lax.scan(body, (_embed(params, tokens, config), cache), layers)
    return x, cache
