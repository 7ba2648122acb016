"""Matrix products of float32 are asked for in float32: on a GPU and a TPU they are coarser by default."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

from opd_jax.model import init_params, token_logprobs
from opd_jax.model.forward import decode, empty_cache, logits
from opd_jax.model.lora import LoraConfig, init_lora, on_top
from opd_jax.rollout import make_rows
from opd_jax.train.supervised import make_supervised_step

FULL = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def inner_jaxprs(value):
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from inner_jaxprs(one)


def products(jaxpr):
    """(dtypes of the factors, precision) of every matrix product, those of loops and gradients too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot", "ragged_dot_general"):
            yield tuple(x.aval.dtype.name for x in equation.invars[:2]), equation.params["precision"]
        for value in equation.params.values():
            for inner in inner_jaxprs(value):
                yield from products(inner)


def all_products(small, mixture, dtype):
    config, _ = small
    if mixture:
        config = dataclasses.replace(config, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
    config = dataclasses.replace(config, compute_dtype=dtype, lora_alpha=8.0)
    params = init_params(config, jax.random.key(0))
    targets = ("query", "output") if mixture else ("query", "output", "down")
    adapted = on_top(params, init_lora(config, LoraConfig(2, 8.0, targets), jax.random.key(1)))
    rows = jax.tree.map(jnp.asarray, make_rows([np.arange(3)], [np.arange(4)], 8))

    def read(params):
        return token_logprobs(params, rows, config).sum()

    def draw(params):
        cache = empty_cache(config, 1, 8)
        hidden, cache = decode(params, jnp.ones((1, 1), int), jnp.zeros((1, 1), int), cache, config)
        return logits(hidden, params, config), cache

    for program in (jax.grad(read), draw):
        found = list(products(jax.make_jaxpr(program)(adapted).jaxpr))
        assert len(found) > 10
        yield from found


@pytest.mark.parametrize("mixture", [False, True])
def test_every_product_of_float32_is_exact(small, mixture):
    for dtypes, precision in all_products(small, mixture, "float32"):
        assert dtypes == ("float32", "float32")
        assert precision == FULL


def test_so_are_those_of_a_kernel_with_a_backward_pass_of_its_own(small):
    config = dataclasses.replace(small[0], head_dim=128, attention="splash")
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    optimizer = optax.sgd(1.0)
    step = make_supervised_step(config, optimizer)
    rows = jax.tree.map(jnp.asarray, make_rows([np.arange(3)], [np.arange(4)], 128))
    found = list(products(jax.make_jaxpr(step)(params, jax.eval_shape(optimizer.init, params), rows).jaxpr))
    assert len(found) > 20
    assert {precision for _, precision in found} == {FULL}


def test_products_of_bfloat16_are_left_alone(small):
    found = list(all_products(small, True, "bfloat16"))
    assert FULL not in [precision for _, precision in found]
    assert {dtypes for dtypes, _ in found} >= {("bfloat16", "bfloat16")}


def test_who_asks_for_a_precision_gets_it(small):
    with jax.default_matmul_precision("tensorfloat32"):
        found = [precision for _, precision in all_products(small, False, "float32")]
    assert FULL not in found
    assert None not in found
