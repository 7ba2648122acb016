"""Is drift coherent along a response? Against the definitions, and on drifts that are known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from opd_jax.method import structure_readings, structure_sums
from tests.method.batches import SHAPE, compiled, few, fields, packings, typical, wild
from tests.oracle import structure as oracle

LAGS, SIZES = (1, 2, 5, 30), (1, 3, 4, 64)


def readings(d, mask, ids=None, **options):
    options = {"lags": LAGS, "sizes": SIZES} | options
    return structure_readings(compiled(structure_sums, **options)(d, mask, sequence_ids=ids))


@few
@given(typical(-1, 2), packings())
def test_every_reading_is_its_definition(d, packing):
    mask, ids = packing
    if mask.sum() < 2:
        return
    for own in (None, ids):
        got = readings(np.where(mask, d, np.nan), mask, own)
        for lag in LAGS:
            want = oracle.autocorrelation(d, mask, lag, own)
            assert (lag in got["autocorrelation"]) == (want is not None)
            if want is not None:
                np.testing.assert_allclose(got["autocorrelation"][lag], want, rtol=1e-4, atol=1e-4)
        for size in SIZES:
            want = oracle.block_variance(d, mask, size, own), oracle.cancellation(d, mask, size, own)
            found = got["block_variance"][size], got["cancellation"][size]
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


def test_noise_reads_as_noise_and_coherence_as_coherence():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(64, 256)).astype(np.float32)
    mask = np.ones(noise.shape, bool)
    options = {"lags": (1, 8), "sizes": (1, 16)}
    got = readings(noise, mask, **options)
    np.testing.assert_allclose(list(got["autocorrelation"].values()), 0, atol=0.03)
    np.testing.assert_allclose(list(got["block_variance"].values()), 1, rtol=0.1)
    np.testing.assert_allclose(got["cancellation"][1], 1, rtol=1e-5)
    np.testing.assert_allclose(got["cancellation"][16], 1 / 4, rtol=0.05)
    coherent = np.repeat(rng.normal(size=(64, 16)), 16, axis=1).astype(np.float32)
    got = readings(coherent, mask, **options)
    np.testing.assert_allclose(got["autocorrelation"][1], 15 / 16, rtol=0.05)
    np.testing.assert_allclose(got["block_variance"][16], 16, rtol=1e-4)
    np.testing.assert_allclose(got["cancellation"][16], 1, rtol=1e-5)


def test_a_reading_without_data_is_left_out():
    empty = {"autocorrelation": {}, "block_variance": {}, "cancellation": {}}
    for mask in (np.ones(SHAPE, bool), np.zeros(SHAPE, bool)):
        assert readings(np.zeros(SHAPE, np.float32), mask) == empty
    # Equal drift varies by rounding alone; nothing of it cancels.
    got = readings(np.full(SHAPE, 0.1, np.float32), np.ones(SHAPE, bool))
    assert got["autocorrelation"] == got["block_variance"] == {}
    np.testing.assert_allclose(list(got["cancellation"].values()), 1, rtol=1e-5)


@few
@given(wild, packings())
def test_sums_add_up_over_rows_and_stay_finite(d, packing):
    mask, ids = packing
    function = compiled(structure_sums, lags=LAGS, sizes=SIZES)
    whole = function(np.where(mask, d, np.nan), mask, sequence_ids=ids)
    chex.assert_tree_all_finite(whole)
    parts = [function(d, mask & (np.arange(4) % 2 == half)[:, None], sequence_ids=ids) for half in (0, 1)]
    chex.assert_trees_all_close(
        jax.tree.map(jnp.add, *parts), whole, rtol=1e-4, atol=1e3
    )  # of squares of 1e4


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_jit_without_and_under_pmap(self):
        batch = fields(3)
        d, mask = np.where(batch["mask"], batch["cur"] - batch["old"], 0), batch["mask"]
        sums = self.variant(lambda d, m: structure_sums(d, m, lags=(2,), sizes=(3,)))(d, mask)
        got = structure_readings(sums)
        np.testing.assert_allclose(got["autocorrelation"][2], oracle.autocorrelation(d, mask, 2), rtol=1e-4)
        np.testing.assert_allclose(got["block_variance"][3], oracle.block_variance(d, mask, 3), rtol=1e-4)


def test_by_default_lags_are_powers_of_two_and_sizes_of_four():
    d = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    got = structure_readings(structure_sums(d, np.ones(d.shape, bool)))
    assert list(got["autocorrelation"]) == [2**i for i in range(7)]
    assert list(got["block_variance"]) == list(got["cancellation"]) == [4**i for i in range(5)]
