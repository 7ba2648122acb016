"""The vocabulary head: token rows in, log-probabilities of the ids that matter out.

The work is done by `opd_jax.model.head`: in chunks, each computed anew in the backward pass, so that no
``[B, T, V]`` array ever exists. Logits are accumulated in float32 whatever the compute dtype, since a
bf16 log-sum-exp over a large vocabulary is off by hundredths of a nat.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.errors import InputError
from opd_jax.model.config import Qwen3Config
from opd_jax.model.forward import head, hidden_states, rms_norm
from opd_jax.model.head import read_head
from opd_jax.types import Params, Readout, Rows


def _read(
    params: Params,
    rows: Rows,
    ids: jax.Array,
    config: Qwen3Config,
    temperature: float,
    k: int = 0,
    usable: int | None = None,
) -> tuple[Readout, jax.Array, jax.Array]:
    """`read_head` on the model's last hidden states, and those states before the final norm."""
    stream, routing = hidden_states(
        params, rows.tokens, config, positions=rows.positions, sequence_ids=rows.sequence_ids
    )
    # Computed anew in the backward pass, which then keeps none of the norm's float32 copies.
    norm = jax.checkpoint(rms_norm, static_argnums=2)
    hidden = norm(stream, params["norm"], config.rms_norm_eps)
    told, ids = read_head(
        hidden,
        head(params),
        ids,
        chunk=config.head_chunk,
        temperature=temperature,
        k=k,
        usable=usable,
    )
    return dataclasses.replace(told, routing=routing), ids, stream


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
      `Readout`: logits of the ids, log-sum-exp and entropy, float32 nats; of a mixture of experts what
      its routers did, too.
    """
    return _read(params, rows, ids, config, temperature)[0]


def token_logprobs(params: Params, rows: Rows, config: Qwen3Config, *, temperature: float = 1.0) -> jax.Array:
    """Log-probability ``[B, T]`` of each row's own targets, float32 nats at ``temperature``."""
    return readout(params, rows, rows.targets[..., None], config, temperature=temperature).logprobs[..., 0]


@struct.dataclass
class TopK:
    """A model's likeliest ids at each position, of the whole distribution, float32 nats."""

    sampled: jax.Array  # [B, T]: log-prob of the target
    ids: jax.Array  # [B, T, K] int32, best first
    logprobs: jax.Array  # [B, T, K]: theirs; what the K leave out is the mass outside
    entropy: jax.Array | None  # [B, T]; None from a server, which does not tell
    hidden: jax.Array | None = None  # [B, T, D] bfloat16: what `opd_jax.model.forward.logits` reads


def top_k_logprobs(
    params: Params,
    rows: Rows,
    k: int,
    config: Qwen3Config,
    *,
    temperature: float = 1.0,
    usable: int | None = None,
    hidden: bool = False,
) -> TopK:
    """The ``k`` most likely ids at every position, beside the target, in one forward pass.

    Ids from ``usable`` on, the padding of a vocabulary, are never among them; their probability is part
    of what the distribution sums over all the same. ``hidden`` adds the last hidden states that were read.
    """
    allowed = min(config.vocab_size, config.vocab_size if usable is None else usable)
    if not 0 < k <= allowed:
        raise InputError(
            f"the likeliest ids must be 1 to as many as may be chosen: asked for {k} of {allowed}; lower k"
        )
    told, ids, stream = _read(params, rows, rows.targets[..., None], config, temperature, k, usable)
    return TopK(
        told.logprobs[..., 0],
        ids[..., 1:],
        told.logprobs[..., 1:],
        told.entropy,
        stream.astype(jnp.bfloat16) if hidden else None,
    )
