"""The same gradient in parts, to save memory: equal to the whole up to rounding.

Drift gates as the paper prints them take one sweep (`opd_jax.method.accumulate`). Weights that need the
whole minibatch to be made take a forward-only sweep first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.config import Config
from opd_jax.method import Share, divisor, drift_weights, masked, merge, rescale, share, token_share
from opd_jax.model.config import Qwen3Config
from opd_jax.model.precision import exact_products
from opd_jax.train.choices import base_loss, gate_options, is_linear
from opd_jax.train.fields import drawn_fields, read_fields
from opd_jax.train.gradient import Readings, read
from opd_jax.types import Batch, Params

Array = jax.Array


def gradient_in_parts(
    params: Params,
    batch: Batch,
    update: Array,
    config: Config,
    model: Qwen3Config,
    newline: Array,
    frozen: Params,
) -> tuple[Params, Readings]:
    """`gradient_of` with ``schedule.microbatches`` parts of the batch in memory one after another."""
    count = config.schedule.microbatches
    parts, read_part = _parts(batch, update, config, model, newline, frozen)
    sweep = _in_one_sweep if is_linear(config) else _in_two_sweeps
    gradient, loss, fields = sweep(params, parts, config, read_part)
    return gradient, read(config, fields, loss, *weights_of(config, fields, count))


def fields_in_parts(
    params: Params,
    batch: Batch,
    update: Array,
    config: Config,
    model: Qwen3Config,
    newline: Array,
    frozen: Params,
) -> dict[str, Any]:
    """All that losses and weights may ask for of a minibatch, detached, read part by part."""
    parts, read_part = _parts(batch, update, config, model, newline, frozen)
    return _forward(params, parts, read_part)


def _parts(
    batch: Batch, update: Array, config: Config, model: Qwen3Config, newline: Array, frozen: Params
) -> tuple[Any, Any]:
    """Parts of a batch, and the function that reads the fields of one."""
    drawn = drawn_fields(config, update, batch.rows.targets.shape)
    noise = drawn.pop("noise")

    def read_part(params: Params, part: tuple[Batch, Array]) -> dict[str, Any]:
        fields = read_fields(params, part[0], config, model, newline, frozen)
        return {**fields, **drawn, "noise": part[1]}

    return split((batch, noise), config.schedule.microbatches), read_part


def _forward(params: Params, parts: Any, read_part: Any) -> dict[str, Any]:
    def sweep(_: None, part: Any) -> tuple[None, dict]:
        return None, read_part(params, part)

    _, swept = jax.lax.scan(sweep, None, parts)
    return _joined(_kept(swept))


def weights_of(config: Config, fields: dict[str, Any], count: int = 1) -> tuple[Array, Array]:
    """Drift and weights ``[B, T]`` of a minibatch of fields, computed in ``count`` micro-batches.

    With ``gate.scope=microbatch``, and only then, each of them is by itself in all that makes a weight.
    """

    def weights(fields: dict[str, Any]) -> tuple[Array, Array]:
        return drift_weights(
            fields["cur"], fields["old"], fields["mask"], fields["segments"], **gate_options(config, fields)
        )

    if count == 1 or config.gate.scope != "microbatch":
        return weights(fields)
    shared = {name: fields[name] for name in _SCALARS}
    parts = split({name: value for name, value in fields.items() if name not in (*shared, *_SUMS)}, count)
    return join(jax.lax.map(lambda part: weights(part | shared), parts))


def split(tree: Any, count: int) -> Any:
    """``[B, ...]`` arrays as ``[count, B / count, ...]``: part a has the rows a, a + count, ...

    Each part then has rows of every device that rows are spread over.
    """
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), tree)


def join(tree: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def _in_one_sweep(params: Params, parts: Any, config: Config, read_part: Any) -> tuple[Params, Array, dict]:
    gate = config.gate
    tau, statistic = gate.tau, gate.statistic

    def loss(params: Params, part: Any) -> tuple[Array, tuple[Share, dict]]:
        fields = read_part(params, part)
        mine = share(
            fields["cur"],
            fields["old"],
            fields["mask"],
            base_loss(config, fields),
            fields["segments"],
            tau=tau,
            statistic=statistic,
        )
        return mine.weighted, (mine, fields)

    def add(so_far: tuple[Params, Share], part: Any) -> tuple[tuple[Params, Share], dict]:
        gradient, total = so_far
        with exact_products(config.model.compute_dtype):
            (_, (mine, fields)), more = jax.value_and_grad(loss, has_aux=True)(params, part)
        both = merge(total, mine, tau)
        gradient = jax.tree.map(
            lambda a, b: rescale(a, total.least, both.least, tau) + rescale(b, mine.least, both.least, tau),
            gradient,
            more,
        )
        return (gradient, both), _kept(fields)

    zero = jnp.zeros(())
    start = (jax.tree.map(jnp.zeros_like, params), Share(zero, zero, zero, jnp.full((), jnp.inf)))
    (gradient, whole), fields = jax.lax.scan(add, start, parts)
    by = divisor(whole, gate.eps)
    return jax.tree.map(lambda x: x / by, gradient), whole.weighted / by, _joined(fields)


def _in_two_sweeps(params: Params, parts: Any, config: Config, read_part: Any) -> tuple[Params, Array, dict]:
    fields = _forward(params, parts, read_part)
    _, w = weights_of(config, fields, config.schedule.microbatches)
    each = token_share(fields["mask"], reduction=config.loss.reduction, sequence_ids=fields["sequence_ids"])
    count = jnp.sum(each)
    by = jnp.where(count > 0, count, 1.0)

    def loss(params: Params, part: Any, weight: Array) -> Array:
        fields = read_part(params, part)
        return jnp.sum(weight * masked(base_loss(config, fields), fields["mask"])) / by

    def add(so_far: tuple[Params, Array], now: Any) -> tuple[tuple[Params, Array], None]:
        with exact_products(config.model.compute_dtype):
            value, more = jax.value_and_grad(loss)(params, *now)
        return (jax.tree.map(jnp.add, so_far[0], more), so_far[1] + value), None

    start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    (gradient, value), _ = jax.lax.scan(add, start, (parts, split(each * w, config.schedule.microbatches)))
    return gradient, value, fields


_SCALARS = ("step", "key")
_SUMS = ("routing",)


def _kept(fields: dict[str, Any]) -> dict[str, Any]:
    """What a sweep hands on: everything without a gradient."""
    return jax.lax.stop_gradient(fields)


def _joined(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of the whole minibatch from those of its parts."""

    def whole(name: str, value: Any) -> Any:
        if name in _SCALARS:
            return jax.tree.map(lambda x: x[0], value)
        if name in _SUMS:
            return jax.tree.map(lambda x: jnp.sum(x, axis=0), value)
        return join(value)

    return {name: whole(name, value) for name, value in fields.items()}
