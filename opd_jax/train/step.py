"""The gated train step: one compiled function from (state, batch) to (state, readings)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from opd_jax.config import Config, GateConfig
from opd_jax.method import (
    DRIFT_EDGES,
    WEIGHT_EDGES,
    drift_diagnostics,
    every_token,
    fixed_blocks,
    histogram,
    masked_sum,
    newline_spans,
    objective,
    sampled_token_loss,
    topk_loss,
    whole_sequence,
)
from opd_jax.model.config import Qwen3Config
from opd_jax.model.sharding import batch_sharding, param_shardings, replicated
from opd_jax.model.vocab import readout
from opd_jax.types import Batch, Params, Readout, Rows, Signal

Array = jax.Array


@struct.dataclass
class TrainState:
    """All that a run must remember; everything else follows from it, the config and the store.

    ``update`` counts optimizer updates over the whole run: round, pass and minibatch are its digits,
    and every random key derives from names, so a state resumes anywhere, inside a reuse cycle too.
    """

    update: Any  # scalar int32
    params: Params
    opt_state: Any


@struct.dataclass
class Readings:
    """What one update says of itself."""

    sums: dict[str, tuple[Array, Array]]  # name -> (sum, count)
    drift_histogram: Array  # [bins] counts between `DRIFT_EDGES`
    weight_histogram: Array  # [bins] counts between `WEIGHT_EDGES`
    drift: Array  # [B, T]
    weights: Array  # [B, T]
    segments: Array  # [B, T], -1 everywhere without a gate


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Readings]]

# Which tokens share a gate, by the name in the config.
SEGMENTS: dict[str, Callable[[Rows, GateConfig, Array], Array]] = {
    "token": lambda rows, gate, newline: every_token(rows.mask),
    "block": lambda rows, gate, newline: fixed_blocks(rows.mask, gate.block, sequence_ids=rows.sequence_ids),
    "newline": lambda rows, gate, newline: newline_spans(
        newline[rows.targets],
        rows.mask,
        minimum=gate.span_minimum,
        maximum=gate.span_maximum,
        chunk=gate.span_chunk,
        sequence_ids=rows.sequence_ids,
    ),
    "sequence": lambda rows, gate, newline: whole_sequence(rows.mask, sequence_ids=rows.sequence_ids),
}


def base_loss(config: Config, student: Readout, signal: Signal) -> Array:
    """The unreduced loss ``[B, T]`` that the config names.

    ``student`` holds the sampled token first and the teacher's support behind it.
    """
    loss = config.loss
    if loss.kind == "teacher_topk":
        return topk_loss(student.logits[..., 1:], signal.support_logprobs)
    return sampled_token_loss(
        student.logprobs[..., 0],
        signal.old,
        signal.teacher,
        surrogate=loss.surrogate,
        advantage=loss.advantage,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
    )


def make_train_step(
    model: Qwen3Config,
    config: Config,
    optimizer: optax.GradientTransformation,
    newline: Any,
    shardings: TrainState,
    mesh: Mesh,
) -> TrainStep:
    """Compile the gated step for one mesh.

    Args:
      model: the student.
      config: loss, gate and sampling temperature.
      optimizer: applied to the gradient of the objective.
      newline: ``[V]`` bool, which ids end a line.
      shardings: of the state, from `state_shardings`.
      mesh: its batch axes split the rows.

    Returns:
      ``step(state, batch) -> (state, readings)``; the state is donated.
    """
    newline = jnp.asarray(newline)
    temperature = config.sampling.temperature

    def loss(params: Params, batch: Batch) -> tuple[Array, Readings]:
        rows, signal = batch.rows, batch.signal
        ids = jnp.concatenate([rows.targets[..., None], signal.support_ids], axis=-1)
        student = readout(params, rows, ids, model, temperature=temperature)
        cur = student.logprobs[..., 0]
        kind = config.gate.segments
        segments = None if kind == "none" else SEGMENTS[kind](rows, config.gate, newline)
        result = objective(
            cur,
            signal.old,
            rows.mask,
            base_loss(config, student, signal),
            segments,
            tau=config.gate.tau,
            statistic=config.gate.statistic,
            scope=config.gate.scope,
            eps=config.gate.eps,
            reduction=config.loss.reduction,
            sequence_ids=rows.sequence_ids,
        )
        sums = drift_diagnostics(
            cur,
            signal.old,
            signal.teacher,
            result.drift,
            result.weights,
            rows.mask,
            clip=(config.loss.clip_low, config.loss.clip_high),
        )
        one = jnp.ones(())
        sums["loss"] = (result.loss, one)
        sums["drift_max"] = (jnp.max(jnp.abs(result.drift)), one)
        sums["weight_min"] = (jnp.min(jnp.where(rows.mask, result.weights, jnp.inf)), one)
        sums["weight_max"] = (jnp.max(result.weights), one)
        sums["entropy"] = masked_sum(student.entropy, rows.mask)
        # A renormalised top-K loss is blind to mass outside its support: watch it from both sides.
        sums["student_support_mass"] = masked_sum(
            jnp.sum(jnp.exp(student.logprobs[..., 1:]), axis=-1), rows.mask
        )
        sums["teacher_support_mass"] = masked_sum(
            jnp.sum(jnp.exp(signal.support_logprobs), axis=-1), rows.mask
        )
        readings = Readings(
            sums=sums,
            drift_histogram=histogram(result.drift, rows.mask, DRIFT_EDGES),
            weight_histogram=histogram(result.weights, rows.mask, WEIGHT_EDGES),
            drift=result.drift,
            weights=result.weights,
            segments=jnp.full_like(rows.targets, -1) if segments is None else segments,
        )
        return result.loss, jax.lax.stop_gradient(readings)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Readings]:
        (_, readings), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        readings.sums["gradient_norm"] = (optax.tree.norm(gradient), jnp.ones(()))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.update + 1, params, opt_state), readings

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shardings(
    model: Qwen3Config, optimizer: optax.GradientTransformation, params: Params, mesh: Mesh
) -> TrainState:
    """NamedShardings of a whole state: optimizer moments lie where their parameters lie."""
    placed = param_shardings(model, mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        placed,
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(replicated(mesh), placed, opt_state)
