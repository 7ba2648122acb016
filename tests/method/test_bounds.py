"""Bounds by what defines them: one factor for all that is not at a bound, and a mean of one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.method import (
    clip_weights,
    drift_gate,
    effective_token_ratio,
    every_token,
    fixed_blocks,
    normalise,
    residual,
    tau_for_ratio,
)
from tests.method.batches import (
    SHAPE,
    close,
    compiled,
    few,
    fewer,
    floats,
    masks,
    nats,
    packings,
    typical,
    wild,
)
from tests.oracle import gates as oracle

SCOPES = ("sequence", "microbatch", "minibatch")
BOUNDS = ((0.5, 2.0), (0.0, 1.2), (0.9, np.inf), (1.0, 1.0))
# From tame to thirty orders of magnitude apart, and plain zeros.
weights = floats(0, 4) | typical(0, 4) | floats(-70, 0).map(np.exp) | masks.map(np.float32)


def check_clipped(got, w, low, high):
    """``got`` is clip(c * w) for one c, and its mean is one wherever that can be."""
    got, w = np.asarray(got, np.float64), np.asarray(w, np.float64)
    assert (got >= low * (1 - 1e-6)).all()
    assert (got <= high * (1 + 1e-6)).all()
    reach = sum(high if x > 0 else low for x in w)
    np.testing.assert_allclose(got.sum(), min(len(w), reach), rtol=1e-5)
    inside = (got > low * (1 + 1e-5)) & (got < high * (1 - 1e-5))
    if inside.any():
        c = np.median(got[inside] / w[inside])
        np.testing.assert_allclose(got, np.clip(c * w, low, high), rtol=1e-4)
    else:  # whatever is at the upper bound was above what is at the lower one
        top = got >= high * (1 - 1e-5)
        assert not top.any() or top.all() or w[top].min() >= w[~top].max()


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("scope", SCOPES)
@fewer
@given(weights, packings())
def test_clipped_weights_are_one_factor_within_the_bounds_and_of_mean_one(scope, bounds, w, packing):
    mask, ids = packing
    function = compiled(clip_weights, low=bounds[0], high=bounds[1], scope=scope)
    got = np.asarray(function(np.where(mask, w, np.nan), mask, sequence_ids=ids))
    chex.assert_tree_all_finite(got)
    assert not got[~mask].any()
    for positions in oracle.scopes(mask, scope, ids):
        check_clipped([got[at] for at in positions], [w[at] for at in positions], *bounds)


def test_clipped_weights_by_hand():
    w, mask = jnp.array([[0.2, 1.0, 1.8, 9.0]]), jnp.array([[1, 1, 1, 0]])
    # 0.5 is the floor; the other two share 2.5 in the proportion 1 : 1.8
    np.testing.assert_allclose(clip_weights(w, mask, 0.5, 2.0), [[0.5, 2.5 / 2.8, 4.5 / 2.8, 0]], rtol=1e-6)
    # without a scope there is no mean to keep
    np.testing.assert_allclose(clip_weights(w, mask, 0.5, 1.5, scope="none"), [[0.5, 1, 1.5, 0]])
    # two zeros cannot rise: 1.5 + 1.5 of 4
    w = jnp.array([[0.0, 0.0, 3.0, 1.0]])
    np.testing.assert_allclose(clip_weights(w, jnp.ones((1, 4)), 0.0, 1.5), [[0, 0, 1.5, 1.5]], rtol=1e-6)
    # thirteen orders of magnitude: the small ones are raised to 0.5 each
    w = jnp.array([[1e-13, 1e-13, 2.0, 2.0]])
    np.testing.assert_allclose(clip_weights(w, jnp.ones((1, 4)), 0.0, 1.5), [[0.5, 0.5, 1.5, 1.5]], rtol=1e-5)


@pytest.mark.parametrize("bounds", [(0.0, np.inf), (0.5, 2.0)])
def test_weights_whose_sum_or_mean_float32_does_not_hold_are_clipped_like_any(bounds):
    mask = jnp.ones((1, 4))
    for w in ([1.2e-38, 0, 0, 0], [3e38, 0, 0, 0]):  # the first takes what the bounds leave it
        want = [4, 0, 0, 0] if bounds[0] == 0 else [2, 0.5, 0.5, 0.5]
        np.testing.assert_allclose(clip_weights(jnp.array([w]), mask, *bounds), [want], rtol=1e-4)
    for w in ([1.2e-38] * 4, [3e38] * 4):
        np.testing.assert_allclose(clip_weights(jnp.array([w]), mask, *bounds), mask, rtol=1e-4)
    # One that is left of half a million takes the weight of them all.
    w = np.zeros((1, 2**19), np.float32)
    w[0, 7] = 1.2e-38
    got = clip_weights(w, np.ones_like(w), 0.0, np.inf)
    np.testing.assert_allclose([got[0, 7], np.sum(got)], 2**19, rtol=1e-4)


@few
@given(weights, masks, st.floats(0, 1, width=32))
def test_the_residual_mix_is_its_formula_and_keeps_the_mean(w, mask, share):
    got = compiled(residual)(np.where(mask, w, np.nan), mask, share)
    close(got, np.where(mask, (1 - share) + share * w.astype(np.float64), 0))
    one = compiled(normalise)(np.maximum(w, 0.1), mask)
    np.testing.assert_allclose(np.sum(compiled(residual)(one, mask, share)), mask.sum(), rtol=1e-5)
    np.testing.assert_array_equal(compiled(residual)(one, mask, 1.0), one)
    np.testing.assert_array_equal(compiled(residual)(one, mask, 0.0), mask)


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9, 0.999])
@fewer
@given(nats | wild, nats, masks)
def test_tau_reaches_the_target_ratio_or_what_can_be_reached(target, cur, old, mask):
    segments = compiled(fixed_blocks, size=2)(mask)
    tau = compiled(tau_for_ratio, target=target)(np.where(mask, cur, np.nan), old, mask, segments)
    w = compiled(drift_gate)(cur, old, mask, segments, tau=tau)
    chex.assert_tree_all_finite((tau, w))
    size = abs(oracle.over_segments(oracle.drift(cur, old, mask), mask, segments, oracle.mean))[mask]
    least = (size <= size.min(initial=np.inf) * (1 + 1e-6) + 1e-6).mean() if mask.any() else 1
    if least == 1:
        assert tau == 0 or np.ptp(size) > 1e-7 * size.max()
    elif least < target - 1e-3:
        np.testing.assert_allclose(compiled(effective_token_ratio)(w, mask), target, rtol=1e-3)
    elif least > target + 1e-3:  # all but the least drifted is gone, and it is too much still
        np.testing.assert_allclose(compiled(effective_token_ratio)(w, mask), least, rtol=1e-3)


def test_tau_by_hand():
    cur, old, mask = jnp.array([[0.0, jnp.log(3.0)]]), jnp.zeros((1, 2)), jnp.ones((1, 2))
    for drift in (cur, -1e-3 * cur, 1e3 * cur):
        # g = (1, e^-x): (1 + e^-x)^2 / (2 + 2 e^-2x) is 0.8 at x = log 3
        tau = tau_for_ratio(drift, old, mask, every_token(mask), 0.8)
        np.testing.assert_allclose(tau * jnp.abs(drift[0, 1]), np.log(3), rtol=1e-5)
    # one token ten thousand nats out does not hide the drift of the others
    cur = jnp.array([[0.0, 1e-3, 2e-3, 1e4]])
    tau = tau_for_ratio(cur, jnp.zeros((1, 4)), jnp.ones((1, 4)), every_token(cur == cur), 0.5)
    g = np.exp(-float(tau) * np.asarray(cur[0], np.float64))
    np.testing.assert_allclose(g.sum() ** 2 / (4 * (g**2).sum()), 0.5, rtol=1e-4)
    assert tau_for_ratio(old, old, mask, every_token(mask), 0.8) == 0
    assert tau_for_ratio(cur, cur + 1, jnp.zeros((1, 4)), jnp.full((1, 4), -1), 0.8) == 0


@pytest.mark.parametrize("drift", [1e-3, 0.7, -100.3, 9999.7])
def test_rounding_of_equal_drift_is_nothing_to_sharpen(drift):
    mask = jnp.arange(1000) < jnp.array([[1000], [700], [66]])
    cur, old = jnp.full(mask.shape, drift), jnp.zeros(mask.shape)
    for size in (64, 96, 1000):
        assert tau_for_ratio(cur, old, mask, fixed_blocks(mask, size), 0.5) == 0


def test_a_last_bit_is_no_drift():
    cur = jnp.array([[0.7], [np.nextafter(np.float32(0.7), np.float32(1))]]) * jnp.ones((2, 6), jnp.float32)
    assert len(np.unique(cur)) == 2
    zero, mask, segments = jnp.zeros((2, 6)), jnp.ones((2, 6)), jnp.zeros((2, 6), int)
    assert tau_for_ratio(cur, zero, mask, segments, 0.5) == 0
    assert tau_for_ratio(cur.at[1].add(1e-5), zero, mask, segments, 0.6) > 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_without_drift_no_step_of_tau_is_nan(share):
    """One that were would stop whoever debugs with jax_debug_nans."""
    zero, mask = jnp.zeros((2, 6)), jnp.full((2, 6), share)
    with jax.debug_nans(True):
        assert tau_for_ratio(zero, zero, mask, jnp.zeros((2, 6), int), 0.8) == 0


def test_no_gradient_flows_through_bounds():
    cur, old = jnp.array(np.random.default_rng(3).normal(size=(2, *SHAPE)))
    mask, value = jnp.ones(SHAPE), jnp.arange(SHAPE[1])
    segments = fixed_blocks(mask, 4)

    def total(cur, old):
        tau = tau_for_ratio(cur, old, mask, segments, 0.7)
        w = drift_gate(cur, old, mask, segments, tau=tau)
        return tau + jnp.sum(value * residual(clip_weights(w, mask, 0.5, 1.5), mask, 0.5))

    assert total(cur, old) != total(cur + value, old)
    chex.assert_trees_all_equal(jax.grad(total, (0, 1))(cur, old), (0 * cur, 0 * old))


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_jit_without_and_under_pmap(self):
        w = np.random.default_rng(7).exponential(size=SHAPE).astype(np.float32)
        got = self.variant(lambda w: clip_weights(w, jnp.ones(SHAPE), 0.5, 1.5))(w)
        chex.assert_shape(got, SHAPE)
        check_clipped(np.ravel(got), w.ravel(), 0.5, 1.5)


def test_nonsense_is_refused():
    x, ids = jnp.ones((1, 2)), jnp.zeros((1, 2), int)
    for low, high in ((1.1, 2.0), (0.5, 0.9), (-0.1, 2.0)):
        with pytest.raises(ValueError, match="bounds must enclose the mean of one"):
            clip_weights(x, x, low, high)
    for target in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"lies in \(0, 1\]"):
            tau_for_ratio(x, x, x, ids, target)


def test_a_weight_of_zero_has_a_finite_gradient():
    w, mask = jnp.array([[0.0, 0.5, 1.0, 3.0]]), jnp.ones((1, 4))
    for bounds in ((0.5, 2.0), (0.0, 2.0)):
        slope = jax.grad(lambda w, b=bounds: jnp.sum(jnp.arange(4) * clip_weights(w, mask, *b)))(w)
        assert np.isfinite(slope).all()


def test_a_mean_drift_is_none_up_to_the_smallest():
    zero, mask, segments = np.zeros((1, 2), np.float32), np.ones((1, 2)), np.array([[0, 1]])
    for drift, some in ((2e-20, False), (4e-20, True)):
        tau = compiled(tau_for_ratio, target=0.8)(np.float32([[0, drift]]), zero, mask, segments)
        assert (tau > 0) == some
