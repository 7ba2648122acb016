"""The vocabulary head: hidden states in, log-probabilities of the ids that matter out.

Positions pass through the head in chunks that are recomputed in the backward pass, so that no
``[B, T, V]`` array ever exists. Logits are accumulated in float32 whatever the compute dtype, since a
bf16 log-sum-exp over a large vocabulary is off by hundredths of a nat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.model.config import Qwen3Config
from opd_jax.model.forward import hidden_states, logits
from opd_jax.types import Params, Readout, Rows


def _over_positions(function: Callable[..., Any], arrays: tuple[jax.Array, ...], chunk: int) -> Any:
    """Apply ``function`` to ``[B, chunk, ...]`` pieces and join its results along T."""
    function = jax.checkpoint(function)
    length = arrays[0].shape[1]
    if length <= chunk:
        return function(*arrays)
    count = -(-length // chunk)
    padding = count * chunk - length

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * chunk, *x.shape[3:])[:, :length]

    pieces = jax.lax.map(lambda piece: function(*piece), tuple(split(x) for x in arrays))
    return jax.tree.map(join, pieces)


def _scaled_logits(hidden: jax.Array, params: Params, config: Qwen3Config, temperature: float) -> jax.Array:
    """``[..., V]`` logits at a temperature, the largest at zero.

    Only differences of logits mean anything, and those of a confident model keep their digits when the
    large common part is gone before the log-sum-exp is taken.
    """
    z = logits(hidden, params, config) / temperature
    return z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))


def readout(
    params: Params, rows: Rows, ids: jax.Array, config: Qwen3Config, *, temperature: float = 1.0
) -> Readout:
    """What a model says of given ids at every position of given rows.

    This one function serves the behaviour policy's `old` log-probs, the teacher's score and the gated
    step, so that two calls with the same weights and rows agree to the bit.

    Args:
      params: parameters.
      rows: the token rows, ``[B, T]``.
      ids: ``[B, T, K]`` int32, the tokens asked about.
      config: dimensions.
      temperature: logits are divided by it.

    Returns:
      `Readout`: logits of the ids, log-sum-exp and entropy, float32 nats; of a mixture of experts its
      routing too.
    """
    hidden, routing = hidden_states(
        params, rows.tokens, config, positions=rows.positions, sequence_ids=rows.sequence_ids
    )

    def read(hidden: jax.Array, ids: jax.Array) -> Readout:
        z = _scaled_logits(hidden, params, config, temperature)
        logsumexp = jax.nn.logsumexp(z, axis=-1)
        # The entropy, lse - sum p z, is a diagnostic: no gradient is spent on it.
        fixed = jax.lax.stop_gradient(z)
        entropy = jax.lax.stop_gradient(logsumexp) - jnp.sum(jax.nn.softmax(fixed) * fixed, axis=-1)
        return Readout(jnp.take_along_axis(z, ids, axis=-1), logsumexp, entropy)

    return _over_positions(read, (hidden, ids), config.head_chunk).replace(routing=routing)


def token_logprobs(params: Params, rows: Rows, config: Qwen3Config, *, temperature: float = 1.0) -> jax.Array:
    """Log-probability ``[B, T]`` of each row's own targets, float32 nats at ``temperature``."""
    return readout(params, rows, rows.targets[..., None], config, temperature=temperature).logprobs[..., 0]


@struct.dataclass
class TopK:
    """A model's likeliest ids at each position, of the whole distribution, float32 nats."""

    sampled: jax.Array  # [B, T]: log-prob of the target
    ids: jax.Array  # [B, T, K] int32, best first
    logprobs: jax.Array  # [B, T, K]: theirs; what the K leave out is the mass outside
    entropy: jax.Array  # [B, T]


def top_k_logprobs(
    params: Params,
    rows: Rows,
    k: int,
    config: Qwen3Config,
    *,
    temperature: float = 1.0,
    usable: int | None = None,
) -> TopK:
    """The ``k`` most likely ids at every position, beside the target, in one forward pass.

    Ids from ``usable`` on, the padding of a vocabulary, are never among them; their probability is part
    of what the distribution sums over all the same.
    """
    hidden, _ = hidden_states(
        params, rows.tokens, config, positions=rows.positions, sequence_ids=rows.sequence_ids
    )

    def read(hidden: jax.Array, targets: jax.Array) -> TopK:
        z = _scaled_logits(hidden, params, config, temperature)
        logprobs = z - jax.nn.logsumexp(z, axis=-1, keepdims=True)
        best, ids = jax.lax.top_k(logprobs[..., :usable], k)
        sampled = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        return TopK(sampled, ids.astype(jnp.int32), best, entropy)

    return _over_positions(read, (hidden, rows.targets), config.head_chunk)
