"""Losses that add to a base loss or switch it: loops, literal numbers, what is detached."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from opd_jax.method import (
    entropy_aware_loss,
    importance_ratio,
    reference_kl,
    sampled_token_loss,
    scope_loss,
    sign_gated_advantage,
    sign_gated_loss,
    stable_loss,
    topk_forward_kl,
    trust_region_loss,
)
from tests.method.batches import SHAPE, close, compiled, few, fields, nats, support, typical
from tests.method.checks import agree, reads_nothing_behind_the_mask, with_slopes
from tests.oracle import mixed_losses as oracle

unit = typical(0, 1)
rewards = unit.map(lambda x: np.float32(x > 0.5))
SIGNS = {"extrapolation": 1.8, "conflict": 0.5}


@few
@given(support, support)
def test_forward_kl_on_the_support_is_the_formula(log_p, log_q):
    agree(topk_forward_kl, lambda x: oracle.topk_forward_kl(x, log_q), log_p, log_q)


@few
@given(support, support, nats, unit)
def test_forward_kl_is_added_where_the_teacher_is_unsure(log_p, log_q, base, entropy):
    loss = compiled(entropy_aware_loss, alpha=0.7, entropy_threshold=0.75)
    for entropies in (entropy + 0.3, np.full(SHAPE, 0.75, np.float32)):  # the threshold itself is unsure
        want = oracle.entropy_aware(base, entropies, log_p, log_q, 0.7, 0.75)
        close(loss(base, entropies, log_p, log_q), want)
    slope = with_slopes(entropy_aware_loss, argnums=(0, 2))(base, entropy, log_p, log_q)[1]
    unsure = (entropy >= 0.8)[..., None]
    close(slope[0], np.ones(SHAPE))  # the base stays on every token
    close(slope[1], -np.exp(log_q) * unsure)


@few
@given(support, support, nats, nats, nats, unit)
def test_outliers_get_forward_kl_instead(log_p, log_q, base, cur, tea, noise):
    args = (base, cur, tea, log_p, log_q, noise)
    value, slopes = with_slopes(trust_region_loss, argnums=(0, 1, 3))(*args)
    want = oracle.trust_region(*args)
    close(value, want)
    kept = noise < np.exp(np.minimum(tea.astype(np.float64) - cur, 0))
    close(slopes[0], kept)
    close(slopes[1], 0 * cur)  # the draw is no path for a gradient
    close(slopes[2], -np.exp(log_q) * ~kept[..., None])


def test_a_token_the_teacher_likes_more_is_always_kept():
    batch = fields()
    rest = [batch[f"{side}_logprobs_on_support"] for side in ("student", "teacher")]
    cur, tea = -2 * jnp.ones(SHAPE), -1 * jnp.ones(SHAPE)
    almost_one = jnp.full(SHAPE, 1 - 2**-24)
    loss = compiled(trust_region_loss)
    np.testing.assert_array_equal(loss(batch["base"], cur, tea, *rest, almost_one), batch["base"])
    outlier = topk_forward_kl(*rest)
    close(loss(batch["base"], tea, cur, *rest, almost_one), outlier)
    # Kept with probability q / p = 1 / e.
    noise = np.linspace(0, 1, 48, endpoint=False, dtype=np.float32).reshape(SHAPE)
    kept = np.asarray(loss(batch["base"], tea, cur, *rest, noise)) == batch["base"]
    assert kept.sum() == np.ceil(48 / np.e)


@few
@given(nats, nats, nats, rewards)
def test_sign_gated_advantage_and_loss_are_the_formulas(old, tea, ref, reward):
    got = compiled(sign_gated_advantage, **SIGNS)(old, tea, ref, reward)
    close(got, oracle.sign_gated_advantage(old, tea, ref, reward, **SIGNS))
    cur = tea
    for kind in ("ppo", "is", "reinforce"):
        agree(
            sign_gated_loss,
            lambda x, kind=kind: oracle.sign_gated(x, old, tea, ref, reward, kind, **SIGNS),
            cur,
            old,
            tea,
            ref,
            reward,
            surrogate=kind,
            **SIGNS,
        )


def test_sign_gated_advantage_by_hand():
    old, tea, ref = jnp.zeros((1, 4)), jnp.array([[1.0, -1.0, 1.0, 4.0]]), jnp.full((1, 4), 0.5)
    reward = jnp.array([[1.0, 1.0, 0.0, 1.0]])
    # agree: .5 + 1.8 (1 - .5); conflict: half of -1, of 1; agree: .5 + 1.8 * 3.5
    got = sign_gated_advantage(old, tea, ref, reward, conflict=0.5)
    np.testing.assert_allclose(got, [[1.4, -0.5, 0.5, 6.8]], rtol=1e-6)
    # With extrapolation and conflict at 1 it is the plain advantage.
    options = {"extrapolation": 1.0, "conflict": 1.0}
    batch = fields(1)
    args = batch["cur"], batch["old"], batch["tea"]
    close(sign_gated_loss(*args, batch["ref"], batch["reward"], **options), sampled_token_loss(*args))


@few
@given(nats, nats, nats, rewards)
def test_scope_loss_imitates_right_answers_and_distils_on_wrong_ones(cur, old, tea, reward):
    agree(scope_loss, lambda x: oracle.scope(x, old, tea, reward, held=cur), cur, old, tea, reward)


@few
@given(nats, nats)
def test_reference_kl_is_the_formula(cur, ref):
    agree(reference_kl, lambda x: oracle.reference_kl(x, ref), cur, ref)


def test_reference_kl_has_digits_left_for_a_small_difference():
    r = np.float32([[1e-4, -1e-4, 3e-3, -2e-6]])
    np.testing.assert_allclose(
        reference_kl(np.zeros_like(r), r), np.expm1(r.astype(float)) - r.astype(float), rtol=0.1, atol=1e-12
    )


@few
@given(nats, nats, nats)
def test_stable_loss_is_the_formula(base, kl, gold):
    options = {"kl_weight": 0.3, "gold_weight": 0.7}
    close(compiled(stable_loss, **options)(base, kl, gold), oracle.stable(base, kl, gold, **options))


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (topk_forward_kl, {}),
        (entropy_aware_loss, {}),
        (trust_region_loss, {}),
        (sign_gated_advantage, {}),
        (sign_gated_loss, {}),
        (sign_gated_loss, {"surrogate": "reinforce"}),
        (scope_loss, {}),
        (reference_kl, {}),
        (stable_loss, {"kl_weight": 0.3, "gold_weight": 0.7}),
    ],
)
def test_nothing_behind_the_mask_is_read(loss, options):
    reads_nothing_behind_the_mask(loss, **options)


def test_teacher_behaviour_and_reference_are_detached():
    batch = fields(2)
    for loss, names, options in (
        (scope_loss, "cur old tea reward", {}),
        (sign_gated_loss, "cur old tea ref reward", {}),
        (reference_kl, "cur ref", {}),
        (topk_forward_kl, "student_logprobs_on_support teacher_logprobs_on_support", {}),
    ):
        arrays = [batch[name] for name in names.split()]
        slopes = with_slopes(loss, argnums=tuple(range(len(arrays))), **options)(*arrays)[1]
        assert np.any(slopes[0])
        chex.assert_trees_all_equal(slopes[1:], tuple(0 * x for x in arrays[1:]))


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_an_id_that_a_model_excludes_leaves_forward_kl_finite(side):
    log_p, log_q = np.log(np.float32([[[0.5, 0.5]]])), np.log(np.float32([[[0.6, 0.4]]]))
    for x in {"student": [log_p], "teacher": [log_q], "both": [log_p, log_q]}[side]:
        x[..., 1] = -np.inf
    value, slope = with_slopes(topk_forward_kl)(log_p, log_q)
    chex.assert_tree_all_finite((value, slope))
    if side == "teacher":  # of the id that it never gives nothing is left
        close(value, np.exp(log_q[..., 0]) * (log_q - log_p)[..., 0])


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_jit_without_and_under_pmap(self):
        batch = fields(3)
        args = [batch[name] for name in ("cur", "old", "tea", "reward")]
        got = self.variant(scope_loss)(*args)
        chex.assert_shape(got, SHAPE)
        close(got, oracle.scope(*args))


def test_a_draw_at_the_ratio_itself_is_an_outlier():
    batch = fields()
    rest = [batch[f"{side}_logprobs_on_support"] for side in ("student", "teacher")]
    cur, tea = batch["cur"], batch["tea"]
    ratio = importance_ratio(tea, cur)
    close(trust_region_loss(batch["base"], cur, tea, *rest, ratio), topk_forward_kl(*rest))
    below = jnp.nextafter(ratio, jnp.zeros(()))
    np.testing.assert_array_equal(trust_region_loss(batch["base"], cur, tea, *rest, below), batch["base"])
