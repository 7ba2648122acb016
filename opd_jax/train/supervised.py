"""Supervised training on written answers: how the lab's models come to be."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax

from opd_jax.method.losses import cross_entropy
from opd_jax.method.objective import token_mean
from opd_jax.model.config import Qwen3Config
from opd_jax.model.precision import exact_products
from opd_jax.model.vocab import token_logprobs
from opd_jax.types import Params, Rows

SupervisedStep = Callable[[Params, optax.OptState, Rows], tuple[Params, optax.OptState, jax.Array]]


def make_supervised_step(config: Qwen3Config, optimizer: optax.GradientTransformation) -> SupervisedStep:
    """A compiled step of mean cross-entropy over response tokens.

    Returns:
      ``step(params, opt_state, rows) -> (params, opt_state, loss)``; the first two are donated.
    """

    def loss(params: Params, rows: Rows) -> jax.Array:
        return token_mean(cross_entropy(token_logprobs(params, rows, config)), rows.mask)

    def step(
        params: Params, opt_state: optax.OptState, rows: Rows
    ) -> tuple[Params, optax.OptState, jax.Array]:
        with exact_products(config.compute_dtype):
            value, gradient = jax.value_and_grad(loss)(params, rows)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))
