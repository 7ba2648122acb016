"""The one shift between inputs and targets."""

import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.rollout import make_rows
from opd_jax.rollout.rows import gather, lengths_of, pack, spread


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


def pack_rows(prompts, responses, width, rows=None):
    """Rows of several sequences, and which lies where."""
    order, counts = pack(lengths_of(prompts, responses), width, rows)
    return make_rows([prompts[i] for i in order], [responses[i] for i in order], width, counts), order


def test_packed_rows_start_anew_at_every_sequence():
    prompts, responses = [[5, 6, 7], [8], [9, 9]], [[1, 2], [3, 4, 0], [1]]
    rows, order = pack_rows(prompts, responses, 7, rows=3)  # 4 and 3 positions, 2, none
    np.testing.assert_array_equal(order, [0, 1, 2])
    zero = [0] * 7
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 7, 1, 8, 3, 4], [9, 9, 0, 0, 0, 0, 0], zero])
    # The first target of a sequence is its own second token, the last one its last: none is a neighbour's.
    np.testing.assert_array_equal(rows.targets, [[6, 7, 1, 2, 3, 4, 0], [9, 1, 0, 0, 0, 0, 0], zero])
    np.testing.assert_array_equal(rows.mask, [[0, 0, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0], zero])
    np.testing.assert_array_equal(rows.sequence_ids, [[1, 1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0, 0], zero])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0], zero])


def test_each_packed_sequence_is_what_it_is_in_a_row_of_its_own():
    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(99, size=n) for n in rng.integers(1, 20, 40)] for _ in range(2))
    alone = make_rows(prompts, responses, 40)
    rows, order = pack_rows(prompts, responses, 64)
    assert sorted(order) == list(range(40))
    place = 0
    for row, ids in enumerate(rows.sequence_ids):
        assert (np.diff(ids[ids > 0]) >= 0).all()
        for number in range(1, ids.max() + 1):
            here, index = np.flatnonzero(ids == number), order[place]
            for name in ("tokens", "targets", "mask", "positions"):
                want = getattr(alone, name)[index, : len(here)]
                np.testing.assert_array_equal(getattr(rows, name)[row, here], want, err_msg=name)
            assert alone.sequence_ids[index].sum() == len(here)
            place += 1
    assert place == 40
    values = [rng.random((len(responses[index]), 2)) for index in order]
    out = spread(values, rows.mask)
    for got, want in zip(gather(out, rows.mask, rows.sequence_ids), values, strict=True):
        np.testing.assert_array_equal(got, want)


def test_packing_is_best_fit_the_longest_first():
    # 24 leaves 16 and 22 leaves 18, of which 17 leaves 1: 1 goes there, though the first row has room.
    packing = pack([1, 24, 17, 22], 40)
    np.testing.assert_array_equal(packing.order, [0, 2, 3, 1])
    np.testing.assert_array_equal(packing.counts, [3, 1])
    # In the order given 3 and 4 would have shared a row, and 7 and 6 taken two more.
    np.testing.assert_array_equal(pack([3, 4, 7, 6], 10).order, [0, 2, 1, 3])
    assert len(pack([], 10).counts) == 0


def test_packing_wastes_little_and_loses_nothing():
    lengths = np.random.default_rng(1).integers(1, 1000, 500)
    order, counts = pack(lengths, 1000)
    assert sorted(order) == list(range(500))
    filled = [lengths[row].sum() for row in np.split(order, np.cumsum(counts)[:-1])]
    assert max(filled) <= 1000
    assert len(counts) <= 1.05 * lengths.sum() / 1000


def test_what_cannot_be_packed_is_named():
    with pytest.raises(InputError, match="sequence 1 takes 9 positions of 8"):
        pack([1, 9], 8)
    with pytest.raises(InputError, match="3 of them take 3 rows of 8 positions, there are 2"):
        pack([5, 5, 5], 8, rows=2)
    with pytest.raises(InputError, match="row 0 takes 5 positions of 4"):
        make_rows([[1], [2]], [[1, 2, 3], [4, 5]], 4, counts=[2])
    with pytest.raises(ValueError, match="3 given, rows for 2"):
        make_rows([[1]] * 3, [[1]] * 3, 4, counts=[1, 1])
    np.testing.assert_array_equal(lengths_of([[1, 2]], [[3]]), [2])
