"""Routing: what is counted, and what experts that are elsewhere may not touch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.model.moe import Routing, route, routing_readings, serve
from tests.model.test_sharding import MIXTURE


def weights(rng, experts, width, inner):
    shapes = {"expert_gate": (width, inner), "expert_up": (width, inner), "expert_down": (inner, width)}
    return {name: rng.normal(size=(experts, *shape)).astype(np.float32) for name, shape in shapes.items()}


def test_experts_that_are_elsewhere_add_nothing_and_the_parts_add_up():
    rng = np.random.default_rng(0)
    x, all_of_them = rng.normal(size=(7, 6)).astype(np.float32), weights(rng, 4, 6, 5)
    chosen = np.array([rng.permutation(4)[:2] for _ in range(7)])
    share = rng.uniform(size=(7, 2)).astype(np.float32)
    whole = serve(x, chosen, share, all_of_them)
    first, second = (
        serve(x, chosen - at, share, {name: w[at : at + 2] for name, w in all_of_them.items()})
        for at in (0, 2)
    )
    np.testing.assert_allclose(first + second, whole, atol=1e-5)
    nobody = serve(x, chosen + 4, share, all_of_them)
    np.testing.assert_array_equal(nobody, np.zeros_like(x))


def test_no_token_is_dropped_when_all_go_to_one_expert():
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(50, 6)).astype(np.float32), weights(rng, 8, 6, 5)
    got = serve(x, np.full((50, 1), 3), np.ones((50, 1), np.float32), w)
    gate, up = x @ w["expert_gate"][3], x @ w["expert_up"][3]
    np.testing.assert_allclose(
        got, (gate / (1 + np.exp(-gate)) * up) @ w["expert_down"][3], rtol=1e-4, atol=1e-5
    )


def test_a_router_counts_tokens_but_no_padding():
    rng = np.random.default_rng(2)
    x, router = rng.normal(size=(6, 24)), rng.normal(size=(24, 8))
    valid = np.array([True] * 4 + [False] * 2)
    chosen, share, routing = route(jnp.array(x), jnp.array(router), jnp.array(valid), MIXTURE)
    p = np.exp(x @ router) / np.exp(x @ router).sum(-1, keepdims=True)
    np.testing.assert_array_equal(chosen, np.argsort(-p, axis=-1)[:, :3])
    np.testing.assert_allclose(share.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(routing.tokens, np.bincount(np.ravel(chosen[:4]), minlength=8))
    np.testing.assert_allclose(routing.entropy, -(p * np.log(p))[:4].sum(), rtol=1e-5)
    assert routing.count == 4


def test_routing_readings_by_hand():
    # Two layers, four experts, eight routed tokens of two experts each: one layer balanced, one collapsed.
    routing = Routing(
        tokens=jnp.array([[4.0, 4, 4, 4], [8, 8, 0, 0]]),
        entropy=jnp.array([8 * 1.25, 8 * 0.75]),
        count=jnp.array([8.0, 8.0]),
    )
    got = {name: float(total / count) for name, (total, count) in routing_readings(routing).items()}
    # Imbalance 4 * 4 / 16 = 1 and 4 * 2 / 4 = 2; the largest expert of the second gets 4 * 1/2 = 2.
    want = {"router_entropy": 1.0, "router_imbalance": 1.5, "router_largest": 2.0, "router_idle": 0.25}
    assert got == want


def test_the_gradient_reaches_the_router():
    rng = np.random.default_rng(3)
    x, w = jnp.array(rng.normal(size=(5, 24))), weights(rng, 8, 24, 5)
    router = jnp.array(rng.normal(size=(24, 8)))

    def loss(router):
        chosen, share, _ = route(x, router, jnp.ones(5, bool), MIXTURE)
        return jnp.sum(jnp.sin(serve(x, chosen, share, w)))

    step = 1e-3 * jnp.array(rng.normal(size=router.shape))
    slope = (loss(router + step) - loss(router - step)) / 2
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(router), step), slope, rtol=2e-2)
