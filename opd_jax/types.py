"""The alphabet of dimensions, and the records that cross folders.

Shapes everywhere are written in these letters:

    B rows            T positions      S cache slots     V vocabulary     K support
    L layers          D width          F MLP width       H head width     G segments
    N query heads     M key-value heads                   E experts

Position t of every ``[B, T]`` array speaks of the token *predicted* at t: inputs and targets are
shifted against each other once, where rows are built (`opd_jax.rollout.rows`), and never again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

TokenIds = Sequence[int] | np.ndarray  # of one sequence
Params = dict[str, Any]  # nested dict of arrays; layers are stored stacked, [L, ...]


@struct.dataclass
class Rows:
    """Token rows as the model reads them: prompt and response, padded on the right.

    The mask comes from lengths, never from token ids, because EOS may equal PAD and a PAD can be
    sampled. ``sequence_ids`` separates sequences that share a row; attention, segments and
    statistics never cross it.
    """

    tokens: Any  # [B, T] int32: the input token at t
    targets: Any  # [B, T] int32: the token predicted at t
    mask: Any  # [B, T] bool: true where the target is a response token
    sequence_ids: Any  # [B, T] int32: 1, 2, ... within a row; 0 is padding
    positions: Any  # [B, T] int32: position within the sequence, from 0


@struct.dataclass
class Signal:
    """What scoring attached to each predicted token, in nats at the sampling temperature.

    Arrays that only some losses and weights ask for are None where they were not scored.
    """

    old: Any  # [B, T] float32: log pi_old(y_t), by the trainer's own computation
    teacher: Any  # [B, T] float32: log p_teacher(y_t)
    teacher_entropy: Any  # [B, T] float32: of the teacher's whole distribution
    support_ids: Any  # [B, T, K] int32: the teacher's K most likely tokens, best first
    support_logprobs: Any  # [B, T, K] float32: their raw log-probabilities under the teacher
    reward: Any  # [B, T] float32: of the sequence
    group: Any  # [B, T] int32: same number for sequences of one problem, within the minibatch
    staleness: Any  # [B, T] float32: rounds of training between drawing the sequence and using it
    again: Any = None  # [B, T] float32: `old` read a second time, by another batching
    reference: Any = None  # [B, T] float32: log-prob of y_t under the student before training
    student_ids: Any = None  # [B, T, K] int32: the behaviour policy's most likely tokens, best first
    student_old: Any = None  # [B, T, K] float32: their log-probabilities under it
    student_teacher: Any = None  # [B, T, K] float32: and under the teacher


@struct.dataclass
class Batch:
    """One minibatch of the gated step."""

    rows: Rows
    signal: Signal


@struct.dataclass
class Readout:
    """What the vocabulary head says at each position; float32, at the sampling temperature."""

    logits: jax.Array  # [B, T, K]: scaled logits of the ids asked for, up to a constant a position
    logsumexp: jax.Array  # [B, T]: of all of them, so that logprob = logits - logsumexp
    entropy: jax.Array  # [B, T]: of the whole distribution, nats
    routing: Any = None  # what the routers of a mixture of experts did: `opd_jax.model.moe.Routing`

    @property
    def logprobs(self) -> jax.Array:
        """Log-probabilities of the ids asked for, [B, T, K]."""
        return self.logits - self.logsumexp[..., None]
