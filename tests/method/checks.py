"""What every unreduced loss is put through: its formula, its gradient, and what it may not read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.method import call, needs
from tests.method.batches import close, fields
from tests.oracle.differences import derivative


@functools.cache
def with_slopes(loss: Callable[..., Any], argnums: int | tuple[int, ...] = 0, **options: Any) -> Any:
    """An unreduced loss and the gradient of its sum, compiled."""

    def both(*arrays: Any) -> Any:
        function = functools.partial(loss, **options)
        return function(*arrays), jax.grad(lambda *x: jnp.sum(function(*x)), argnums)(*arrays)

    return jax.jit(both)


def agree(loss: Callable[..., Any], oracle: Callable[..., Any], x: Any, *rest: Any, **options: Any) -> None:
    """The loss and its gradient in ``x`` are the oracle's and the oracle's differences, to 2e-5."""
    value, slope = with_slopes(loss, **options)(x, *rest)
    close(value, oracle(x))
    want, smooth = derivative(oracle, x)
    close(np.where(smooth, slope, want), want)
    assert smooth.mean() > 0.5


def behind(mask: Any, tree: Any, garbage: float) -> Any:
    """The arrays, ``[B, T]`` or ``[B, T, K]``, with garbage behind the mask."""
    return jax.tree.map(
        lambda x: np.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, np.float32(garbage)), tree
    )


def reads_nothing_behind_the_mask(loss: Callable[..., Any], **options: Any) -> None:
    """Value and gradients are those of the tokens inside, whatever lies behind, and finite at 1e4 nats."""
    batch, loss = fields(), functools.partial(loss, **options)
    mask, names = batch["mask"], needs(loss)
    x = {name: batch[name] for name in names if batch[name].dtype == np.float32}
    rest = {name: batch[name] for name in names if name not in x}

    @functools.partial(jax.value_and_grad, has_aux=True)
    def given_no_mask(x: Any) -> Any:
        value = call(loss, x | rest)
        return jnp.sum(value * mask), value

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def function(x: Any, mask: Any) -> Any:
        value = call(loss, x | rest | {"mask": mask})
        return jnp.sum(value), value

    (_, value), slopes = given_no_mask(x)
    for garbage in (np.nan, np.inf, -np.inf):
        (_, dirty_value), dirty_slopes = function(behind(mask, x, garbage), mask)
        chex.assert_tree_all_finite(dirty_value)
        chex.assert_trees_all_close(
            behind(mask, dirty_value, 0), behind(mask, value, 0), rtol=1e-6, atol=1e-7
        )
        chex.assert_trees_all_close(dirty_slopes, behind(mask, slopes, 0), rtol=1e-6, atol=1e-7)
        nothing = np.zeros_like(mask)
        (_, empty_value), empty_slopes = function(behind(nothing, x, garbage), nothing)
        chex.assert_tree_all_finite(empty_value)
        chex.assert_trees_all_equal(empty_slopes, behind(nothing, slopes, 0))
    rng = np.random.default_rng(1)
    extreme = {name: rng.choice(np.float32([-1e4, -1, 0]), size=array.shape) for name, array in x.items()}
    chex.assert_tree_all_finite(function(extreme, mask))
