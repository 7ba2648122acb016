"""Scoring: the behaviour policy's log-probs by the trainer's computation, and the teacher's signal.

`old` is read by the very function that the gated step differentiates, on the very minibatches it will
train on, so that the first update after sampling sees a drift of exactly zero and numerics never pose
as drift. What the sampler itself reported is kept beside it, for the mismatch metric alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.errors import InputError
from opd_jax.model.config import Qwen3Config
from opd_jax.model.vocab import token_logprobs, top_k_logprobs
from opd_jax.rollout.rows import gather, make_rows, spread
from opd_jax.rollout.store import Rollout, Score
from opd_jax.types import Batch, Params, Rows, Signal

Array = jax.Array
OldScorer = Callable[[Params, Rows], Array]
TeacherScorer = Callable[[Params, Rows], tuple[Array, Array, Array]]


@functools.cache  # one program for all who ask for the same
def make_old_scorer(config: Qwen3Config, *, temperature: float) -> OldScorer:
    """Compiled ``(params, rows) -> log-prob [B, T]`` of the sampled tokens, as the trainer reads it."""
    return jax.jit(lambda params, rows: token_logprobs(params, rows, config, temperature=temperature))


@functools.cache
def make_teacher_scorer(config: Qwen3Config, *, k: int, temperature: float) -> TeacherScorer:
    """Compiled ``(params, rows) -> (sampled log-prob [B, T], ids [B, T, K], log-probs [B, T, K])``."""
    return jax.jit(lambda params, rows: top_k_logprobs(params, rows, k, config, temperature=temperature))


def check_rollouts(rollouts: Sequence[Rollout], vocabularies: dict[str, int]) -> None:
    """Refuse token ids that a model of the run has no embedding for."""
    for index, rollout in enumerate(rollouts):
        highest = int(max(rollout.prompt_ids.max(), rollout.response_ids.max()))
        for model, size in vocabularies.items():
            if highest >= size:
                raise InputError(
                    f"token ids must be in every model's vocabulary: rollout {index} of round "
                    f"{rollout.round} has id {highest}, the {model} knows {size}; use models of one "
                    "tokenizer"
                )


def rows_of(rollouts: Sequence[Rollout], width: int) -> Rows:
    """Lay rollouts out as rows, in the order given."""
    return make_rows(
        [rollout.prompt_ids for rollout in rollouts],
        [rollout.response_ids for rollout in rollouts],
        width,
    )


def attach(rollouts: Sequence[Rollout], rows: Rows, old: Any, teacher: tuple[Any, Any, Any]) -> list[Rollout]:
    """Rollouts with the scores of their rows: ``old [B, T]`` and the teacher's three arrays."""
    sampled, ids, logprobs = teacher
    # What the K leave out; -expm1(log mass) keeps the digits of a small remainder.
    outside = np.maximum(-np.expm1(jax.nn.logsumexp(jnp.asarray(logprobs), axis=-1)), 0.0)
    columns = [gather(x, rows.mask) for x in (old, sampled, ids, logprobs, outside)]
    return [
        dataclasses.replace(rollout, score=Score(*scores))
        for rollout, *scores in zip(rollouts, *columns, strict=True)
    ]


def batch_of(
    rollouts: Sequence[Rollout], width: int, *, old_source: Literal["trainer", "sampler"] = "trainer"
) -> Batch:
    """One minibatch of the gated step from scored rollouts, as NumPy arrays ``[B, width]``.

    ``old_source`` says whose log-probs of the behaviour policy drift is measured against. With the
    sampler's, the rounding between two engines is part of the drift from the first update on.

    Raises:
      InputError: a rollout has not been scored.
    """
    rows = rows_of(rollouts, width)
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]
    if len(scores) != len(rollouts):
        raise InputError(
            f"rollouts must be scored before they are trained on: round {rollouts[0].round} is not; "
            "run opd score first"
        )
    if old_source == "trainer":
        old = [score.old_logprobs for score in scores]
    else:
        old = [rollout.behaviour_logprobs for rollout in rollouts]
    return Batch(
        rows=rows,
        signal=Signal(
            old=spread(old, rows.mask),
            teacher=spread([score.teacher_logprobs for score in scores], rows.mask),
            support_ids=spread([score.teacher_topk_ids for score in scores], rows.mask),
            support_logprobs=spread([score.teacher_topk_logprobs for score in scores], rows.mask),
        ),
    )


def mismatch(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How far the sampler's log-probs lie from the trainer's: mean and largest |difference|, nats."""
    difference = np.concatenate(
        [np.abs(r.behaviour_logprobs - r.score.old_logprobs) for r in rollouts if r.score]
    )
    return {"mean": float(difference.mean()), "max": float(difference.max())}
