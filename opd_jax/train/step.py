"""The gated train step: one compiled function from (state, batch) to (state, readings)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from opd_jax.config import Config
from opd_jax.model.config import Qwen3Config
from opd_jax.model.parameters import Table, abstract_params
from opd_jax.model.sharding import batch_sharding, replicated, table_shardings
from opd_jax.train.gradient import Readings, gradient_of
from opd_jax.train.microbatches import gradient_in_parts
from opd_jax.types import Batch, Params

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


# (state, batch, frozen parameters) -> (state, readings)
TrainStep = Callable[[TrainState, Batch, Params], tuple[TrainState, Readings]]


def apply_gradient(
    state: TrainState, gradient: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """One optimizer update."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return TrainState(state.update + 1, optax.apply_updates(state.params, updates), opt_state)


def make_train_step(
    model: Qwen3Config,
    config: Config,
    optimizer: optax.GradientTransformation,
    newline: Any,
    shardings: TrainState,
    mesh: Mesh,
    frozen_shardings: Any = None,
) -> TrainStep:
    """Compile the gated step for one mesh.

    Args:
      model: the student.
      config: loss, gate and sampling temperature.
      optimizer: applied to the gradient of the objective.
      newline: ``[V]`` bool, which ids end a line.
      shardings: of the state, from `state_shardings`.
      mesh: its batch axes split the rows.
      frozen_shardings: of the parameters that are read but not trained, if there are any.

    Returns:
      ``step(state, batch, frozen) -> (state, readings)``; the state is donated, and ``frozen`` is empty
      unless an adapter is trained.
    """
    newline = jnp.asarray(newline)
    compute = gradient_of if config.schedule.microbatches == 1 else gradient_in_parts

    def step(state: TrainState, batch: Batch, frozen: Params) -> tuple[TrainState, Readings]:
        gradient, readings = compute(state.params, batch, state.update, config, model, newline, frozen)
        readings.whole["gradient_norm"] = optax.tree.norm(gradient)
        return apply_gradient(state, gradient, optimizer), readings

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), frozen_shardings or {}),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shardings(table: Table, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """NamedShardings of a whole state: optimizer moments lie where their parameters lie.

    ``table`` describes the parameters that are trained.
    """
    placed = table_shardings(table, mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract_params(table)),
        placed,
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(replicated(mesh), placed, opt_state)


def abstract_state(
    table: Table, optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """Shapes, dtypes and shardings of a whole state, nothing of it in memory."""
    state = jax.eval_shape(lambda params: init_state(params, optimizer), abstract_params(table))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings
    )
