"""Scoring: the behaviour policy's log-probs by the trainer's computation, and the teacher's signal.

`old` is read by the very function that the gated step differentiates, on the very minibatches it will
train on, so that the first update after sampling sees a drift of exactly zero and numerics never pose
as drift. What the sampler itself reported is kept beside it, for the mismatch metric alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from opd_jax.errors import InputError
from opd_jax.model.config import Qwen3Config
from opd_jax.model.forward import logits
from opd_jax.model.sharding import everywhere
from opd_jax.model.vocab import TopK, readout, token_logprobs, top_k_logprobs
from opd_jax.rollout.rows import make_rows, spread
from opd_jax.rollout.store import Rollout, Score
from opd_jax.types import Batch, Params, Rows, Signal

Array = jax.Array
Scorer = Callable[[Params, Rows], Array]
TopKScorer = Callable[[Params, Rows], TopK]


@functools.cache  # one program for all who ask for the same
def make_scorer(config: Qwen3Config, *, temperature: float) -> Scorer:
    """Compiled ``(params, rows) -> log-prob [B, T]`` of the sampled tokens, as the trainer reads it."""
    return jax.jit(
        lambda params, rows: everywhere(token_logprobs(params, rows, config, temperature=temperature))
    )


@functools.cache
def make_topk_scorer(
    config: Qwen3Config, *, k: int, temperature: float, usable: int, hidden: bool = False
) -> TopKScorer:
    """Compiled ``(params, rows) -> TopK``: sampled log-prob, likeliest ids, their log-probs, entropy.

    With ``hidden``, the model's last hidden states, too.
    """

    def score(params: Params, rows: Rows) -> TopK:
        told = top_k_logprobs(params, rows, k, config, temperature=temperature, usable=usable, hidden=hidden)
        return everywhere(told)

    return jax.jit(score)


@functools.cache
def make_ids_scorer(config: Qwen3Config, *, temperature: float) -> Callable[[Params, Rows, Array], Array]:
    """Compiled ``(params, rows, ids [B, T, K]) -> log-probs [B, T, K]`` of given ids."""
    return jax.jit(
        lambda params, rows, ids: everywhere(
            readout(params, rows, ids, config, temperature=temperature).logprobs
        )
    )


def check_rollouts(rollouts: Sequence[Rollout], vocabularies: dict[str, int]) -> None:
    """Refuse token ids that a model of the run has no embedding for."""
    for index, rollout in enumerate(rollouts):
        ids = np.concatenate([rollout.prompt_ids, rollout.response_ids])
        lowest, highest = int(ids.min()), int(ids.max())
        for model, size in vocabularies.items():
            if lowest < 0 or highest >= size:
                raise InputError(
                    f"token ids must be in every model's vocabulary: rollout {index} of round "
                    f"{rollout.round} has id {lowest if lowest < 0 else highest}, the {model} knows {size}; "
                    "use models of one tokenizer"
                )


def rows_of(rollouts: Sequence[Rollout], width: int, counts: np.ndarray | None = None) -> Rows:
    """Lay rollouts out as rows, in the order given; ``counts`` of them share each row, one by default."""
    return make_rows(
        [rollout.prompt_ids for rollout in rollouts],
        [rollout.response_ids for rollout in rollouts],
        width,
        counts,
    )


def columns_of(teacher: TopK) -> dict[str, Any]:
    """What a teacher says, by the names of `Score`; what it does not say is left out."""
    columns = {
        "teacher_logprobs": teacher.sampled,
        "teacher_entropy": teacher.entropy,
        "teacher_topk_ids": teacher.ids,
        "teacher_topk_logprobs": teacher.logprobs,
        "teacher_hidden": teacher.hidden,
    }
    return {name: values for name, values in columns.items() if values is not None}


def attach(rollouts: Sequence[Rollout], columns: Sequence[Mapping[str, Any]]) -> list[Rollout]:
    """Rollouts with their scores.

    Args:
      rollouts: R tokens each.
      columns: of each, what is said of its tokens by the names of `Score`, ``[R]`` or ``[R, K]``; what the
        teacher's K likeliest ids leave out is added.
    """
    scored = []
    for rollout, known in zip(rollouts, columns, strict=True):
        # -expm1(log mass) keeps the digits of a small remainder.
        mass = logsumexp(np.asarray(known["teacher_topk_logprobs"], np.float64), axis=-1)
        outside = np.maximum(-np.expm1(mass), 0.0).astype(np.float32)
        scored.append(dataclasses.replace(rollout, score=Score(**known, teacher_outside_mass=outside)))
    return scored


def batch_of(
    rollouts: Sequence[Rollout],
    width: int,
    *,
    counts: np.ndarray | None = None,
    staleness: int = 0,
    old_source: Literal["trainer", "sampler"] = "trainer",
) -> Batch:
    """One minibatch of the gated step from scored rollouts, as NumPy arrays ``[B, width]``.

    ``counts`` says how many of the rollouts, in the order given, share each row; one each by default.
    ``staleness`` is in rounds. ``old_source`` says whose log-probs of the behaviour policy drift is
    measured against. With the sampler's, the rounding between two engines is part of the drift from the
    first update on.

    Raises:
      InputError: a rollout has not been scored.
    """
    rows = rows_of(rollouts, width, counts)
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]
    if len(scores) != len(rollouts):
        raise InputError(
            f"rollouts must be scored before they are trained on: round {rollouts[0].round} is not; "
            "run opd score first"
        )

    def column(name: str) -> Any:
        values = [getattr(score, name) for score in scores]
        return None if values[0] is None else spread(values, rows.mask)

    before = np.arange(len(rollouts)) if counts is None else np.cumsum(counts) - counts
    inside = rows.sequence_ids > 0
    which = np.where(inside, before[:, None] + rows.sequence_ids - 1, 0)  # rollout of each position

    def of_sequence(values: Any, dtype: Any) -> np.ndarray:
        return np.where(inside, np.asarray(values, dtype)[which], dtype(0))

    _, group = np.unique([rollout.problem for rollout in rollouts], return_inverse=True)
    sampler = old_source == "sampler"
    return Batch(
        rows=rows,
        signal=Signal(
            old=spread([r.behaviour_logprobs for r in rollouts], rows.mask)
            if sampler
            else column("old_logprobs"),
            teacher=column("teacher_logprobs"),
            teacher_entropy=column("teacher_entropy"),
            support_ids=column("teacher_topk_ids"),
            support_logprobs=column("teacher_topk_logprobs"),
            reward=of_sequence([rollout.reward for rollout in rollouts], np.float32),
            group=of_sequence(group, np.int32),
            staleness=of_sequence([staleness] * len(rollouts), np.float32),
            again=column("again_logprobs"),
            reference=column("reference_logprobs"),
            student_ids=column("student_topk_ids"),
            student_old=column("student_topk_logprobs"),
            student_teacher=column("student_topk_teacher_logprobs"),
        ),
    )


def full_logprobs(hidden: Any, params: Params, config: Qwen3Config, *, temperature: float) -> Array:
    """A teacher's whole distribution from its stored hidden states, without a pass through its layers.

    Args:
      hidden: ``[..., D]``, as `Score.teacher_hidden` has them.
      params: of the teacher; its final norm and vocabulary matrix are read.
      config: of the teacher.
      temperature: logits are divided by it.

    Returns:
      ``[..., V]`` float32 nats: of a long response some positions at a time, or they fill the memory.
      Hidden states are bfloat16, so that a logit is off by some 2^-9 of the sizes it is summed from.
    """
    wide = jnp.asarray(hidden).astype(config.compute_dtype)
    return jax.nn.log_softmax(logits(wide, params, config) / temperature, axis=-1)


Distance = dict[str, float | None]


def mismatch(rollouts: Sequence[Rollout], alike: Sequence[np.ndarray] | None = None) -> Distance | None:
    """How far the sampler's log-probs lie from the trainer's: see `_distance`; None if not scored.

    ``alike`` are the trainer's at the sampler's temperature, ``[R]`` each, where `old` is of another.
    """
    trainers = [r.score.old_logprobs for r in rollouts if r.score] if alike is None else alike
    return _distance([r.behaviour_logprobs for r in rollouts], trainers)


def null_drift(rollouts: Sequence[Rollout]) -> Distance | None:
    """How far the trainer's log-probs lie from themselves under another batching; None if not scored."""
    pairs = [(r.score.again_logprobs, r.score.old_logprobs) for r in rollouts if r.score]
    read = [(again, old) for again, old in pairs if again is not None]
    return _distance([again for again, _ in read], [old for _, old in read])


def _distance(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Distance | None:
    """Of two readings of the same tokens, nats: ``mean``, ``p99`` and ``max`` |difference|, and ``pearson``.

    Pearson's correlation is None where a reading is the same for all tokens.
    """
    if not b:
        return None
    first, second = (np.concatenate(list(readings)).astype(np.float64) for readings in (a, b))
    size = np.abs(first - second)
    varies = bool(np.ptp(first)) and bool(np.ptp(second))
    return {
        "mean": float(size.mean()),
        "p99": float(np.percentile(size, 99)),
        "max": float(size.max()),
        "pearson": float(np.corrcoef(first, second)[0, 1]) if varies else None,
    }
