"""The arrays of one batch under the names that losses, gates and weights know them by."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.config import Config
from opd_jax.keys import derived_seed
from opd_jax.method import drift, noise_a_place, topk_tail_loss
from opd_jax.model.config import Qwen3Config
from opd_jax.model.lora import on_top
from opd_jax.model.vocab import readout
from opd_jax.train.choices import SEGMENTS
from opd_jax.types import Batch, Params

Array = jax.Array


def read_fields(
    params: Params, batch: Batch, config: Config, model: Qwen3Config, newline: Array, frozen: Params
) -> dict[str, Any]:
    """One forward pass of the student over a batch, and everything that follows from it by name.

    Only what a compiled program goes on to use is computed; the names are those of
    `opd_jax.method.family`.

    Args:
      params: of the student, those that are trained.
      batch: rows and signal, ``[B, T]``.
      config: sampling temperature and segments.
      model: the student's dimensions.
      newline: ``[V]`` bool, which ids end a line.
      frozen: what the trained parameters are put on top of; empty where all are trained.
    """
    rows, signal = batch.rows, batch.signal
    asked = [rows.targets[..., None], signal.support_ids]
    if signal.student_ids is not None:
        asked.append(signal.student_ids)
    ids = jnp.concatenate(asked, axis=-1)
    student = readout(on_top(frozen, params), rows, ids, model, temperature=config.sampling.temperature)
    on_support = slice(1, 1 + signal.support_ids.shape[-1])
    cur, mask = student.logprobs[..., 0], rows.mask
    fields = {
        "mask": mask,
        "sequence_ids": rows.sequence_ids,
        "cur": cur,
        "old": signal.old,
        "tea": signal.teacher,
        "entropy": student.entropy,
        "teacher_entropy": signal.teacher_entropy,
        "student_logits_on_support": student.logits[..., on_support],
        "student_logprobs_on_support": student.logprobs[..., on_support],
        "teacher_logprobs_on_support": signal.support_logprobs,
        "reward": signal.reward,
        "group": signal.group,
        "staleness": signal.staleness,
        "again": signal.again,
        "ref": signal.reference,
        "routing": student.routing,
    }
    fields["kl"] = topk_tail_loss(fields["student_logprobs_on_support"], signal.support_logprobs, mask=mask)
    if signal.student_ids is not None:
        fields |= {
            "student_ids": signal.student_ids,
            # Best first, so that the two sets of an overlap are of one size.
            "teacher_ids": signal.support_ids[..., : signal.student_ids.shape[-1]],
            "cur_on_support": student.logprobs[..., on_support.stop :],
            "old_on_support": signal.student_old,
            "tea_on_support": signal.student_teacher,
        }
    kind = config.gate.segments
    fields["segments"] = (
        None if kind == "none" else SEGMENTS[kind](rows, config.gate, newline, drift(cur, signal.old, mask))
    )
    return {name: value for name, value in fields.items() if value is not None or name == "segments"}


def drawn_fields(
    config: Config, update: Array, shape: tuple[int, int], axis_name: str | None = None
) -> dict[str, Array]:
    """What is drawn anew for every update, from the seed and its number alone.

    ``shape`` is that of the rows given; under shard_map or pmap they are one device's part of a batch
    that is drawn for as a whole.
    """
    key = jax.random.fold_in(jax.random.key(derived_seed(config.seed, "update")), update)
    shuffle, noise = jax.random.split(key)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * shape[0]
    return {"step": update, "key": shuffle, "noise": noise_a_place(noise, *shape, first)}
