"""The costly readings, every ``log.diagnose_every`` updates: they take a second backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from opd_jax.config import Config
from opd_jax.method import (
    drift,
    masked_sum,
    readings,
    segment_score,
    structure_readings,
    structure_sums,
    topk_overlap,
)
from opd_jax.model.config import Qwen3Config
from opd_jax.model.lora import on_top
from opd_jax.model.sharding import batch_sharding, replicated
from opd_jax.model.vocab import top_k_logprobs
from opd_jax.train.choices import SEGMENTS
from opd_jax.train.fields import drawn_fields
from opd_jax.train.gradient import gradient_of
from opd_jax.train.microbatches import fields_in_parts, gradient_in_parts, join, split, weights_of
from opd_jax.types import Batch, Params

Array = jax.Array
Diagnose = Callable[[Params, Batch, Array, Params], tuple[dict, dict]]


def without_gate(config: Config) -> Config:
    """The same config with every token weighing the same."""
    return dataclasses.replace(
        config,
        gate=dataclasses.replace(
            config.gate,
            segments="none",
            control="none",
            clip=None,
            residual=1.0,
            target_ratio=None,
            map="exp",  # of no gate; these two let micro-batches be added up in one sweep
            scope="minibatch",
        ),
        weights=dataclasses.replace(config.weights, members=()),
    )


def make_diagnosis(
    model: Qwen3Config,
    config: Config,
    newline: Any,
    param_shardings: Any,
    mesh: Mesh,
    frozen_shardings: Any = None,
) -> Diagnose:
    """Compile the costly readings for one mesh.

    Returns:
      ``diagnose(params, batch, update, frozen) -> (sums, structure sums)``, before the update is done; see
      `diagnosis`.
    """
    newline = jnp.asarray(newline)
    count = config.schedule.microbatches
    compute = gradient_of if count == 1 else gradient_in_parts
    ungated = without_gate(config)

    def overlap(params: Params, part: Batch) -> Array:
        k = part.signal.support_ids.shape[-1]
        return top_k_logprobs(params, part.rows, k, model, usable=len(newline)).ids

    def diagnose(params: Params, batch: Batch, update: Array, frozen: Params) -> tuple[dict, dict]:
        rows, signal = batch.rows, batch.signal
        gradient, told = compute(params, batch, update, ungated, model, newline, frozen)
        one, whole = jnp.ones(()), on_top(frozen, params)
        if count == 1:
            ids = overlap(whole, batch)
        else:
            ids = join(jax.lax.map(lambda part: overlap(whole, part), split(batch, count)))
        sums = {
            "ungated_gradient_norm": (optax.tree.norm(gradient), one),
            "topk_overlap": topk_overlap(ids, signal.support_ids, rows.mask),
        }
        if signal.again is not None:
            if config.weights.members or config.gate.control != "none":
                fields = fields_in_parts(params, batch, update, config, model, newline, frozen)
            else:  # a plain gate reads two log-probs, for which the student need not be run
                fields = {"mask": rows.mask, "old": signal.old, "sequence_ids": rows.sequence_ids}
                fields |= drawn_fields(config, update, rows.mask.shape)
            sums |= null_readings(batch, config, fields, newline)
        return sums, structure_sums(told.drift, rows.mask, sequence_ids=rows.sequence_ids)

    return jax.jit(
        diagnose,
        in_shardings=(param_shardings, batch_sharding(mesh), None, frozen_shardings or {}),
        out_shardings=replicated(mesh),
    )


def null_readings(
    batch: Batch, config: Config, fields: dict[str, Any], newline: Array
) -> dict[str, tuple[Array, Array]]:
    """The gate that the config asks for, with no update between `old` and `cur`: what rounding does to it.

    What a weight reads besides these two is that of the student as it is. The oracle's gate reads two
    supports in their place, which were not scored a second time: of it there is no null weight.
    """
    rows, signal, gate = batch.rows, batch.signal, config.gate
    d = drift(signal.again, signal.old, rows.mask)
    one = jnp.ones(())
    sums = {
        "null_drift_abs": masked_sum(jnp.abs(d), rows.mask),
        "null_drift_max": (jnp.max(jnp.abs(d)), one),
    }
    if gate.segments == "none" and not config.weights.members:
        return sums
    segments = None
    if gate.segments != "none":
        segments = SEGMENTS[gate.segments](rows, gate, newline, d)
        score = segment_score(d, rows.mask, segments, statistic=gate.statistic)
        sums["null_score"] = masked_sum(jnp.abs(score), rows.mask)
    if gate.control == "oracle":
        return sums
    still = {**fields, "cur": signal.again, "segments": segments}
    _, w = weights_of(config, still, config.schedule.microbatches)
    return sums | {
        "null_weight_min": (jnp.min(jnp.where(rows.mask, w, jnp.max(w))), one),
        "null_weight_max": (jnp.max(w), one),
    }


def diagnosis(told: tuple[dict, dict]) -> dict[str, Any]:
    """The costly readings as JSON values.

    ``ungated_gradient_norm`` belongs beside the update's ``gradient_norm``; ``null_*`` is the noise
    floor of drift, score and weight; ``topk_overlap`` the share of the teacher's top K that is the
    student's as well; the rest are the readings of `opd_jax.method.structure`.
    """
    sums, structure = jax.device_get(told)
    return {**readings(sums), **structure_readings(structure)}
