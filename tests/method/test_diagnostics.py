"""What is logged: every reading against loops, and totals that add up."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.method import (
    DRIFT_EDGES,
    SCORE_EDGES,
    WEIGHT_EDGES,
    drift_diagnostics,
    drift_weights,
    effective_token_ratio,
    fixed_blocks,
    histogram,
    masked_sum,
    percentiles,
    readings,
    support_mass,
    topk_overlap,
)
from tests.method.batches import SHAPE, close, compiled, few, fields, floats, masks, nats, typical, wild
from tests.oracle import diagnostics as oracle
from tests.oracle import gates

CLIP = (0.2, 0.3)


def mean(pair):
    total, count = pair
    return float(total / count)


@few
@given(typical(-2, 0), typical(-2, 0), nats, masks)
def test_every_reading_is_its_formula(cur, old, tea, mask):
    if not mask.any():
        return
    d, w = compiled(drift_weights)(cur, old, mask, compiled(fixed_blocks, size=3)(mask))
    dirty = [np.where(mask, x, np.nan) for x in (cur, old, tea, d, w)]
    sums = compiled(drift_diagnostics, clip=CLIP)(*dirty, mask)
    assert all(count == mask.sum() for _, count in sums.values())
    got = readings(sums)
    want = oracle.readings(cur, old, tea, np.asarray(w), mask, *CLIP)
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=2e-5, err_msg=name)


def test_totals_of_parts_give_the_readings_of_the_whole():
    batch = fields()
    arrays = [batch[n] for n in ("cur", "old", "tea")]
    d, w = drift_weights(*arrays[:2], batch["mask"], fixed_blocks(batch["mask"], 3))
    parts = [
        drift_diagnostics(*(x[s] for x in (*arrays, d, w, batch["mask"])), clip=CLIP) for s in np.s_[:1, 1:]
    ]
    added = jax.tree.map(jnp.add, *parts)
    whole = readings(drift_diagnostics(*arrays, d, w, batch["mask"], clip=CLIP))
    for name, value in readings(added).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-5, atol=1e-7)


@few
@given(wild, wild, wild, masks)
def test_readings_are_finite_at_any_drift_and_of_an_empty_batch(cur, old, tea, mask):
    d, w = compiled(drift_weights)(cur, old, mask, compiled(fixed_blocks, size=3)(mask))
    for inside in (mask, np.zeros_like(mask)):
        dirty = [np.where(inside, x, np.nan) for x in (cur, old, tea, d, w)]
        sums = compiled(drift_diagnostics, clip=CLIP)(*dirty, inside)
        chex.assert_tree_all_finite(sums)
        got = readings(sums)
        assert np.isfinite(list(got.values())).all()
        assert 0 < got["effective_token_ratio"] <= 1 + 1e-5
        assert got["kl_old_k3"] >= 0
        assert got["kl_teacher_k3"] >= 0


def test_small_drifts_have_a_k3():
    # A millionth of a nat: exp(d) - 1 - d = d^2 / 2 is below the rounding of exp(d).
    d = jnp.array([[1e-4, -1e-4, 3e-4, -2e-6]])
    zero, one = jnp.zeros((1, 4)), jnp.ones((1, 4))
    got = readings(drift_diagnostics(d, zero, zero, d, one, one, clip=CLIP))
    np.testing.assert_allclose(got["kl_old_k3"], np.mean(np.square(d)) / 2, rtol=1e-2)
    np.testing.assert_allclose(got["kl_teacher_k3"], np.mean(np.square(d)) / 2, rtol=1e-2)


@few
@given(typical(0, 4), masks)
def test_effective_token_ratio_is_the_formula(w, mask):
    got = compiled(effective_token_ratio)(np.where(mask, w, np.nan), mask)
    np.testing.assert_allclose(got, gates.effective_token_ratio(w, mask) if mask.any() else 1, rtol=2e-5)


def test_effective_token_ratio_of_nothing_has_a_finite_gradient():
    slope = jax.grad(effective_token_ratio)(jnp.zeros((1, 4)), jnp.ones((1, 4)))
    assert np.isfinite(slope).all()


def test_effective_token_ratio_limits():
    mask = jnp.ones((1, 4))
    for weights, want in (
        ([1, 1, 1, 1], 1.0),
        ([4, 0, 0, 0], 0.25),
        ([2, 2, 0, 0], 0.5),
        ([0, 0, 0, 0], 1.0),
    ):
        assert effective_token_ratio(jnp.array([weights], jnp.float32), mask) == want


@few
@given(
    floats(-3, 3) | wild,
    masks,
    st.sampled_from([(-1.0, 0.0, 0.5, 1.0), DRIFT_EDGES, WEIGHT_EDGES, SCORE_EDGES]),
)
def test_histogram_counts_every_masked_value_once(values, mask, edges):
    got = compiled(histogram, edges=edges)(np.where(mask, values, np.nan), mask.astype(np.float32) * 2)
    np.testing.assert_array_equal(got, oracle.histogram(values, mask, np.float32(edges)))


def test_bins_are_fine_where_drift_and_weights_live():
    for edges, centre in ((DRIFT_EDGES, 0.0), (WEIGHT_EDGES, 1.0)):
        bins = np.array(edges)
        assert (np.diff(bins) > 0).all()
        assert bins[0] < centre < bins[-1]
        at = np.searchsorted(bins, centre)
        np.testing.assert_allclose([bins[at - 1] - centre, bins[at] - centre], [-5e-4, 5e-4])
    assert 0 < WEIGHT_EDGES[0] < 0.2  # weights are not negative
    assert SCORE_EDGES[0] == 5e-4
    np.testing.assert_allclose(SCORE_EDGES[-1], 5e-4 * 2**13)
    np.testing.assert_allclose(WEIGHT_EDGES[-1], 1 + 5e-4 * 2**13)


def test_percentiles_of_a_histogram():
    rng = np.random.default_rng(0)
    values = rng.normal(scale=0.1, size=(5, 4000)).astype(np.float32)
    counts = histogram(jnp.array(values), jnp.ones(values.shape), DRIFT_EDGES)
    got = percentiles(np.asarray(counts).tolist(), DRIFT_EDGES, (1, 25, 50, 75, 99))
    np.testing.assert_allclose(got, np.percentile(values, (1, 25, 50, 75, 99)), rtol=0.1, atol=1e-3)
    # By hand: the n-th of 8 values spread evenly over two bins, and nothing beyond the edges.
    assert percentiles([0, 4, 4, 0], (0.0, 1.0, 2.0), (0, 25, 50, 100)) == [0.0, 0.5, 1.0, 2.0]
    assert percentiles([3, 0, 0, 1], (0.0, 1.0, 2.0), (50, 100)) == [0.0, 2.0]
    # Where one bin holds the share exactly, it ends there, whatever gap follows.
    assert percentiles([0, 2, 0, 2, 0], (0.0, 1.0, 2.0, 3.0), (50, 75)) == [1.0, 2.5]
    assert np.isnan(percentiles([0, 0, 0, 0], (0.0, 1.0, 2.0), (5, 95))).tolist() == [True, True]


@few
@given(typical(-6, -1, (*SHAPE, 3)), masks)
def test_mass_and_overlap_of_supports(log_p, mask):
    batch = fields()
    dirty = np.where(mask[..., None], log_p, np.nan)
    mass = compiled(support_mass)(dirty, mask)
    overlap = compiled(topk_overlap)(batch["student_ids"], batch["teacher_ids"], mask)
    assert mass[1] == overlap[1] == mask.sum()
    if mask.any():
        np.testing.assert_allclose(mean(mass), oracle.support_mass(log_p, mask), rtol=2e-5)
        want = oracle.overlap(batch["student_ids"], batch["teacher_ids"], mask)
        np.testing.assert_allclose(mean(overlap), want, rtol=2e-5)


@few
@given(wild, masks)
def test_masked_sums_are_sums_and_counts(values, mask):
    total, count = compiled(masked_sum)(np.where(mask, values, np.inf), mask)
    np.testing.assert_allclose(total, values[mask].astype(float).sum(), rtol=1e-5, atol=1e-2)
    assert count == mask.sum()


@pytest.mark.parametrize("missing", [{}, {"weight": (0.0, 0.0), "weight_square": (0.0, 0.0)}])
def test_readings_of_nothing(missing):
    assert readings(missing) == {} if not missing else {"weight": 0.0, "effective_token_ratio": 1.0}


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_jit_without_and_under_pmap(self):
        batch = fields(3)
        arrays = [batch[n] for n in ("cur", "old", "tea")]
        d, ones = np.where(batch["mask"], arrays[0] - arrays[1], 0), np.ones(SHAPE, np.float32)
        sums = self.variant(lambda *x: drift_diagnostics(*x, clip=CLIP))(*arrays, d, ones, batch["mask"])
        want = oracle.readings(*arrays, ones, batch["mask"], *CLIP)
        for name, value in readings(sums).items():
            close(value, want[name], err_msg=name)


def test_a_ratio_at_a_bound_is_not_clipped():
    zero, mask = np.zeros((1, 3), np.float32), np.ones((1, 3))
    d = np.float32([[0, 0, 0.5]])
    for clip, want in (((0.0, 0.0), 1), ((0.0, 1.0), 0), ((-0.5, 9.0), 2)):  # ratios of 1, 1 and 1.65
        assert drift_diagnostics(d, zero, zero, d, zero, mask, clip=clip)["clip_fraction"][0] == want
