"""Segments against loops, and what must hold of any of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from opd_jax.method import every_token, fixed_blocks, newline_spans, whole_sequence
from tests import oracle_numpy

MASKS = arrays(bool, (3, 20))
fast = settings(max_examples=40, deadline=None)


@fast
@given(MASKS, st.integers(1, 25))
def test_blocks_count_from_the_first_response_token_holes_included(mask, size):
    # Ids may skip where a block is all hole; which tokens share one is what matters.
    np.testing.assert_array_equal(fixed_blocks(jnp.array(mask), size), oracle_numpy.blocks(mask, size))


@fast
@given(MASKS, MASKS, st.integers(1, 6), st.integers(0, 6), st.integers(1, 7))
def test_spans_follow_the_rule(mask, newline, minimum, more, chunk):
    got = newline_spans(
        jnp.array(newline), jnp.array(mask), minimum=minimum, maximum=minimum + more, chunk=chunk
    )
    want = oracle_numpy.spans(newline, mask, minimum, minimum + more, chunk)
    np.testing.assert_array_equal(got, want)


def test_spans_by_hand():
    #        prompt |      line      |line|    line      | short remainder joins
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]])
    line = np.array([[1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1]])
    got = newline_spans(jnp.array(line), jnp.array(mask), minimum=3, maximum=8)
    np.testing.assert_array_equal(got, [[-1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, -1]])


def test_packed_rows_restart_in_every_sequence():
    mask = jnp.array([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
    ids = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2]])
    newline = jnp.zeros_like(mask)
    for segments, want in (
        (fixed_blocks(mask, 2, sequence_ids=ids), [0, 0, 1, 2, 2, 3, 3]),
        (whole_sequence(mask, sequence_ids=ids), [0, 0, 0, 1, 1, 1, 1]),
        (newline_spans(newline, mask, chunk=3, sequence_ids=ids), [0, 0, 0, 1, 1, 1, 2]),
        (every_token(mask), [0, 1, 2, 3, 4, 5, 6]),
    ):
        valid = np.asarray(segments)[np.asarray(mask) > 0]
        np.testing.assert_array_equal(valid, want)
        assert (np.asarray(segments)[np.asarray(mask) == 0] == -1).all()


def test_nonsense_is_refused():
    mask = jnp.ones((1, 4))
    with pytest.raises(ValueError, match="at least one position"):
        fixed_blocks(mask, 0)
    with pytest.raises(ValueError, match="minimum <= maximum"):
        newline_spans(mask, mask, minimum=5, maximum=4)
