"""Segments: which tokens share one gate.

Every function returns segment ids ``[B, T]`` int32 that are row-local, start at 0 and never decrease
along a row; -1 marks positions off the mask. No segment crosses a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.method.arithmetic import quotient, wide

Array = jax.Array


def every_token(mask: Array) -> Array:
    """One segment a token (Token-Gate).

    >>> every_token(jnp.array([[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]]))
    Array([[-1,  0,  1,  2,  3,  4],
           [ 0,  1, -1,  2,  3, -1]], dtype=int32)
    """
    mask = mask.astype(bool)
    return jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1).astype(jnp.int32)


def whole_sequence(mask: Array, *, sequence_ids: Array | None = None) -> Array:
    """One segment a sequence (Sequence-Gate).

    >>> mask = jnp.array([[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
    >>> packed = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2]])  # two sequences in the second row
    >>> whole_sequence(mask, sequence_ids=packed)
    Array([[-1,  0,  0,  0,  0,  0],
           [ 0,  0, -1,  1,  1, -1]], dtype=int32)
    """
    mask = mask.astype(bool)
    return _number(first_response(mask, sequence_ids), mask)


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

    >>> fixed_blocks(jnp.array([[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]]), 2)  # the hole shares its block
    Array([[-1,  0,  0,  1,  1,  2],
           [ 0,  0, -1,  1,  2, -1]], dtype=int32)
    """
    if size < 1:
        raise ValueError(f"a block holds at least one position: got size {size}; give 1 or more")
    mask = mask.astype(bool)
    first = first_response(mask, sequence_ids)
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

    >>> newline = jnp.array([[1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    >>> newline_spans(newline, jnp.ones((2, 6)), minimum=2, maximum=4, chunk=4)
    Array([[0, 0, 0, 1, 1, 1],
           [0, 0, 0, 0, 1, 1]], dtype=int32)

    The first line is too short and joins the second; after the third one token would be left.
    """
    if not (1 <= minimum <= maximum and chunk >= 1):
        raise ValueError(
            f"spans need 1 <= minimum <= maximum and chunk >= 1: got minimum {minimum}, maximum "
            f"{maximum}, chunk {chunk}; put them in order"
        )
    mask = mask.astype(bool)
    newline = is_newline.astype(bool)
    first = first_response(mask, sequence_ids)
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

    none = _zero_a_row(mask)
    start = (none, none.astype(bool))
    columns = tuple(x.T for x in (first, mask, may_close, has_newline))
    _, opens = jax.lax.scan(step, start, columns)
    return _number(opens.T, mask)


def cusum_spans(
    d: Array,
    mask: Array,
    *,
    slack: float = 0.5,
    limit: float = 4.0,
    minimum: int = 16,
    maximum: int = 128,
    sequence_ids: Array | None = None,
) -> Array:
    """Adaptive spans whose borders follow the drift: Page's cumulative sums (Biometrika 41, 1954).

    Drift is measured in units of its root mean square over the sequence, ``z``. Within an open span of
    mean ``z``-bar so far, two sums watch for a shift of the mean, ``up = max(0, up + z - zbar - slack)``
    and ``down = max(0, down - z + zbar - slack)``; the span closes after a token at which either exceeds
    ``limit``, if it holds ``minimum`` tokens and at least as many are left in its sequence, and in any
    case at ``maximum`` tokens. The rule does not depend on the scale of drift; without drift spans are
    of ``maximum`` tokens. Slack and limit are the customary half and four standard deviations. The paper
    has no such spans; this is ours.

    Args:
      d: drift ``[B, T]`` nats; no gradient flows to borders.
      mask: ``[B, T]``, nonzero on response tokens; only these count towards a length.
      slack, limit: in root mean squares of drift, limit > 0 and slack >= 0.
      minimum, maximum: tokens, 1 <= minimum <= maximum.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.

    Raises:
      ValueError: the thresholds are out of order.

    >>> d = jnp.array([[0., 0., 0., 1., 1., 1.], [1., 1., 1., 1., 1., 1.]])
    >>> cusum_spans(d, jnp.ones((2, 6)), limit=0.5, minimum=2)
    Array([[0, 0, 0, 0, 1, 1],
           [0, 0, 0, 0, 0, 0]], dtype=int32)

    The root mean square of the first row is 0.71: its fourth token stands 1.41 above the mean of the
    span, and ``up = 1.41 - 0.5`` exceeds the limit.
    """
    if not (1 <= minimum <= maximum and slack >= 0 and limit > 0):
        raise ValueError(
            f"spans need 1 <= minimum <= maximum, slack >= 0 and limit > 0: got minimum {minimum}, "
            f"maximum {maximum}, slack {slack}, limit {limit}; put them in order"
        )
    mask = mask.astype(bool)
    d = wide(d)
    first = first_response(mask, sequence_ids)
    sequence = _number(first, mask)
    tokens = segment_total(mask, sequence)
    square = quotient(segment_total(jnp.square(d), sequence), tokens)
    z = quotient(d, jnp.sqrt(square))  # 0 off the mask
    may_close = tokens - _count_within(mask, first) >= minimum

    def step(carry: Any, now: tuple[Array, ...]) -> tuple[Any, Array]:
        length, total, up, down, closed = carry  # of the open span; whether the last token closed it
        first, valid, may_close, z = now
        opens = valid & (first | closed)
        length, total, up, down = (jnp.where(opens, 0, x) for x in (length, total, up, down))
        shift = jnp.where(length > 0, z - total / jnp.maximum(length, 1), 0.0)
        up = jnp.where(valid, jnp.maximum(0.0, up + shift - slack), up)  # a hole is no sample
        down = jnp.where(valid, jnp.maximum(0.0, down - shift - slack), down)
        length, total = length + valid, total + z
        shifted = ((up > limit) | (down > limit)) & (length >= minimum) & may_close
        closed = jnp.where(valid, shifted | (length == maximum), closed)
        return (length, total, up, down, closed), opens

    none = _zero_a_row(mask)
    zero = none.astype(jnp.float32)
    start = (none, zero, zero, zero, none.astype(bool))
    _, opens = jax.lax.scan(step, start, tuple(x.T for x in (first, mask, may_close, z)))
    return _number(opens.T, mask)


def sequence_segments(mask: Array, sequence_ids: Array | None) -> Array:
    """Segment ids that tell the sequences of a row apart; a row is one where no ids are given.

    Sequences are numbered along the row, so that their own ids may be any numbers.

    >>> mask = jnp.array([[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
    >>> sequence_segments(mask, jnp.array([[7, 7, 7, 900, 900, 900], [-1, -1, -1, 5, 5, 0]]))
    Array([[-1,  0,  0,  1,  1,  1],
           [ 0,  0, -1,  1,  1, -1]], dtype=int32)
    """
    if sequence_ids is None:
        number = jnp.zeros(mask.shape, jnp.int32)
    else:
        number = jnp.cumsum(_starts(sequence_ids), axis=1, dtype=jnp.int32) - 1
    return jnp.where(mask.astype(bool), number, -1)


def segment_total(values: Array, segments: Array) -> Array:
    """Sum of ``values`` over each position's segment, ``[B, T]``; 0 outside all segments.

    Values at positions of segment -1 are never read, be they NaN or not.

    >>> x = jnp.array([[1., 2., 3., 4., 5., 6.], [7., 8., 9., 10., jnp.nan, jnp.nan]])
    >>> segment_total(x, jnp.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, -1, -1]]))
    Array([[ 6.,  6.,  6., 15., 15., 15.],
           [15., 15., 19., 19.,  0.,  0.]], dtype=float32)
    """
    values = values.astype(jnp.int32) if values.dtype == bool else wide(values)
    return _over_segments(jax.ops.segment_sum, values, segments)


def running_total(x: Array, mask: Array, sequence_ids: Array | None) -> Array:
    """Sum of ``x`` from the first response token of one's sequence up to and including t, ``[B, T]``.

    >>> x = jnp.array([[1., 2., 3., 4., 5., 6.], [7., 8., 9., 10., jnp.nan, jnp.nan]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> running_total(x, mask, jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]]))
    Array([[ 1.,  3.,  6.,  4.,  9., 15.],
           [ 7., 15., 24., 34., 34., 34.]], dtype=float32)
    """

    # Starts anew at each sequence: the difference of two sums over the row would round by its neighbours.
    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1])

    inside = mask.astype(bool)
    first = first_response(inside, sequence_ids)
    return jax.lax.associative_scan(add, (first, jnp.where(inside, wide(x), 0.0)), axis=1)[1]


def sequence_total(values: Array, mask: Array, sequence_ids: Array | None) -> Array:
    """Sum of the masked ``values`` over each position's sequence, ``[B, T]``; 0 off the mask.

    As `segment_total`, which adds up one by one, but by halves: of sixteen thousand tokens to 1e-6.
    """
    ids = sequence_segments(mask, sequence_ids)
    position = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    last = segment_largest(position, ids).astype(jnp.int32)
    total = jnp.take_along_axis(running_total(values, mask, sequence_ids), last, axis=1)
    return jnp.where(ids >= 0, total, 0.0)


def segment_largest(values: Array, segments: Array) -> Array:
    """Largest of ``values`` over each position's segment, ``[B, T]``; 0 outside all segments.

    >>> x = jnp.array([[1., 2., 3., 4., 5., 6.], [7., 8., 9., 10., jnp.nan, jnp.nan]])
    >>> segment_largest(x, jnp.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, -1, -1]]))
    Array([[ 3.,  3.,  3.,  6.,  6.,  6.],
           [ 8.,  8., 10., 10.,  0.,  0.]], dtype=float32)
    """
    return _over_segments(jax.ops.segment_max, values, segments)


def _over_segments(reduce: Callable[..., Array], values: Array, segments: Array) -> Array:
    inside = segments >= 0
    values = jnp.where(inside, values, 0)

    # Positions outside are dropped, and read what is not taken. Ids run up to T: sequences count from 1.
    def row(values: Array, segments: Array) -> Array:
        return reduce(values, segments, num_segments=values.shape[0] + 1)[segments]

    return jnp.where(inside, jax.vmap(row)(values, segments), 0)


def first_response(mask: Array, sequence_ids: Array | None) -> Array:
    """True at the first response token of each sequence, ``[B, T]``.

    >>> mask = jnp.array([[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
    >>> first_response(mask, jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2]])).astype(int)
    Array([[0, 1, 0, 0, 0, 0],
           [1, 0, 0, 1, 0, 0]], dtype=int32)
    """
    mask = mask.astype(bool)
    count = jnp.cumsum(mask, axis=1)
    if sequence_ids is None:
        return mask & (count == 1)
    before = jax.lax.cummax(jnp.where(_starts(sequence_ids), count - mask, 0), axis=1)
    return mask & (count == before + 1)


def _starts(sequence_ids: Array) -> Array:
    """True where a sequence begins, ``[B, T]``."""
    return jnp.pad(sequence_ids[:, 1:] != sequence_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def special_tokens_out(
    targets: Array,
    mask: Array,
    ids: Sequence[int],
    *,
    first_only: bool = True,
    sequence_ids: Array | None = None,
) -> Array:
    """The mask without positions of listed token ids, ``[B, T]`` bool: neither loss nor drift counts there.

    Args:
      targets: ``[B, T]`` int32, the token predicted at t.
      mask: ``[B, T]``, nonzero on response tokens.
      ids: token ids that leave; not the one that ends a response, for stopping is to be learnt.
      first_only: each id leaves at its first occurrence in a response alone, as in the paper's code base.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.

    >>> targets = jnp.array([[5, 7, 5, 8, 7, 9], [5, 5, 7, 8, 7, 5]])
    >>> mask = jnp.array([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    >>> special_tokens_out(targets, mask, (7, 5)).astype(int)
    Array([[0, 0, 0, 1, 1, 1],
           [0, 1, 0, 1, 1, 0]], dtype=int32)
    >>> special_tokens_out(targets, mask, (7, 5), first_only=False).astype(int)
    Array([[0, 0, 0, 1, 0, 1],
           [0, 0, 0, 1, 0, 0]], dtype=int32)
    """
    inside = mask.astype(bool)
    out = jnp.zeros_like(inside)
    for id_ in ids:
        here = inside & (targets == id_)
        # The first of its kind is where a mask of these alone would begin.
        out |= first_response(here, sequence_ids) if first_only else here
    return inside & ~out


def _zero_a_row(mask: Array) -> Array:
    """Zeros ``[B]`` to start a scan from: of the mask, as under shard_map a carry must vary as it does."""
    return 0 * jnp.sum(mask, axis=1)


def _count_within(mask: Array, first: Array) -> Array:
    """Valid tokens of one's sequence up to and including t, ``[B, T]``."""
    count = jnp.cumsum(mask, axis=1)
    return count - jax.lax.cummax(jnp.where(first, count - 1, 0), axis=1)


def _number(opens: Array, mask: Array) -> Array:
    """Number segments from the positions that open one; -1 off the mask."""
    return jnp.where(mask, jnp.cumsum(opens, axis=1) - 1, -1).astype(jnp.int32)
