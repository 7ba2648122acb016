"""Which tokens share a gate, walked token by token."""

from __future__ import annotations

import math

import numpy as np


def sequences(mask, sequence_ids=None) -> list[tuple[int, list[int]]]:
    """(row, its valid positions) of every sequence that has a valid token."""
    found = []
    for b in range(len(mask)):
        positions: dict[int, list[int]] = {}
        for t in range(len(mask[b])):
            if mask[b, t]:
                positions.setdefault(0 if sequence_ids is None else int(sequence_ids[b, t]), []).append(t)
        found += [(b, where) for where in positions.values()]
    return found


def members(segments) -> list[tuple[int, list[int]]]:
    """(row, its positions) of every segment."""
    return sequences(segments >= 0, segments)


def in_order(segments) -> np.ndarray:
    """The same segments numbered 0, 1, ... along each row, so that two numberings can be compared."""
    out = np.full(np.shape(segments), -1)
    for b in range(len(segments)):
        numbers: dict[int, int] = {}
        for t in range(len(segments[b])):
            if segments[b, t] >= 0:
                out[b, t] = numbers.setdefault(int(segments[b, t]), len(numbers))
    return out


def _walk(mask, sequence_ids, closes) -> np.ndarray:
    """Segments from a rule that says whether the segment closes after the index-th token of a sequence."""
    out = np.full(mask.shape, -1)
    last = dict.fromkeys(range(len(mask)), -1)
    for b, where in sequences(mask, sequence_ids):
        decide, opens = closes(b, where), True
        for index, t in enumerate(where):
            last[b] += opens
            out[b, t] = last[b]
            opens = decide(index)
    return out


def every_token(mask) -> np.ndarray:
    return _walk(mask, None, lambda b, where: lambda index: True)


def whole_sequence(mask, sequence_ids=None) -> np.ndarray:
    return _walk(mask, sequence_ids, lambda b, where: lambda index: False)


def fixed_blocks(mask, size, sequence_ids=None) -> np.ndarray:
    def closes(b, where):
        def block(index):
            return (where[index] - where[0]) // size

        return lambda index: index + 1 < len(where) and block(index + 1) != block(index)

    return _walk(mask, sequence_ids, closes)


def newline_spans(newline, mask, minimum, maximum, chunk, sequence_ids=None) -> np.ndarray:
    def closes(b, where):
        lines = any(newline[b, t] for t in where)
        length = 0

        def decide(index):
            nonlocal length
            length += 1
            left = len(where) - index - 1
            if lines:
                close = newline[b, where[index]] and length >= minimum and left >= minimum
                close = close or length == maximum
            else:
                close = length == chunk
            length = 0 if close else length
            return close

        return decide

    return _walk(mask, sequence_ids, closes)


def cusum_spans(d, mask, slack, limit, minimum, maximum, sequence_ids=None) -> np.ndarray:
    def closes(b, where):
        values = [float(d[b, t]) for t in where]
        rms = math.sqrt(sum(v * v for v in values) / len(values))
        z = [v / rms if rms else 0.0 for v in values]
        up = down = 0.0
        held: list[float] = []

        def decide(index):
            nonlocal up, down, held
            shift = z[index] - sum(held) / len(held) if held else 0.0
            up, down = max(0.0, up + shift - slack), max(0.0, down - shift - slack)
            held.append(z[index])
            left = len(where) - index - 1
            shifted = (up > limit or down > limit) and len(held) >= minimum and left >= minimum
            close = shifted or len(held) == maximum
            if close:
                up = down = 0.0
                held = []
            return close

        return decide

    return _walk(mask, sequence_ids, closes)
