"""The one shift between inputs and targets."""

import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.rollout import make_rows
from opd_jax.rollout.rows import gather, spread


def test_position_t_speaks_of_the_token_predicted_at_t():
    rows = make_rows([[5, 6, 7], [8]], [[1, 2], [3, 4, 0]], 6)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 7, 1, 0, 0], [8, 3, 4, 0, 0, 0]])
    np.testing.assert_array_equal(rows.targets, [[6, 7, 1, 2, 0, 0], [3, 4, 0, 0, 0, 0]])
    # The first response token is predicted from the last prompt token, the last from the one before it.
    np.testing.assert_array_equal(rows.mask, [[0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.sequence_ids, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0]])


def test_masks_come_from_lengths_not_from_ids():
    # Pads and ends of text in the middle of a response are tokens like any other.
    rows = make_rows([[0]], [[0, 0, 0]], 5)
    np.testing.assert_array_equal(rows.mask, [[1, 1, 1, 0, 0]])


def test_gather_is_the_inverse_of_spread():
    rows = make_rows([[1, 2], [3]], [[1, 2, 3], [4]], 6)
    values = [np.arange(6.0).reshape(3, 2), np.array([[7.0, 8.0]])]
    out = spread(values, rows.mask)
    assert out.shape == (2, 6, 2)
    for got, want in zip(gather(out, rows.mask), values, strict=True):
        np.testing.assert_array_equal(got, want)


def test_nothing_empty_and_nothing_too_long():
    with pytest.raises(InputError, match="at least one token: row 1 has 1 and 0"):
        make_rows([[1], [1]], [[2], []], 4)
    with pytest.raises(InputError, match="takes 5 positions of 4"):
        make_rows([[1, 2]], [[1, 2, 3, 4]], 4)
