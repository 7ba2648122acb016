"""The gated step with replicated parameters, under pmap or shard_map, for those who come from there.

Every device holds the whole state and a part of the rows; sums over the batch run over the mapped axis.
The value is that of `make_train_step`, whose sharding is left to the compiler.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.model.config import Qwen3Config
from opd_jax.train.gradient import gradient_of
from opd_jax.train.step import TrainState, TrainStep, apply_gradient
from opd_jax.types import Batch

Array = jax.Array
AXIS = "rows"


def make_mapped_update(
    model: Qwen3Config, config: Config, optimizer: optax.GradientTransformation, newline: Any
) -> Any:
    """``update(state, part) -> (state, loss)`` of one device, to be mapped over the axis `AXIS`.

    Raises:
      InputError: the config asks for micro-batches, which this step does not make.
    """
    if config.schedule.microbatches > 1:
        raise InputError(
            "a replicated step takes its rows at once: schedule.microbatches is "
            f"{config.schedule.microbatches}; use make_train_step, or 1"
        )
    newline = jnp.asarray(newline)

    def update(state: TrainState, part: Batch) -> tuple[TrainState, Array]:
        gradient, readings = gradient_of(
            state.params, part, state.update, config, model, newline, {}, axis_name=AXIS
        )
        # The loss is summed over the axis; what differentiation makes of that sum differs between pmap
        # (the part's own gradient, times the devices) and shard_map (the whole one on each): the mean
        # over the axis is right for both.
        gradient = jax.lax.pmean(gradient, AXIS)
        return apply_gradient(state, gradient, optimizer), readings.whole["loss"]

    return update


def shard_map_step(
    model: Qwen3Config, config: Config, optimizer: optax.GradientTransformation, newline: Any, mesh: Mesh
) -> TrainStep:
    """The step under ``jax.shard_map`` over a mesh with the one axis `AXIS`.

    Returns:
      ``step(state, batch) -> (state, loss)`` on whole arrays, rows split over the axis.
    """
    update = make_mapped_update(model, config, optimizer, newline)
    whole, rows = PartitionSpec(), PartitionSpec(AXIS)
    return jax.jit(
        jax.shard_map(update, mesh=mesh, in_specs=(whole, rows), out_specs=(whole, whole)), donate_argnums=0
    )


def pmap_step(
    model: Qwen3Config, config: Config, optimizer: optax.GradientTransformation, newline: Any
) -> TrainStep:
    """The step under ``jax.pmap`` over all devices.

    Returns:
      ``step(state, batch) -> (state, loss)`` on arrays with a leading axis of devices: the state
      replicated, the rows split.
    """
    return jax.pmap(make_mapped_update(model, config, optimizer, newline), axis_name=AXIS, donate_argnums=0)
