"""Segments against a walk token by token, and what must hold of any of them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from opd_jax.method import (
    cusum_spans,
    every_token,
    first_response,
    fixed_blocks,
    newline_spans,
    segment_largest,
    segment_total,
    special_tokens_out,
    token_share,
    whole_sequence,
)
from opd_jax.method.segments import sequence_total
from tests.method.batches import LENGTH, SHAPE, compiled, few, fewer, floats, masks, packings, typical
from tests.oracle import segments as oracle

SIZES = (1, 2, 5, LENGTH, 3 * LENGTH)
SPANS = ({"minimum": 1, "maximum": 1, "chunk": 1}, {"minimum": 2, "maximum": 5, "chunk": 3})
# Irrational next to drifts that hypothesis likes, so that rounding decides nothing.
CUSUM = (
    {"slack": 0.31, "limit": 0.77, "minimum": 1, "maximum": 9},
    {"limit": 1.13, "minimum": 3, "maximum": 5},
)


@pytest.mark.parametrize("size", SIZES)
@fewer
@given(packings())
def test_blocks_count_from_the_first_response_token_holes_included(size, packing):
    mask, ids = packing
    got = np.asarray(compiled(fixed_blocks, size=size)(mask, sequence_ids=ids))
    np.testing.assert_array_equal(oracle.in_order(got), oracle.fixed_blocks(mask, size, ids))
    # A block that is all hole keeps its number: what stands at one place of the response has one id.
    for row, segments in zip(mask, compiled(fixed_blocks, size=size)(mask), strict=True):
        valid = np.flatnonzero(row)
        np.testing.assert_array_equal(np.asarray(segments)[valid], (valid - valid[:1]) // size)


@pytest.mark.parametrize("thresholds", SPANS)
@few
@given(packings(), masks)
def test_newline_spans_follow_the_rule(thresholds, packing, newline):
    mask, ids = packing
    function = compiled(newline_spans, **thresholds)
    for given_ids in (None, ids):
        got = function(newline, mask, sequence_ids=given_ids)
        want = oracle.newline_spans(newline, mask, **thresholds, sequence_ids=given_ids)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("thresholds", CUSUM)
@few
@given(packings(), typical(-1, 1) | floats(-1e4, 1e4))
def test_cusum_spans_follow_the_rule(thresholds, packing, d):
    mask, ids = packing
    function = compiled(cusum_spans, **thresholds)
    for given_ids in (None, ids):
        got = function(np.where(mask, d, np.nan), mask, sequence_ids=given_ids)
        want = oracle.cusum_spans(d, mask, **{"slack": 0.5} | thresholds, sequence_ids=given_ids)
        np.testing.assert_array_equal(got, want)


@few
@given(packings(), masks, typical(-1, 1))
def test_any_segments_number_the_mask_upwards_from_zero_and_cross_no_sequence(packing, newline, d):
    mask, ids = packing
    for segments in (
        compiled(every_token)(mask),
        compiled(whole_sequence)(mask, sequence_ids=ids),
        compiled(fixed_blocks, size=2)(mask, sequence_ids=ids),
        compiled(newline_spans, **SPANS[1])(newline, mask, sequence_ids=ids),
        compiled(cusum_spans, **CUSUM[0])(d, mask, sequence_ids=ids),
    ):
        np.testing.assert_array_equal(np.asarray(segments) >= 0, mask)
        for row, own, valid in zip(np.asarray(segments), ids, mask, strict=True):
            assert row[valid].size == 0 or row[valid][0] == 0
            assert (np.diff(row[valid]) >= 0).all()
            assert all(len(set(own[row == segment])) == 1 for segment in set(row[valid]))
    np.testing.assert_array_equal(compiled(every_token)(mask), oracle.every_token(mask))
    whole = compiled(whole_sequence)(mask, sequence_ids=ids)
    np.testing.assert_array_equal(whole, oracle.whole_sequence(mask, ids))


def test_newline_spans_by_hand():
    #        prompt |      line      |line|    line      | short remainder joins
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]])
    line = np.array([[1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1]])
    got = newline_spans(jnp.array(line), jnp.array(mask), minimum=3, maximum=8)
    np.testing.assert_array_equal(got, [[-1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, -1]])


def test_packed_rows_by_hand():
    mask = jnp.array([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
    ids = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2]])
    for segments, want in (
        (fixed_blocks(mask, 2, sequence_ids=ids), [0, 0, 1, 2, 2, 3, 3]),
        (whole_sequence(mask, sequence_ids=ids), [0, 0, 0, 1, 1, 1, 1]),
        (newline_spans(jnp.zeros_like(mask), mask, chunk=3, sequence_ids=ids), [0, 0, 0, 1, 1, 1, 2]),
        (every_token(mask), [0, 1, 2, 3, 4, 5, 6]),
    ):
        np.testing.assert_array_equal(np.asarray(segments)[np.asarray(mask) > 0], want)


def test_cusum_spans_find_a_shift_of_any_scale_and_nothing_in_steady_drift():
    shift = jnp.concatenate([jnp.full((1, 40), -1.0), jnp.full((1, 40), 1.0)], axis=1)
    mask = jnp.ones((1, 80))
    for scale in (2.0**-20, 1.0, 2.0**20):
        segments = np.asarray(cusum_spans(scale * shift, mask))[0]
        # z jumps by 2, of which 1.5 a token is above slack: 1.5, 2.95, 4.4 > 4 after the third token.
        np.testing.assert_array_equal(segments, [0] * 43 + [1] * 37)
    np.testing.assert_array_equal(
        cusum_spans(jnp.full((1, 80), 0.3), mask, maximum=50)[0], [0] * 50 + [1] * 30
    )
    np.testing.assert_array_equal(cusum_spans(jnp.zeros((1, 80)), mask, maximum=80)[0], [0] * 80)


def test_a_sum_at_the_limit_does_not_exceed_it():
    d = jnp.array([[-1.0, 1.0, 1.0, 1.0]])  # sums of 0, 1.5, 2
    for limit, want in ((1.49, [0, 0, 1, 1]), (1.5, [0, 0, 0, 1]), (2.0, [0, 0, 0, 0])):
        spans = cusum_spans(d, jnp.ones((1, 4)), limit=limit, minimum=1)
        np.testing.assert_array_equal(spans[0], want)
    for limit, want in ((1.49, [0, 0, 1, 1]), (1.5, [0, 0, 0, 1])):
        np.testing.assert_array_equal(cusum_spans(-d, jnp.ones((1, 4)), limit=limit, minimum=1)[0], want)


def test_a_hole_is_no_sample_of_the_drift():
    d = np.random.default_rng(1).normal(size=(1, 60))
    options = {"limit": 1.0, "minimum": 2, "maximum": 20}
    dense = np.asarray(cusum_spans(jnp.array(d), jnp.ones((1, 60)), **options))
    assert dense.max() > 5
    mask = np.arange(120) % 2 == 0
    holed = cusum_spans(jnp.array(np.repeat(d, 2, axis=1)), jnp.array(mask[None]), **options)
    np.testing.assert_array_equal(np.asarray(holed)[:, mask], dense)


@few
@given(floats(-3, 3), packings())
def test_totals_and_extremes_over_segments(values, packing):
    mask, ids = packing
    segments = np.where(mask, ids, -1)  # from 1 upwards, as sequences are numbered
    dirty = np.where(mask, values, np.nan)
    for function, over in ((segment_total, np.sum), (segment_largest, np.max)):
        slope = jax.grad(lambda x, f=function: jnp.sum(compiled(f)(x, segments)))(dirty)
        chex.assert_tree_all_finite(slope)
        assert not np.asarray(slope)[~mask].any()
        want = np.zeros(SHAPE)
        for b, where in oracle.members(segments):
            want[b, where] = over(values[b, where].astype(np.float64))
        np.testing.assert_allclose(compiled(function)(dirty, segments), want, rtol=1e-5, atol=1e-6)


def test_the_last_of_many_sequences_is_not_mixed_with_the_padding():
    ids = jnp.array([[1, 2, 3]])  # as many as positions, the second without a valid token
    np.testing.assert_array_equal(
        segment_largest(jnp.array([[-5.0, 0.0, -7.0]]), ids.at[0, 1].set(-1)), [[-5, 0, -7]]
    )


@few
@given(packings())
def test_sequences_may_be_numbered_in_any_way(packing):
    mask, ids = packing
    want = token_share(mask, reduction="seq_mean_token_mean", sequence_ids=ids)
    for other in (ids + 1000, -ids, ids * 10**6):
        got = token_share(mask, reduction="seq_mean_token_mean", sequence_ids=other.astype(np.int32))
        np.testing.assert_array_equal(got, want)


@few
@given(packings(), typical(0, 4))
def test_special_tokens_leave_the_mask(packing, drawn):
    mask, ids = packing
    targets = drawn.astype(np.int32)  # of 0 to 3
    for first_only in (True, False):
        want = mask.copy()
        for b, where in oracle.sequences(mask, ids):
            for special in (1, 3):
                here = [t for t in where if targets[b, t] == special]
                want[b, here[:1] if first_only else here] = False
        got = special_tokens_out(targets, 2 * mask, (1, 3), first_only=first_only, sequence_ids=ids)
        np.testing.assert_array_equal(got, want)


def test_the_first_response_token_is_that_of_its_sequence():
    mask, ids = jnp.array([[0, 1, 1, 0, 1, 1]]), jnp.array([[1, 1, 1, 2, 2, 2]])
    for kind in (bool, int, float):
        first = functools.partial(first_response, mask.astype(kind))
        np.testing.assert_array_equal(first(ids), [[False, True, False, False, True, False]])
        np.testing.assert_array_equal(first(None), [[False, True, False, False, False, False]])


def test_nonsense_is_refused():
    mask = jnp.ones((1, 4))
    with pytest.raises(ValueError, match="at least one position"):
        fixed_blocks(mask, 0)
    for wrong in ({"minimum": 5, "maximum": 4}, {"minimum": 0}, {"chunk": 0}):
        with pytest.raises(ValueError, match="minimum <= maximum"):
            newline_spans(mask, mask, **wrong)
    for wrong in ({"minimum": 5, "maximum": 4}, {"slack": -1.0}, {"limit": 0.0}):
        with pytest.raises(ValueError, match="slack >= 0 and limit > 0"):
            cusum_spans(mask, mask, **wrong)


def test_what_lies_outside_stops_nobody_who_debugs_with_nans():
    values, ids = jnp.array([[1.0, 2.0, jnp.nan]]), jnp.array([[0, 0, -1]])
    with jax.debug_nans(True):
        np.testing.assert_array_equal(segment_total(values, ids), [[3, 3, 0]])
        np.testing.assert_array_equal(segment_largest(values, ids), [[2, 2, 0]])


def test_every_id_below_zero_is_outside():
    values, ids = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[2, -3, -1]])
    np.testing.assert_array_equal(segment_total(values, ids), [[1, 0, 0]])
    np.testing.assert_array_equal(segment_largest(values, ids), [[1, 0, 0]])
    np.testing.assert_array_equal(segment_largest(-values, ids), [[-1, 0, 0]])


def test_the_total_of_a_sequence_is_that_of_its_tokens_inside():
    values, mask = jnp.array([[1.0, 2.0, 4.0, 8.0, 16.0, jnp.nan]]), jnp.array([[1, 1, 0, 1, 1, 0]])
    ids = jnp.array([[4, 4, 4, 9, 9, 9]])
    np.testing.assert_array_equal(sequence_total(values, mask, ids), [[3, 3, 0, 24, 24, 0]])
    np.testing.assert_array_equal(sequence_total(values, mask, None), [[27, 27, 0, 27, 27, 0]])
