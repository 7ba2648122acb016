"""From ragged token lists to the rows a model reads, and back.

The one place where inputs and targets are shifted against each other.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opd_jax.errors import InputError
from opd_jax.types import Rows, TokenIds


class Packing(NamedTuple):
    """Which sequences share a row."""

    order: np.ndarray  # [n] int: the sequences row by row, from left to right
    counts: np.ndarray  # [B] int: how many of them each row holds


def make_rows(
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    width: int,
    counts: Sequence[int] | np.ndarray | None = None,
) -> Rows:
    """Lay out prompts and their responses in rows of ``width`` positions, padded on the right.

    A prompt of P and a response of R tokens fill P + R - 1 positions, of which the last R predict
    the response; the first response token is predicted at its position P - 1. What a row holds beside it
    begins right after, at position 0 again.

    Args:
      prompts, responses: token ids of the sequences, each at least one token long.
      width: T.
      counts: ``[B]`` how many of the sequences, in the order given, share each row; one each by default.

    Returns:
      `Rows` of NumPy arrays ``[B, T]``.

    Raises:
      InputError: a prompt or response is empty, or the sequences of a row are longer than the row.
    """
    counts = np.ones(len(prompts), int) if counts is None else np.asarray(counts, int)
    if counts.sum() != len(prompts):
        raise ValueError(f"every sequence has its row: {len(prompts)} given, rows for {counts.sum()}")
    shape = (len(counts), width)
    tokens, targets, positions = (np.zeros(shape, np.int32) for _ in range(3))
    mask, sequence_ids = np.zeros(shape, bool), np.zeros(shape, np.int32)
    places = [(row, number) for row, count in enumerate(counts) for number in range(count)]
    start = 0
    for (row, number), prompt, response in zip(places, prompts, responses, strict=True):
        if not len(prompt) or not len(response):
            raise InputError(
                f"a prompt and a response must have at least one token: row {row} has "
                f"{len(prompt)} and {len(response)}; drop that row"
            )
        start = start if number else 0
        length = len(prompt) + len(response) - 1
        end = start + length
        if end > width:
            raise InputError(
                f"prompt and response must fit in a row: row {row} takes {end} positions of "
                f"{width}; raise sampling.max_prompt or sampling.max_response"
            )
        text = np.concatenate([prompt, response]).astype(np.int32)
        tokens[row, start:end], targets[row, start:end] = text[:-1], text[1:]
        mask[row, start + len(prompt) - 1 : end] = True
        sequence_ids[row, start:end] = number + 1
        positions[row, start:end] = np.arange(length)
        start = end
    return Rows(tokens, targets, mask, sequence_ids, positions)


def lengths_of(prompts: Sequence[TokenIds], responses: Sequence[TokenIds]) -> np.ndarray:
    """Positions that each prompt and response take, ``[n]``: P + R - 1."""
    return np.array([len(p) + len(r) - 1 for p, r in zip(prompts, responses, strict=True)], int)


def pack(lengths: Sequence[int] | np.ndarray, width: int, rows: int | None = None) -> Packing:
    """Which sequences share a row: best fit, the longest first.

    From the longest to the shortest (equals in the order given), each goes to the row with the least
    room that is still enough, the first of equals, and to a new row where there is none. Within a row
    they lie in the order given, and rows are ordered by their first.

    Args:
      lengths: positions of each sequence.
      width: T.
      rows: B, of which the last may be empty; as few as the rule gives by default.

    Raises:
      InputError: a sequence is longer than a row, or ``rows`` are too few.

    >>> pack([5, 3, 2, 6, 1], 8)  # 6 and 2, 5 and 3, 1
    Packing(order=array([0, 1, 2, 3, 4]), counts=array([2, 2, 1]))
    >>> pack([3, 6, 5, 2], 8, rows=3)
    Packing(order=array([0, 2, 1, 3]), counts=array([2, 2, 0]))
    """
    held: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (positions left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = int(lengths[index])
        if length > width:
            raise InputError(
                f"a sequence must fit in a row: sequence {index} takes {length} positions of {width}; "
                "use wider rows"
            )
        place = bisect.bisect_left(room, (length, -1))
        left, row = room.pop(place) if place < len(room) else (width, len(held))
        if row == len(held):
            held.append([])
        held[row].append(index)
        bisect.insort(room, (left - length, row))
    if rows is not None and len(held) > rows:
        raise InputError(
            f"sequences must fit in the rows there are: {len(lengths)} of them take {len(held)} rows of "
            f"{width} positions, there are {rows}; use more rows"
        )
    held = sorted(sorted(row) for row in held) + [[]] * ((rows or 0) - len(held))
    return Packing(
        np.array([index for row in held for index in row], int), np.array([len(row) for row in held], int)
    )


def one_each(lengths: Sequence[int] | np.ndarray, width: int) -> Packing:
    """A row for each sequence, in the order given: what `pack` is to kernels that cannot part them."""
    return Packing(np.arange(len(lengths)), np.ones(len(lengths), int))


def spread(values: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Place per-token values of each response at its masked positions; zero elsewhere.

    Args:
      values: arrays ``[R, ...]`` in the order of their rows and within a row from left to right, R being the
        number of true positions of that sequence.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T, ...]``.
    """
    joined = np.concatenate([np.asarray(value) for value in values])
    out = np.zeros((*mask.shape, *joined.shape[1:]), joined.dtype)
    out[mask] = joined
    return out


def gather(values: np.ndarray, mask: np.ndarray, sequence_ids: np.ndarray | None = None) -> list[np.ndarray]:
    """The inverse of `spread`: each sequence's masked values, in order.

    Args:
      values: ``[B, T, ...]``.
      mask: ``[B, T]`` bool.
      sequence_ids: ``[B, T]`` of packed rows; by default a row is one sequence.
    """
    mask = np.asarray(mask)
    row, column = np.nonzero(mask)
    if not len(row):
        return []
    sequence = np.ones(len(row), int) if sequence_ids is None else np.asarray(sequence_ids)[row, column]
    borders = np.flatnonzero((np.diff(row) != 0) | (np.diff(sequence) != 0)) + 1
    return np.split(np.asarray(values)[mask], borders)
