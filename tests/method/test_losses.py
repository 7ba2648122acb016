"""Base losses: literal numbers, loops, gradients, limits that tie them together."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from opd_jax.method import (
    cross_entropy,
    full_kl_loss,
    importance_ratio,
    sampled_token_loss,
    student_topk_loss,
    surrogate_loss,
    topk_generalised_loss,
    topk_loss,
    topk_tail_loss,
    topk_unrenormalised_loss,
)
from tests.method.batches import SHAPE, K, close, few, fewer, fields, floats, nats, support, typical
from tests.method.checks import agree, reads_nothing_behind_the_mask, with_slopes
from tests.oracle import losses as oracle

surrogates = pytest.mark.parametrize("surrogate", ["ppo", "is", "reinforce"])
advantages = pytest.mark.parametrize("advantage", ["old", "cur"])
# Of probabilities that leave some mass outside the support.
inside = typical(-8, -1.2, (*SHAPE, K)) | floats(-8, -1.25, (*SHAPE, K))


@surrogates
@advantages
@pytest.mark.parametrize("clip", [{}, {"low": 0.1, "high": 0.5, "dual": 1.5}])
@fewer
@given(nats, nats, nats)
def test_sampled_token_loss_is_the_formula(clip, advantage, surrogate, cur, old, tea):
    agree(
        sampled_token_loss,
        lambda x: oracle.sampled_token(x, old, tea, surrogate, advantage, held=cur, **clip),
        cur,
        old,
        tea,
        surrogate=surrogate,
        advantage=advantage,
        **{{"low": "clip_low", "high": "clip_high", "dual": "dual_clip"}[k]: v for k, v in clip.items()},
    )


@surrogates
@fewer
@given(nats, nats, nats)
def test_surrogate_of_any_advantage(surrogate, cur, old, a):
    def loops(x):
        return oracle.positions(functools.partial(oracle.surrogate, kind=surrogate), x, old, a + 2)

    agree(surrogate_loss, loops, cur, old, a + 2, surrogate=surrogate)


@surrogates
@advantages
@fewer
@given(support, support, support)
def test_student_topk_loss_is_the_formula(advantage, surrogate, cur, old, tea):
    agree(
        student_topk_loss,
        lambda x: oracle.student_topk(x, old, tea, surrogate, advantage, held=cur),
        cur,
        old,
        tea,
        surrogate=surrogate,
        advantage=advantage,
    )


@few
@given(nats)
def test_cross_entropy_is_the_formula(cur):
    agree(cross_entropy, oracle.cross_entropy, cur)


@few
@given(floats(-5, 5, (*SHAPE, K)) | typical(-5, 5, (*SHAPE, K)), support)
def test_topk_loss_has_the_printed_gradient(logits, teacher):
    loss, slope = with_slopes(topk_loss)(logits, teacher)
    close(loss, oracle.topk(logits, teacher))
    close(slope, oracle.topk_gradient(logits, teacher))


@few
@given(inside, inside)
def test_losses_of_raw_probabilities_are_the_formulas(log_p, log_q):
    for function, loops in (
        (topk_unrenormalised_loss, oracle.topk_unrenormalised),
        (topk_tail_loss, oracle.topk_tail),
        (topk_generalised_loss, oracle.topk_generalised),
    ):
        agree(function, lambda x, loops=loops: loops(x, log_q), log_p, log_q)
    assert np.min(topk_generalised_loss(log_p, log_q)) >= -1e-6
    np.testing.assert_allclose(topk_generalised_loss(log_q, log_q), 0, atol=1e-7)


def test_ppo_by_hand():
    # rho = e^d; A = tea - old. One case per branch of the clip.
    d = jnp.log(jnp.array([[1.0, 1.5, 0.5, 1.5, 5.0, 0.5]]))
    old = jnp.full((1, 6), -2.0)
    a = jnp.array([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]])
    got, slope = with_slopes(sampled_token_loss)(old + d, old, old + a)
    # unclipped; clipped at 1.2; pessimistic 0.5; -A rho = 1.5; 5 cut to 3 by the dual clip; clipped at 0.8
    np.testing.assert_allclose(got, [[-1.0, -1.2, -0.5, 1.5, 3.0, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(slope, [[-1.0, 0.0, -0.5, 1.5, 0.0, 0.0]], rtol=1e-6)
    got = sampled_token_loss(old + d, old, old + a, clip_low=0.1, clip_high=0.4, dual_clip=2.0)
    np.testing.assert_allclose(got, [[-1.0, -1.4, -0.5, 1.5, 2.0, 0.9]], rtol=1e-6)


def test_at_no_drift_all_surrogates_have_one_gradient():
    cur, tea = jnp.array([[-1.0, -2.0]]), jnp.array([[-0.5, -3.0]])
    for surrogate in ("ppo", "is", "reinforce"):
        for advantage in ("old", "cur"):
            options = {"surrogate": surrogate, "advantage": advantage}
            slope = with_slopes(sampled_token_loss, **options)(cur, cur, tea)[1]
            np.testing.assert_allclose(slope, [[-0.5, 1.0]], rtol=1e-6)


@pytest.mark.parametrize("loss", [sampled_token_loss, student_topk_loss])
def test_behaviour_teacher_and_advantage_are_detached(loss):
    cur, old, tea = (jnp.array(np.random.default_rng(i).normal(size=(1, 2, K))) for i in range(3))
    if loss is sampled_token_loss:
        cur, old, tea = cur[0], old[0], tea[0]
    for advantage in ("old", "cur"):
        slopes = with_slopes(loss, argnums=(1, 2), advantage=advantage)(cur, old, tea)[1]
        chex.assert_trees_all_equal(slopes, (0 * old, 0 * tea))
    # Held, the advantage makes the loss of reinforce linear in cur.
    slope = with_slopes(loss, surrogate="reinforce", advantage="cur")(cur, old, tea)
    if loss is sampled_token_loss:
        np.testing.assert_allclose(slope[1], cur - tea, rtol=1e-5)


@pytest.mark.parametrize("loss", [topk_loss, topk_unrenormalised_loss, topk_tail_loss, topk_generalised_loss])
def test_the_teacher_on_the_support_is_detached(loss):
    log_p, log_q = (jax.nn.log_softmax(fields(i)["student_logits"])[..., :K] for i in (0, 1))
    slope = with_slopes(loss, argnums=1)(log_p, log_q)[1]
    np.testing.assert_array_equal(slope, 0 * log_q)


def test_topk_gradient_is_exactly_zero_off_the_support():
    logits = jnp.array(np.random.default_rng(0).normal(size=(1, 2, 9)).astype(np.float32))
    ids = jnp.array([[[1, 4, 7], [0, 2, 8]]])
    teacher = jnp.log(jnp.array([[[0.5, 0.2, 0.1], [0.6, 0.3, 0.05]]]))
    slope = jax.grad(lambda z: jnp.sum(topk_loss(jnp.take_along_axis(z, ids, axis=-1), teacher)))(logits)
    on = np.asarray(jax.nn.one_hot(ids, 9).sum(-2) > 0)
    assert (np.asarray(slope)[~on] == 0).all()
    on_support = oracle.topk_gradient(np.take_along_axis(np.asarray(logits), np.asarray(ids), -1), teacher)
    close(np.take_along_axis(np.asarray(slope), np.asarray(ids), -1), on_support)
    assert (on_support != 0).all()


def test_the_support_losses_meet_where_the_support_is_everything():
    log_p, log_q = (jax.nn.log_softmax(fields(i)["student_logits"]) for i in (0, 1))
    want = full_kl_loss(log_p, log_q)
    close(topk_loss(log_p, log_q), want)
    close(topk_unrenormalised_loss(log_p, log_q), want)
    close(topk_generalised_loss(log_p, log_q), want)
    close(topk_tail_loss(log_p, log_q), want, atol=1e-4)  # 1e-6 counts as outside
    close(student_topk_loss(log_p, log_p, log_q), want)
    # There the policy gradient over the support is the divergence's, too; its logits are the log-probs.
    _, slope = with_slopes(full_kl_loss)(log_p, log_q)
    policy = jax.grad(lambda z: jnp.sum(student_topk_loss(jax.nn.log_softmax(z), log_p, log_q)))(log_p)
    close(policy, slope)


def test_the_tail_bounds_the_divergence_from_below():
    log_p, log_q = (jax.nn.log_softmax(fields(i)["student_logits"]) for i in (0, 1))
    tails = [topk_tail_loss(log_p[..., :k], log_q[..., :k]) for k in (1, 3, 5)]
    for coarse, fine in zip(tails, [*tails[1:], full_kl_loss(log_p, log_q)], strict=True):
        assert (coarse <= fine + 1e-6).all()


def test_one_token_of_support_is_no_signal():
    loss, slope = with_slopes(topk_loss)(jnp.ones((2, 3, 1)), jnp.zeros((2, 3, 1)))
    chex.assert_trees_all_equal((loss, slope), (jnp.zeros((2, 3)), jnp.zeros((2, 3, 1))))


def test_ratios_are_capped_at_twenty_nats():
    for cur, want in ((1e4, np.exp(20)), (-1e4, np.exp(-20)), (0.5, np.exp(0.5))):
        np.testing.assert_allclose(importance_ratio(jnp.array(cur), jnp.array(0.0)), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        *(
            (sampled_token_loss, {"surrogate": s, "advantage": a})
            for s in ("ppo", "is")
            for a in ("old", "cur")
        ),
        (sampled_token_loss, {"surrogate": "reinforce"}),
        (student_topk_loss, {}),
        (cross_entropy, {}),
        (topk_loss, {}),
        (topk_unrenormalised_loss, {}),
        (topk_tail_loss, {}),
        (topk_generalised_loss, {}),
    ],
)
def test_nothing_behind_the_mask_is_read(loss, options):
    reads_nothing_behind_the_mask(loss, **options)


def test_a_surrogate_reads_nothing_behind_the_mask():
    def loss(cur, old, base, *, mask=None):
        return surrogate_loss(cur, old, base, mask=mask)

    reads_nothing_behind_the_mask(loss)


ON_SUPPORT = (topk_loss, topk_unrenormalised_loss, topk_tail_loss, topk_generalised_loss)


@pytest.mark.parametrize("loss", ON_SUPPORT)
def test_an_id_that_the_student_excludes_adds_nothing(loss):
    log_p, log_q = np.log(np.float32([[[0.3, 0.2, 0.1]]])), np.log(np.float32([[[0.2, 0.3, 0.4]]]))
    log_p[..., 2] = -80
    without, slope = with_slopes(loss)(log_p, log_q)
    log_p[..., 2] = -np.inf
    got, got_slope = with_slopes(loss)(log_p, log_q)
    close(got, without)
    close(got_slope, slope)
    assert got_slope[0, 0, 2] == 0


def test_an_id_that_student_and_behaviour_exclude_has_no_surrogate():
    log_p = np.float32([[[-0.1, -2.0, -np.inf]]])
    log_q = np.log(np.float32([[[0.2, 0.3, 0.4]]]))
    for advantage in ("old", "cur"):
        got = with_slopes(student_topk_loss, advantage=advantage)(log_p, log_p, log_q)
        chex.assert_tree_all_finite(got)
        want = with_slopes(student_topk_loss, advantage=advantage)(np.maximum(log_p, -80), log_p, log_q)
        close(got[0], want[0])
    assert got[1][0, 0, 2] == 0


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_jit_without_and_under_pmap(self):
        batch = fields(3)
        args = batch["student_logits_on_support"], batch["teacher_logprobs_on_support"]
        got = self.variant(jax.value_and_grad(lambda z, q: jnp.sum(topk_loss(z, q))))(*args)
        chex.assert_tree_shape_prefix(got, ())
        close(got[0], oracle.topk(*args).sum())
        close(got[1], oracle.topk_gradient(*args))


def test_unknown_names_are_refused():
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="surrogate must be"):
        sampled_token_loss(x, x, x, surrogate="trpo")
    for loss, array in ((sampled_token_loss, x), (student_topk_loss, x[..., None])):
        with pytest.raises(ValueError, match="advantage must be"):
            loss(array, array, array, advantage="new")


def test_a_support_that_holds_all_stops_nobody_who_debugs_with_nans():
    log_p = jnp.log(jnp.array([[[0.5, 0.5]]]))
    with jax.debug_nans(True):
        assert np.isfinite(topk_tail_loss(log_p, log_p)).all()
        assert np.isfinite(jax.grad(lambda x: topk_tail_loss(x, log_p).sum())(log_p)).all()
