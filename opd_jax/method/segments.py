"""Segments: which tokens share one gate.

Every function returns segment ids ``[B, T]`` int32 that are row-local, start at 0 and never decrease
along a row; -1 marks positions off the mask. No segment crosses a sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def every_token(mask: Array) -> Array:
    """One segment a token (Token-Gate).

    >>> every_token(jnp.array([[0, 1, 1, 0, 1, 0]]))
    Array([[-1,  0,  1, -1,  2, -1]], dtype=int32)
    """
    mask = mask.astype(bool)
    return jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1).astype(jnp.int32)


def whole_sequence(mask: Array, *, sequence_ids: Array | None = None) -> Array:
    """One segment a sequence (Sequence-Gate).

    >>> whole_sequence(jnp.array([[0, 1, 1, 0, 1, 0]]))
    Array([[-1,  0,  0, -1,  0, -1]], dtype=int32)
    """
    mask = mask.astype(bool)
    return _number(_first_response(mask, sequence_ids), mask)


def fixed_blocks(mask: Array, size: int, *, sequence_ids: Array | None = None) -> Array:
    """Blocks of ``size`` positions counted from each sequence's first response token (Block64).

    A hole in the mask counts as a position of its block and is left out of the block's mean; the last
    block may be partial.

    Args:
      mask: ``[B, T]``, nonzero on response tokens.
      size: positions per block, at least 1.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.

    Raises:
      ValueError: ``size`` is below 1.

    >>> fixed_blocks(jnp.array([[0, 1, 1, 0, 1, 0]]), 2)
    Array([[-1,  0,  0, -1,  1, -1]], dtype=int32)
    """
    if size < 1:
        raise ValueError(f"a block holds at least one position: got size {size}; give 1 or more")
    mask = mask.astype(bool)
    first = _first_response(mask, sequence_ids)
    position = jnp.arange(mask.shape[1])
    start = jax.lax.cummax(jnp.where(first, position, -1), axis=1)
    within = start >= 0
    if sequence_ids is not None:  # the next sequence's prompt is no part of this response
        within &= jnp.take_along_axis(sequence_ids, jnp.maximum(start, 0), axis=1) == sequence_ids
    return _number(within & ((position - start) % size == 0), mask)


def newline_spans(
    is_newline: Array,
    mask: Array,
    *,
    minimum: int = 16,
    maximum: int = 128,
    chunk: int = 64,
    sequence_ids: Array | None = None,
) -> Array:
    """Spans that end after newline tokens (NewlineSpan).

    A span closes after a newline once it holds ``minimum`` tokens and at least as many are left in
    its sequence, so that short lines are merged with their neighbours; one that reaches ``maximum``
    tokens is cut there. A sequence without any newline is cut into chunks of ``chunk`` tokens. The
    paper prints none of the three thresholds; these defaults are ours.

    Args:
      is_newline: ``[B, T]``, nonzero where the token at t ends a line.
      mask: ``[B, T]``, nonzero on response tokens; only these count towards a length.
      minimum, maximum, chunk: tokens, 1 <= minimum <= maximum and chunk >= 1.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.

    Raises:
      ValueError: the thresholds are out of order.

    >>> mask, newline = jnp.array([[0, 1, 1, 1, 1, 1]]), jnp.array([[0, 0, 1, 0, 1, 0]])
    >>> newline_spans(newline, mask, minimum=2, maximum=4)
    Array([[-1,  0,  0,  1,  1,  1]], dtype=int32)
    """
    if not (1 <= minimum <= maximum and chunk >= 1):
        raise ValueError(
            f"spans need 1 <= minimum <= maximum and chunk >= 1: got minimum {minimum}, maximum "
            f"{maximum}, chunk {chunk}; put them in order"
        )
    mask = mask.astype(bool)
    newline = is_newline.astype(bool) & mask
    first = _first_response(mask, sequence_ids)
    sequence = _number(first, mask)
    left = segment_total(mask, sequence) - _count_within(mask, first)
    may_close = newline & (left >= minimum)
    has_newline = segment_total(newline, sequence) > 0

    def step(carry: tuple[Array, Array], now: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        length, closed = carry  # tokens in the open span; whether the last valid token closed it
        first, valid, may_close, has_newline = now
        opens = valid & (first | closed)
        length = jnp.where(opens, 0, length) + valid
        by_line = (may_close & (length >= minimum)) | (length == maximum)
        closes = jnp.where(has_newline, by_line, length == chunk)
        return (length, jnp.where(valid, closes, closed)), opens

    start = (jnp.zeros(mask.shape[0], jnp.int32), jnp.zeros(mask.shape[0], bool))
    columns = tuple(x.T for x in (first, mask, may_close, has_newline))
    _, opens = jax.lax.scan(step, start, columns)
    return _number(opens.T, mask)


def sequence_segments(mask: Array, sequence_ids: Array | None) -> Array:
    """Segment ids that tell the sequences of a row apart; a row is one where no ids are given."""
    ids = jnp.zeros(mask.shape, jnp.int32) if sequence_ids is None else sequence_ids
    return jnp.where(mask.astype(bool), ids, -1)


def segment_total(values: Array, segments: Array) -> Array:
    """Sum of ``values`` over each position's segment, ``[B, T]``; 0 outside all segments.

    Values at positions of segment -1 are never read, be they NaN or not.

    >>> segment_total(jnp.array([[9, 1, 2, 3]]), jnp.array([[-1, 0, 0, 1]]))
    Array([[0, 3, 3, 3]], dtype=int32)
    """
    if values.dtype == bool:
        values = values.astype(jnp.int32)
    return _over_segments(jax.ops.segment_sum, values, segments)


def segment_largest(values: Array, segments: Array) -> Array:
    """Largest of ``values`` over each position's segment, ``[B, T]``; 0 outside all segments."""
    return _over_segments(jax.ops.segment_max, values, segments)


def _over_segments(reduce: Callable[..., Array], values: Array, segments: Array) -> Array:
    inside = segments >= 0
    # Positions outside share one bucket more, which nothing reads.
    bucket = jnp.where(inside, segments, segments.shape[1])
    values = jnp.where(inside, values, 0)

    def row(values: Array, bucket: Array) -> Array:
        return reduce(values, bucket, num_segments=values.shape[0] + 1)[bucket]

    return jnp.where(inside, jax.vmap(row)(values, bucket), 0)


def _first_response(mask: Array, sequence_ids: Array | None) -> Array:
    """True at the first response token of each sequence, ``[B, T]``."""
    count = jnp.cumsum(mask, axis=1)
    if sequence_ids is None:
        return mask & (count == 1)
    starts = jnp.diff(sequence_ids, axis=1, prepend=sequence_ids[:, :1] - 1) != 0
    before = jax.lax.cummax(jnp.where(starts, count - mask, -1), axis=1)
    return mask & (count == before + 1)


def _count_within(mask: Array, first: Array) -> Array:
    """Valid tokens of one's sequence up to and including t, ``[B, T]``."""
    count = jnp.cumsum(mask, axis=1)
    return count - jax.lax.cummax(jnp.where(first, count - 1, 0), axis=1)


def _number(opens: Array, mask: Array) -> Array:
    """Number segments from the positions that open one; -1 off the mask."""
    return jnp.where(mask, jnp.cumsum(opens, axis=1) - 1, -1).astype(jnp.int32)
