"""The gradient of the objective over one minibatch, and what is read off it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.config import Config
from opd_jax.method import (
    DRIFT_EDGES,
    SCORE_EDGES,
    WEIGHT_EDGES,
    drift_diagnostics,
    first_response,
    histogram,
    masked_sum,
    objective,
    segment_score,
    support_mass,
)
from opd_jax.model.config import Qwen3Config
from opd_jax.model.moe import routing_readings
from opd_jax.model.precision import exact_products
from opd_jax.train.choices import base_loss, gate_options
from opd_jax.train.fields import drawn_fields, read_fields
from opd_jax.types import Batch, Params

Array = jax.Array


@struct.dataclass
class Readings:
    """What one update says of itself."""

    sums: dict[str, tuple[Array, Array]]  # name -> (sum, count), which add up over parts and updates
    whole: dict[str, Array]  # name -> scalar of the whole minibatch: loss, norms, extremes
    histograms: dict[str, Array]  # name -> [bins] counts between the edges of `opd_jax.method`
    drift: Array  # [B, T]
    weights: Array  # [B, T]
    segments: Array  # [B, T], -1 everywhere without a gate


def gradient_of(
    params: Params,
    batch: Batch,
    update: Array,
    config: Config,
    model: Qwen3Config,
    newline: Array,
    frozen: Params,
    axis_name: str | None = None,
) -> tuple[Params, Readings]:
    """Gradient of the objective over a batch, and the readings of it.

    Under shard_map or pmap the batch is one device's part and ``axis_name`` the mapped axis; the
    gradient is then right after ``jax.lax.pmean``, and the readings are the part's own.
    """
    drawn = drawn_fields(config, update, batch.rows.targets.shape, axis_name)

    def loss(params: Params, batch: Batch) -> tuple[Array, Any]:
        fields = read_fields(params, batch, config, model, newline, frozen) | drawn
        result = objective(
            fields["cur"],
            fields["old"],
            fields["mask"],
            base_loss(config, fields),
            fields["segments"],
            reduction=config.loss.reduction,
            **gate_options(config, fields, axis_name),
        )
        return result.loss, (fields, result)

    with exact_products(model.compute_dtype):
        (_, (fields, result)), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
    return gradient, read(config, jax.lax.stop_gradient(fields), *result)


def read(config: Config, fields: dict[str, Any], loss: Array, d: Array, w: Array) -> Readings:
    """Every-step readings of a whole minibatch."""
    mask, segments = fields["mask"], fields["segments"]
    clip = (config.loss.clip_low, config.loss.clip_high)
    sums = drift_diagnostics(fields["cur"], fields["old"], fields["tea"], d, w, mask, clip=clip)
    whole = {
        "loss": loss,
        "drift_max": jnp.max(jnp.abs(d)),
        "weight_min": jnp.min(jnp.where(mask, w, jnp.max(w))),
        "weight_max": jnp.max(w),
    }
    sequences = first_response(mask, fields["sequence_ids"]).astype(jnp.float32)
    sums["response_length"] = (jnp.sum(mask.astype(jnp.float32)), jnp.sum(sequences))
    sums["entropy"] = masked_sum(fields["entropy"], mask)
    # A renormalised top-K loss is blind to mass outside its support: watch it from both sides.
    sums["student_support_mass"] = support_mass(fields["student_logprobs_on_support"], mask)
    sums["teacher_support_mass"] = support_mass(fields["teacher_logprobs_on_support"], mask)
    if "routing" in fields:
        sums |= routing_readings(fields["routing"])
    histograms = {
        "drift": histogram(d, mask, DRIFT_EDGES),
        "weight": histogram(w, mask, WEIGHT_EDGES),
    }
    if segments is None:
        segments = jnp.full(mask.shape, -1)
    else:
        score = jnp.abs(segment_score(d, mask, segments, statistic=config.gate.statistic))
        histograms["score"] = histogram(score, mask, SCORE_EDGES)
    return Readings(sums=sums, whole=whole, histograms=histograms, drift=d, weights=w, segments=segments)
