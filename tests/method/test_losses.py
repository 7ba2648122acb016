"""Base losses: literal numbers, loops, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from opd_jax.method import sampled_token_loss, topk_loss
from tests import oracle_numpy

SHAPE = (2, 6)
nats = arrays(np.float32, SHAPE, elements=st.floats(-4, 0, width=32))
fast = settings(max_examples=40, deadline=None)


@fast
@given(nats, nats, nats, st.sampled_from(["ppo", "is", "reinforce"]), st.sampled_from(["old", "cur"]))
def test_sampled_token_loss_is_the_formula(cur, old, tea, surrogate, advantage):
    got = sampled_token_loss(cur, old, tea, surrogate=surrogate, advantage=advantage)
    want = oracle_numpy.sampled_token(cur, old, tea, surrogate, advantage)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)


def test_ppo_by_hand():
    # rho = e^d; A = tea - old. One case per branch of the clip.
    d = jnp.log(jnp.array([[1.0, 1.5, 0.5, 1.5, 5.0]]))
    old = jnp.full((1, 5), -2.0)
    a = jnp.array([[1.0, 1.0, 1.0, -1.0, -1.0]])
    got = sampled_token_loss(old + d, old, old + a)
    # unclipped -1; clipped at 1.2; pessimistic 0.5; -A rho = 1.5; 5 cut to 3 by the dual clip
    np.testing.assert_allclose(got, [[-1.0, -1.2, -0.5, 1.5, 3.0]], rtol=1e-6)


def test_gradient_is_zero_where_the_ratio_is_clipped():
    d = jnp.log(jnp.array([1.5, 0.5, 5.0, 1.0]))
    old, a = jnp.full(4, -2.0), jnp.array([1.0, -1.0, -1.0, 1.0])
    gradient = jax.grad(lambda cur: jnp.sum(sampled_token_loss(cur, old, old + a)))(old + d)
    np.testing.assert_allclose(gradient, [0.0, 0.0, 0.0, -1.0], atol=1e-6)


def test_at_no_drift_all_three_surrogates_have_one_gradient():
    cur = jnp.array([[-1.0, -2.0]])
    tea = jnp.array([[-0.5, -3.0]])
    gradients = [
        jax.grad(lambda c, s=s, a=a: jnp.sum(sampled_token_loss(c, cur, tea, surrogate=s, advantage=a)))(cur)
        for s in ("ppo", "is", "reinforce")
        for a in ("old", "cur")
    ]
    for gradient in gradients:
        np.testing.assert_allclose(gradient, [[-0.5, 1.0]], rtol=1e-6)


def test_a_recomputed_advantage_is_a_reward_not_a_path_for_gradient():
    old, tea = jnp.array([[-1.0]]), jnp.array([[-2.0]])
    loss = lambda c: jnp.sum(sampled_token_loss(c, old, tea, surrogate="is", advantage="cur"))  # noqa: E731
    cur = jnp.array([[-1.5]])
    # d/dcur of -rho A with A held: -rho A = -e^-0.5 * (-0.5)
    np.testing.assert_allclose(jax.grad(loss)(cur), [[np.exp(-0.5) * 0.5]], rtol=1e-6)


def test_huge_ratios_stay_finite():
    cur, old = jnp.array([[1e4, -1e4]]), jnp.zeros((1, 2))
    for surrogate in ("ppo", "is", "reinforce"):
        value, gradient = jax.value_and_grad(
            lambda c, s=surrogate: jnp.sum(sampled_token_loss(c, old, old, surrogate=s))
        )(cur)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


supports = arrays(np.float32, (2, 3, 4), elements=st.floats(-5, 5, width=32))


@fast
@given(supports, supports)
def test_topk_loss_and_gradient(logits, teacher):
    loss, gradient = oracle_numpy.topk(logits, teacher)
    np.testing.assert_allclose(topk_loss(logits, teacher), loss, rtol=1e-4, atol=2e-5)
    got = jax.grad(lambda z: jnp.sum(topk_loss(z, teacher)))(jnp.array(logits))
    np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=2e-5)


def test_topk_gradient_is_exactly_zero_off_the_support():
    logits = jnp.array(np.random.default_rng(0).normal(size=(1, 2, 9)).astype(np.float32))
    ids = jnp.array([[[1, 4, 7], [0, 2, 8]]])
    teacher = jnp.log(jnp.array([[[0.5, 0.2, 0.1], [0.6, 0.3, 0.05]]]))
    loss = lambda z: jnp.sum(topk_loss(jnp.take_along_axis(z, ids, axis=-1), teacher))  # noqa: E731
    gradient = np.asarray(jax.grad(loss)(logits))
    on = np.zeros((1, 2, 9), bool)
    np.put_along_axis(on, np.asarray(ids), True, axis=-1)
    assert (gradient[~on] == 0).all()
    assert (gradient[on] != 0).all()


def test_one_token_of_support_is_no_signal():
    assert (np.asarray(topk_loss(jnp.ones((2, 3, 1)), jnp.zeros((2, 3, 1)))) == 0).all()


def test_unknown_names_are_refused():
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="surrogate must be"):
        sampled_token_loss(x, x, x, surrogate="trpo")
    with pytest.raises(ValueError, match="advantage must be"):
        sampled_token_loss(x, x, x, advantage="new")
