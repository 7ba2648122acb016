"""The gate against loops, its limits, and what may never reach it."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.method import (
    MAPS,
    STATISTICS,
    drift,
    drift_gate,
    drift_weights,
    every_token,
    fixed_blocks,
    gate,
    masked,
    normalise,
    relative_gate,
    scope_count,
    scope_least,
    scope_total,
    segment_score,
    whole_sequence,
)
from tests.method.batches import (
    LENGTH,
    SHAPE,
    close,
    compiled,
    few,
    fewer,
    masks,
    nats,
    packings,
    typical,
    wild,
)
from tests.oracle import gates as oracle

SCOPES = ("sequence", "microbatch", "minibatch")
statistics, maps = st.sampled_from(sorted(STATISTICS)), st.sampled_from(sorted(MAPS))
scopes = st.sampled_from(SCOPES)


@pytest.mark.parametrize("statistic", STATISTICS)
@fewer
@given(nats, nats, packings())
def test_drift_and_scores_are_the_formulas(statistic, cur, old, packing):
    mask, ids = packing
    segments = np.asarray(compiled(fixed_blocks, size=4)(mask, sequence_ids=ids))
    d = compiled(drift)(np.where(mask, cur, np.nan), np.where(mask, old, np.inf), mask)
    np.testing.assert_allclose(d, oracle.drift(cur, old, mask), atol=1e-6)
    want = oracle.over_segments(d, mask, segments, oracle.STATISTICS[statistic])
    close(compiled(segment_score, statistic=statistic)(d, mask, segments), want)
    # Tokens that leave the mask after segments were made leave the mean too.
    left = mask & (np.arange(LENGTH) % 3 > 0)
    want = oracle.over_segments(d, left, segments, oracle.STATISTICS[statistic])
    close(compiled(segment_score, statistic=statistic)(np.where(left, d, np.nan), left, segments), want)


@pytest.mark.parametrize(
    ("statistic", "map", "scope"),
    [
        pytest.param(*case, marks=[] if "minibatch" in case or "rms" in case else [pytest.mark.slow])
        for case in itertools.product(STATISTICS, MAPS, (*SCOPES, "none"))
    ],
)
@fewer
@given(typical(-3, 0), typical(-3, 0), packings())
def test_gates_and_weights_are_the_printed_formulas(scope, map, statistic, cur, old, packing):
    mask, ids = packing
    segments = np.asarray(compiled(fixed_blocks, size=5)(mask, sequence_ids=ids))
    options = {"statistic": statistic, "map": map, "floor": 0.3}
    got = compiled(gate, **options)(cur, old, mask, segments, tau=0.7)
    close(got, oracle.gate(cur, old, mask, segments, 0.7, **options))
    got = compiled(drift_gate, scope=scope, **options)(cur, old, mask, segments, tau=0.7, sequence_ids=ids)
    close(got, oracle.drift_gate(cur, old, mask, segments, scope, ids, tau=0.7, **options))


@few
@given(typical(0, 1), packings(), scopes)
def test_the_normaliser_is_the_printed_formula(g, packing, scope):
    mask, ids = packing
    got = compiled(normalise, scope=scope)(np.where(mask, g, np.nan), mask, sequence_ids=ids)
    close(got, oracle.normalise(g, mask, scope, ids))


@few
@given(typical(-2, 2), packings(), scopes)
def test_sums_and_extremes_over_a_scope(x, packing, scope):
    mask, ids = packing
    dirty = np.where(mask, x, np.nan)
    for function, over in ((scope_total, sum), (scope_least, min), (scope_count, len)):
        arrays = (mask,) if function is scope_count else (dirty, mask)
        got = compiled(function, scope=scope, axis_name=None)(*arrays, sequence_ids=ids)
        got = np.broadcast_to(got, SHAPE)
        for positions in oracle.scopes(mask, scope, ids):
            want = over([float(x[at]) for at in positions]) if positions else 0
            np.testing.assert_allclose([got[at] for at in positions], want, rtol=1e-5, atol=1e-6)
        if scope == "sequence":
            assert not got[~mask].any()
    assert scope_least(x, mask, "none", ids, None) == 0


@few
@given(nats, nats, masks, scopes)
def test_the_stable_form_is_the_composition(cur, old, mask, scope):
    segments = compiled(fixed_blocks, size=4)(mask)
    composed = compiled(normalise, scope=scope)(compiled(gate)(cur, old, mask, segments), mask)
    relative = compiled(relative_gate, scope=scope)(cur, old, mask, segments)
    w = compiled(drift_gate, scope=scope)(cur, old, mask, segments)
    np.testing.assert_allclose(w, composed, rtol=1e-5)
    np.testing.assert_allclose(w, compiled(normalise, scope=scope)(relative, mask), rtol=1e-6)
    assert not mask.any() or np.max(relative) == 1  # the least drifted segment


@few
@given(wild, wild, packings(), statistics, maps, scopes)
def test_mean_one_nonnegative_and_finite_at_any_drift(cur, old, packing, statistic, map, scope):
    mask, ids = packing
    segments = compiled(fixed_blocks, size=3)(mask, sequence_ids=ids)
    w = compiled(drift_gate, statistic=statistic, map=map, scope=scope)(
        np.where(mask, cur, np.nan), np.where(mask, old, -np.inf), mask, segments, sequence_ids=ids
    )
    chex.assert_tree_all_finite(w)
    assert np.min(w) >= 0
    assert not np.any(np.asarray(w)[~mask])
    for positions in oracle.scopes(mask, scope, ids):
        np.testing.assert_allclose(sum(float(w[at]) for at in positions), len(positions), rtol=1e-5)


@few
@given(nats, typical(-3, 3, ()) | st.floats(-3, 3, width=32), masks, statistics, maps, scopes)
def test_equal_drift_weighs_all_the_same(old, shift, mask, statistic, map, scope):
    segments = compiled(fixed_blocks, size=7)(mask)
    w = compiled(drift_gate, statistic=statistic, map=map, scope=scope)(
        old * 0 + shift, old * 0, mask, segments
    )
    np.testing.assert_allclose(w, mask, atol=1e-6)
    w = compiled(drift_gate, statistic=statistic, map=map, scope=scope)(old, old, mask, segments)
    np.testing.assert_array_equal(w, mask)  # no drift: to the bit


@few
@given(nats, nats, masks, st.permutations(range(SHAPE[0])), statistics, scopes)
def test_permuting_rows_permutes_weights(cur, old, mask, order, statistic, scope):
    def weights(*arrays):
        segments = compiled(fixed_blocks, size=4)(arrays[2])
        return np.asarray(compiled(drift_gate, statistic=statistic, scope=scope)(*arrays, segments))

    permuted = weights(cur[order], old[order], mask[order])
    np.testing.assert_allclose(permuted, weights(cur, old, mask)[order], rtol=1e-6)


@few
@given(nats, nats, packings(), statistics, maps)
def test_block_one_is_the_token_gate_and_a_long_block_the_sequence_gate(cur, old, packing, statistic, map):
    mask, ids = packing
    for blocks, other in (
        (fixed_blocks(mask, 1, sequence_ids=ids), every_token(mask)),
        (fixed_blocks(mask, LENGTH, sequence_ids=ids), whole_sequence(mask, sequence_ids=ids)),
    ):
        function = compiled(drift_gate, statistic=statistic, map=map)
        np.testing.assert_array_equal(function(cur, old, mask, blocks), function(cur, old, mask, other))


@few
@given(nats, masks, statistics, maps, scopes)
def test_merging_two_blocks_of_equal_score_changes_nothing(d, mask, statistic, map, scope):
    # The second block of four tokens holds the drifts of the first, backwards; the third its own.
    for x in (d, mask):
        x[:, 4:8] = x[:, 3::-1]
    mask[:, 0] = mask[:, 7] = True
    apart = fixed_blocks(mask, 4)
    merged = jnp.where((apart >= 0) & (jnp.arange(LENGTH) < 8), 0, apart)
    function = compiled(drift_gate, statistic=statistic, map=map, scope=scope)
    got = [function(d, np.zeros_like(d), mask, segments) for segments in (apart, merged)]
    np.testing.assert_allclose(*got, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scope", [*SCOPES, "none"])
def test_garbage_behind_the_mask_changes_nothing(garbage, scope):
    rng = np.random.default_rng(2)
    cur, old = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    mask = rng.random(SHAPE) < 0.6
    mask[1] = False  # a row of padding
    function, segments = compiled(drift_gate, scope=scope), fixed_blocks(mask, 4)
    dirty = function(np.where(mask, cur, garbage), np.where(mask, old, -garbage), mask, segments)
    np.testing.assert_array_equal(dirty, function(cur, old, mask, segments))
    nothing = function(np.full(SHAPE, garbage), cur, np.zeros(SHAPE, bool), np.full(SHAPE, -1))
    np.testing.assert_array_equal(nothing, 0)


def test_any_number_but_zero_is_in_the_mask():
    rng = np.random.default_rng(7)
    cur, old = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    mask = rng.random(SHAPE) < 0.6
    for scope in SCOPES:
        want = drift_gate(cur, old, mask, fixed_blocks(mask, 4), scope=scope)
        for kind in (np.int32(3), np.float32(0.5)):
            same = mask * kind
            np.testing.assert_array_equal(
                drift_gate(cur, old, same, fixed_blocks(same, 4), scope=scope), want
            )


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_weights_of_huge_drift_by_hand(size):
    cur, ones = jnp.zeros(SHAPE).at[0, :6].set(size).at[1].set(size), jnp.ones(SHAPE)
    w = drift_gate(cur, jnp.zeros(SHAPE), ones, fixed_blocks(ones, 3))
    np.testing.assert_allclose(w, jnp.where(cur == 0, 48 / 30, 0), rtol=1e-6)
    # Everything ten thousand nats away: the printed form underflows to 0 / 0.
    w = drift_gate(jnp.full(SHAPE, size), jnp.zeros(SHAPE), ones, fixed_blocks(ones, 3))
    np.testing.assert_allclose(w, 1.0)
    # The hard map keeps what drifted least, though all are beyond 1 / tau.
    w = drift_gate(cur.at[2:].set(2.0), jnp.zeros(SHAPE), ones, fixed_blocks(ones, 3), map="hard")
    np.testing.assert_allclose(w, jnp.where(cur.at[2:].set(2.0) == 0, 8.0, 0.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("scope", "shape"),
    [("minibatch", (1, 2**19)), pytest.param("sequence", (32, 2**14), marks=pytest.mark.slow)],
)
def test_the_mean_is_one_over_half_a_million_tokens(scope, shape):
    """As many as the paper's step has; in the first a single token, which did not drift, holds all weight."""
    function = compiled(drift_gate, scope=scope)
    mask, old = np.ones(shape, bool), np.zeros(shape, np.float32)
    cur = np.full(shape, 50, np.float32)
    cur[:, 7] = 0
    w = np.asarray(function(cur, old, mask, every_token(mask)), np.float64)
    np.testing.assert_allclose(w.sum(1), mask.sum(1), rtol=1e-5)
    cur = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    w = np.asarray(function(cur, old, mask, fixed_blocks(mask, 64)), np.float64)
    np.testing.assert_allclose(w.sum(1), mask.sum(1), rtol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_an_empty_scope_is_zero_without_any_eps(scope):
    mask = np.array([[1, 1, 1], [0, 0, 0]])
    cur, old = np.float32([[1, 2, 3], [np.nan, np.inf, 1]]), np.zeros((2, 3), np.float32)
    for inside in (mask, 0 * mask):
        w, slope = jax.value_and_grad(
            lambda x, m=inside: jnp.sum(drift_weights(cur, old, m, every_token(m), scope=scope, others=x)[1])
        )(jnp.ones((2, 3)))
        np.testing.assert_allclose(w, inside.sum(), rtol=1e-6)
        chex.assert_tree_all_finite(slope)
    w = drift_gate(cur, old, mask, every_token(mask), scope=scope, eps=0.5)
    gbar = np.exp(-np.arange(3.0)).sum() / (3.5)
    close(w[0], np.exp(-np.arange(3.0)) / (gbar + 0.5))


@few
@given(wild, packings(), masks, st.sampled_from(["exp", "clipped_exp", "hard"]), scopes)
def test_what_other_weights_drop_is_no_measure_for_the_rest(cur, packing, kept, map, scope):
    mask, ids = packing
    others = np.where(kept, 0.7, 0.0).astype(np.float32)
    segments = compiled(fixed_blocks, size=3)(mask, sequence_ids=ids)
    function = compiled(drift_weights, map=map, scope=scope)
    _, w = function(cur, 0 * cur, mask, segments, sequence_ids=ids, others=others)
    assert np.min(w) >= 0
    for positions in oracle.scopes(mask, scope, ids):
        if any(kept[at] for at in positions):
            np.testing.assert_allclose(sum(float(w[at]) for at in positions), len(positions), rtol=1e-5)


def test_dropping_the_least_drifted_segment_by_hand():
    cur, mask = jnp.array([[0.0, 0.0, 200.0, 200.0, 200.0, 200.0 + np.log(2)]]), jnp.ones((1, 6))
    others = jnp.array([[0.0, 0.0, 1.0, 1.0, 0.5, 1.0]])
    _, w = drift_weights(cur, 0 * cur, mask, every_token(mask), others=others)
    np.testing.assert_allclose(w, np.array([[0, 0, 2, 2, 1, 1]]), rtol=1e-4)  # times 6 / 6


def test_equal_drift_stays_equal_when_long_sums_round():
    mask = jnp.arange(3000) < jnp.array([[3000], [1700], [11]])
    cur = jnp.full(mask.shape, 3.3)
    w = drift_gate(cur, 0 * cur, mask, whole_sequence(mask), map="hard")
    np.testing.assert_array_equal(w, mask)


def test_a_sequence_gate_normalised_per_sequence_does_nothing():
    cur, old = np.random.default_rng(1).normal(size=(2, *SHAPE))
    w = drift_gate(cur, old, jnp.ones(SHAPE), whole_sequence(jnp.ones(SHAPE)), scope="sequence")
    np.testing.assert_allclose(w, 1.0, rtol=1e-6)


def test_no_gradient_flows_through_any_gate():
    cur, old = jnp.array(np.random.default_rng(3).normal(size=(2, *SHAPE)))
    mask, value = jnp.ones(SHAPE), jnp.arange(LENGTH)
    segments = fixed_blocks(mask, 4)
    for function in (gate, relative_gate, drift_gate):
        for statistic in STATISTICS:

            def total(cur, old, tau, f=function, s=statistic):
                return jnp.sum(value * f(cur, old, mask, segments, tau=tau, statistic=s))

            assert total(cur, old, 1.0) != total(cur + value, old, 0.5)  # there is something to detach
            chex.assert_trees_all_equal(jax.grad(total, (0, 1, 2))(cur, old, 1.0), (0 * cur, 0 * old, 0.0))


def test_scores_have_a_gradient_everywhere_and_read_nothing_behind_the_mask():
    mask = jnp.array([[1.0, 1.0, 0.0, 1.0]])
    d, ids = jnp.array([[3.0, -4.0, jnp.nan, 0.0]]), jnp.array([[0, 0, 0, 1]])
    want = {
        "signed_mean": [0.5, 0.5, 0, 1],
        "mean_abs": [0.5, -0.5, 0, 1],  # of |0|, JAX takes the slope on the right
        "rms": [3 / np.sqrt(50), -4 / np.sqrt(50), 0, 0],
        "positive": [0.5, 0, 0, 0.5],
        "negative": [0, 0.5, 0, 0.5],
    }
    for statistic, gradient in want.items():
        # of the scores of tokens 0 and 3, one of each segment
        got = jax.grad(lambda d, s=statistic: segment_score(d, mask, ids, statistic=s)[0, ::3].sum())(d)
        np.testing.assert_allclose(got, [gradient], rtol=1e-6, err_msg=statistic)
    slope = jax.grad(lambda x: masked(x, mask)[0, 2])(d)
    np.testing.assert_array_equal(slope, jnp.zeros((1, 4)))


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_jit_without_and_under_pmap(self):
        cur, old = np.random.default_rng(4).normal(size=(2, *SHAPE)).astype(np.float32)
        mask = np.random.default_rng(5).random(SHAPE) < 0.7
        w = self.variant(lambda c, o, m: drift_gate(c, o, m, fixed_blocks(m, 5)))(cur, old, mask)
        chex.assert_shape(w, SHAPE)
        close(w, oracle.drift_gate(cur, old, mask, np.asarray(fixed_blocks(mask, 5))))


def test_one_trace_serves_all_values_of_tau():
    chex.clear_trace_counter()
    function = jax.jit(chex.assert_max_traces(drift_gate, n=1))
    cur, old = np.random.default_rng(6).normal(size=(2, *SHAPE))
    segments = fixed_blocks(jnp.ones(SHAPE), 5)
    spreads = [np.std(function(cur, old, jnp.ones(SHAPE), segments, tau=tau)) for tau in (0.0, 0.5, 1.0, 2.0)]
    assert spreads == sorted(spreads)
    assert spreads[0] == 0


def test_unknown_names_are_refused():
    x, ids = jnp.zeros(SHAPE), jnp.zeros(SHAPE, int)
    with pytest.raises(ValueError, match="statistic must be one of"):
        gate(x, x, x, ids, statistic="median")
    with pytest.raises(ValueError, match="map must be one of"):
        gate(x, x, x, ids, map="linear")
    with pytest.raises(ValueError, match="floor must lie in"):
        gate(x, x, x, ids, floor=0.0)
    for function in (lambda: normalise(x, x, scope="batch"), lambda: drift_gate(x, x, x, ids, scope="batch")):
        with pytest.raises(ValueError, match="scope must be"):
            function()


@pytest.mark.parametrize("statistic", sorted(STATISTICS))
@pytest.mark.parametrize("drift", [0.1, 3.3, -100.3, 9999.7])
def test_equal_drift_weighs_one_at_the_lengths_of_the_paper(drift, statistic):
    """Where a sum added up token by token is off by a weight."""
    mask = np.arange(16384) < np.array([[16384], [9000], [77]])
    for segments in (whole_sequence(mask), fixed_blocks(mask, 256)):
        w = compiled(drift_gate, statistic=statistic)(
            np.full(mask.shape, drift, np.float32), 0.0 * mask, mask, segments
        )
        np.testing.assert_allclose(w, mask, atol=1e-5 if abs(drift) < 1e3 else 2e-3)


def test_a_long_mean_is_that_of_float64_whatever_lies_far_out():
    rng = np.random.default_rng(0)
    d = rng.normal(5, 0.1, (2, 16384)).astype(np.float32)
    d[1, 77] = 1e4
    ids = np.zeros(d.shape, np.int32)
    got = compiled(segment_score)(d, np.ones_like(ids), ids)[:, 0]
    np.testing.assert_allclose(got, d.mean(axis=1, dtype=np.float64), rtol=1e-6)


def test_other_weights_behind_the_mask_are_no_part_of_the_minimum():
    cur, mask = jnp.array([[200.0, 201.0, 202.0, 7.0]]), jnp.array([[1, 1, 1, 0]])
    e = np.exp(-1)
    for others, want in (([1, 1, 1, 1], [1, e, e**2, 0]), ([0, 2, 1, 1], [1, 1, e, 0])):
        got = relative_gate(cur, 0 * cur, mask, every_token(mask), others=jnp.array([others]))
        np.testing.assert_allclose(got, [want], rtol=1e-5)


def test_the_hard_map_keeps_what_lies_at_the_threshold_and_nothing_beyond():
    cur, mask = jnp.array([[0.0, 0.5, 1.0, np.nextafter(np.float32(1), np.float32(2))]]), jnp.ones((1, 4))
    got = gate(cur, 0 * cur, mask, every_token(mask), map="hard")
    np.testing.assert_array_equal(got, [[1, 1, 1, 0]])
    # With all beyond it, the least drifted alone: nothing twice as far.
    got = drift_gate(2 + cur, 0 * cur, mask, every_token(mask), map="hard")
    np.testing.assert_array_equal(got, [[4, 0, 0, 0]])
