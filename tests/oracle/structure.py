"""Is drift coherent along a response? Straight from the definitions, with two passes over the data."""

from __future__ import annotations

from tests.oracle.gates import mean
from tests.oracle.segments import fixed_blocks, members, sequences


def _tokens(d, mask) -> list[float]:
    return [float(d[b, t]) for b, where in sequences(mask) for t in where]


def _variance(values) -> float:
    return mean([(v - mean(values)) ** 2 for v in values])


def autocorrelation(d, mask, lag, sequence_ids=None) -> float | None:
    """Mean product of a pair ``lag`` positions apart, less the squared mean, over the variance."""
    tokens = _tokens(d, mask)
    products = [
        float(d[b, t]) * float(d[b, t + lag])
        for b, where in sequences(mask, sequence_ids)
        for t in where
        if t + lag in where
    ]
    return (mean(products) - mean(tokens) ** 2) / _variance(tokens) if products else None


def _blocks(d, mask, size, sequence_ids) -> list[list[float]]:
    segments = fixed_blocks(mask, size, sequence_ids)
    return [[float(d[b, t]) for t in where] for b, where in members(segments)]


def block_variance(d, mask, size, sequence_ids=None) -> float:
    tokens, blocks = _tokens(d, mask), _blocks(d, mask, size, sequence_ids)
    return mean([len(b) * (mean(b) - mean(tokens)) ** 2 for b in blocks]) / _variance(tokens)


def cancellation(d, mask, size, sequence_ids=None) -> float:
    blocks = _blocks(d, mask, size, sequence_ids)
    return sum(len(b) * abs(mean(b)) for b in blocks) / sum(abs(v) for v in _tokens(d, mask))
