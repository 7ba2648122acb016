"""Qwen3, as pure functions over a nested dict of stacked arrays.

One layer is written once (`_layer`); training attends over the row (`hidden_states`), sampling over a
cache (`decode`). Layers are scanned, so that compile time does not grow with depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from opd_jax.errors import InputError
from opd_jax.model.attention import Blocks, attention, block_attention, cache_mask, row_attention
from opd_jax.model.config import Qwen3Config
from opd_jax.model.lora import lora_delta
from opd_jax.model.moe import Routing, experts
from opd_jax.model.precision import exact_products
from opd_jax.model.rope import rotary_angles, rotate
from opd_jax.model.sharding import RULES, can_split, constrain, partition
from opd_jax.types import Params

# Turns a layer's query, key and value into attended values and whatever the layer leaves behind.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


def _layer(
    x: jax.Array,
    layer: Params,
    angles: tuple[jax.Array, jax.Array],
    attend: Attend,
    valid: jax.Array,
    config: Qwen3Config,
) -> tuple[jax.Array, Any, Routing | None]:
    """One pre-norm transformer layer on ``x [B, T, D]``."""
    eps, dtype = config.rms_norm_eps, x.dtype
    layer = jax.tree.map(lambda w: w.astype(dtype), layer)

    h = rms_norm(x, layer["attention_norm"], eps)
    query = project(h, layer, "query", config)
    key = project(h, layer, "key", config)
    value = project(h, layer, "value", config)
    query = rotate(rms_norm(query, layer["query_norm"], eps), angles)
    key = rotate(rms_norm(key, layer["key_norm"], eps), angles)
    query = constrain(query, "batch", "length", "heads", "head_dim")
    key = constrain(key, "batch", "length", "kv_heads", "head_dim")
    value = constrain(value, "batch", "length", "kv_heads", "head_dim")
    attended, left_behind = attend(query, key, value)
    if config.attention != "splash":  # which names what it keeps itself
        attended = checkpoint_name(attended, "attended")
    x = x + project(attended, layer, "output", config)

    h = rms_norm(x, layer["mlp_norm"], eps)
    routing = None
    if config.num_experts:
        out, routing = experts(h, layer, valid, config)
    else:
        gate = project(h, layer, "gate", config)
        up = project(h, layer, "up", config)
        gated = constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp")
        out = project(gated, layer, "down", config)
    return constrain(x + out, "batch", "length", "width"), left_behind, routing


def project(h: jax.Array, layer: Params, name: str, config: Qwen3Config) -> jax.Array:
    """``h W`` of one projection, and of its low-rank update where there is one: ``+ alpha / r (h a) b``.

    Args:
      h: ``[B, T, inputs...]``.
      layer: holds ``W [inputs..., outputs...]`` by name, and may hold ``lora`` with ``a`` and ``b``.
      name: which projection.
      config: dimensions.

    Returns:
      ``[B, T, outputs...]``.
    """
    weight, outputs = layer[name], layer[name].shape[h.ndim - 2 :]
    # Contracted over one axis, not two: a CPU then sums a step of decoding in the order of a whole row.
    h = h.reshape(*h.shape[:2], -1)
    out = jnp.tensordot(h, weight.reshape(-1, *outputs), 1)
    update = layer.get("lora", {}).get(name)
    if update is None:
        return out
    if not config.lora_alpha:
        raise InputError(
            f"an adapter counts alpha / rank: {name} has one, and lora_alpha is 0; set it in the config"
        )
    a = update["a"].reshape(h.shape[-1], -1)
    return out + lora_delta(h, a, update["b"], config.lora_alpha / a.shape[-1], 1)


def _embed(params: Params, tokens: jax.Array, config: Qwen3Config) -> jax.Array:
    """``[B, T, D]`` embeddings in the compute dtype; under a mesh each device looks up the ids it holds."""
    table = params["embed"].astype(config.compute_dtype)
    if not can_split(tokens.shape[0]):
        return constrain(table[tokens], "batch", "length", "width")
    vocab, fsdp = RULES["vocab"], RULES["embed"]

    def on_device(table: jax.Array, tokens: jax.Array) -> jax.Array:
        table = jax.lax.all_gather(table, fsdp, axis=1, tiled=True)
        local = tokens - jax.lax.axis_index(vocab) * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        found = jnp.where(here[..., None], table[jnp.where(here, local, 0)], 0)
        return jax.lax.psum(found, vocab)

    return jax.shard_map(
        on_device,
        in_specs=(partition("vocab", "embed"), partition("batch", "length")),
        out_specs=partition("batch", "length", "width"),
    )(table, tokens)


# What the backward pass keeps of each layer, from least memory to least work. "full" recomputes whole
# layers; it also keeps the forward part of a gradient program the same as a forward-only program, so that
# both give the same bits on a CPU, which is why a policy compared with itself shows no drift.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "full": jax.checkpoint,
    "attention": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("attended", "splash_attention")
    ),
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "none": lambda layer: layer,
}


def hidden_states(
    params: Params,
    tokens: jax.Array,
    config: Qwen3Config,
    *,
    positions: jax.Array | None = None,
    sequence_ids: jax.Array | None = None,
) -> tuple[jax.Array, Routing | None]:
    """The residual stream after the last layer: what the vocabulary head (`logits`) reads.

    Args:
      params: parameters as `parameter_table` lays them out.
      tokens: ``[B, T]`` int32.
      config: dimensions.
      positions: ``[B, T]`` int32; 0, 1, ... along the row by default.
      sequence_ids: ``[B, T]`` int32, 0 at padding; one sequence per row by default.

    Returns:
      ``[B, T, D]`` in the compute dtype, and what each layer's router did (``[L, E]`` and ``[L]``), None
      in a dense model.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if sequence_ids is None:
        sequence_ids = jnp.ones_like(tokens)
    x, (routing, _) = _read_rows(params, tokens, positions, sequence_ids, config, lambda key, value: ())
    return x, routing


def _read_rows(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    sequence_ids: jax.Array,
    config: Qwen3Config,
    keep: Callable[[jax.Array, jax.Array], Any],
) -> tuple[jax.Array, tuple[Routing | None, Any]]:
    """All layers over whole rows: the last residual stream, and of every layer the routing and what
    ``keep`` makes of its keys and values ``[B, T, M, H]``.
    """
    angles = rotary_angles(positions, config)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
        return row_attention(query, key, value, sequence_ids, config.attention), keep(key, value)

    def body(x: jax.Array, layer: Params) -> tuple[jax.Array, tuple[Routing | None, Any]]:
        x, kept, routing = _layer(x, layer, angles, attend, sequence_ids > 0, config)
        return x, (routing, kept)

    with exact_products(config.compute_dtype):
        return jax.lax.scan(REMAT[config.remat](body), _embed(params, tokens, config), params["layers"])


def head(params: Params) -> jax.Array:
    """The vocabulary matrix ``[D, V]``, be it stored apart or tied to the embedding."""
    return params["head"] if "head" in params else params["embed"].T


def logits(hidden: jax.Array, params: Params, config: Qwen3Config) -> jax.Array:
    """The vocabulary head, final norm included: ``[..., D] -> [..., V]`` float32."""
    hidden = rms_norm(hidden, params["norm"], config.rms_norm_eps)
    matrix = head(params).astype(hidden.dtype)
    with exact_products(hidden.dtype):
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
    hidden, _ = hidden_states(params, tokens, config, positions=positions, sequence_ids=sequence_ids)
    return logits(hidden, params, config)


@struct.dataclass
class Cache:
    """Keys and values of the past; slot s of a row holds that row's position s."""

    # Heads before slots, as a head's products read them: a GPU's compiler would otherwise turn the whole
    # cache around before a stretch of decoding and back after it, and hold it twice.
    key: jax.Array  # [L, B, M, S, H]
    value: jax.Array  # [L, B, M, S, H]


def empty_cache(config: Qwen3Config, rows: int, slots: int) -> Cache:
    """A cache for ``rows`` sequences of at most ``slots`` tokens each."""
    shape = (
        config.num_hidden_layers,
        rows,
        config.num_key_value_heads,
        slots,
        config.head_dim,
    )
    zeros = jnp.zeros(shape, config.compute_dtype)
    zeros = constrain(zeros, "layers", "batch", "kv_heads", "length", "head_dim")
    return Cache(zeros, zeros)


def prompt_cache(params: Params, tokens: jax.Array, sequence_ids: jax.Array, config: Qwen3Config) -> Cache:
    """Keys and values of prompts, read whole by the kernel that reads rows.

    Args:
      params: parameters.
      tokens: ``[B, T]`` int32, one prompt a row, padded on the right.
      sequence_ids: ``[B, T]`` int32, 1 at the prompt and 0 at padding, which gets keys and values as well.
      config: dimensions.

    Returns:
      A cache of T slots.
    """

    def keep(*of_layer: jax.Array) -> Cache:
        heads_first = (x.swapaxes(1, 2) for x in of_layer)
        return Cache(*(constrain(x, "batch", "kv_heads", "length", "head_dim") for x in heads_first))

    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return _read_rows(params, tokens, positions, sequence_ids, config, keep)[1][1]


def decode(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    config: Qwen3Config,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, Cache]:
    """Read further tokens of each row on top of what the cache holds.

    A padding token may be read too: it writes a slot beyond the row's length, which the row's next
    token overwrites before any position may attend to it.

    Args:
      params: parameters.
      tokens: ``[B, T]`` int32, T = 1 for a step of sampling, the prompt's length for a prefill.
      positions: ``[B, T]`` int32, each below S.
      cache: ``[L, B, M, S, H]`` twice.
      config: dimensions.
      blocks: slots to attend over, which have those of all positions among them; what is drawn of rows
        beyond them means nothing. All slots at once by default.

    Returns:
      The residual stream ``[B, T, D]`` after the last layer, and the cache with these tokens added.
    """
    slots = blocks.slots if blocks else cache.key.shape[3]
    mask, angles = cache_mask(positions, slots), rotary_angles(positions, config)
    rows = jnp.arange(tokens.shape[0])[:, None, None]
    # Written head by head: with heads whole, a TPU's compiler lays the cache out for writing and copies it
    # back and forth for reading, where its tiles divide the slots.
    heads = jnp.arange(config.num_key_value_heads)

    # The cache is carried whole and written in place; scanned over, every layer of it would be copied.
    def body(carry: tuple[jax.Array, Cache], at: tuple[Params, jax.Array]) -> tuple[tuple, None]:
        (x, cache), (layer, index) = carry, at

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Cache]:
            keys = cache.key.at[index, rows, heads, positions[..., None]].set(key)
            values = cache.value.at[index, rows, heads, positions[..., None]].set(value)
            past_keys, past_values = (x[index, :, :, :slots] for x in (keys, values))
            if blocks:
                attended = block_attention(query, past_keys, past_values, mask, blocks)
            else:
                attended = attention(query, past_keys.swapaxes(1, 2), past_values.swapaxes(1, 2), mask)
            return attended, Cache(keys, values)

        x, cache, _ = _layer(x, layer, angles, attend, jnp.ones(tokens.shape, bool), config)
        return (x, cache), None

    layers = params["layers"], jnp.arange(config.num_hidden_layers)
    with exact_products(config.compute_dtype):
        (x, cache), _ = jax.lax.scan(body, (_embed(params, tokens, config), cache), layers)
    return x, cache
