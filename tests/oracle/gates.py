"""The gate in its printed form: g = exp(-tau |s|), w = g / mean(g), no shift of the exponent."""

from __future__ import annotations

import math

import numpy as np

from tests.oracle.segments import members, sequences


def over_segments(values, mask, segments, summary) -> np.ndarray:
    """``summary`` of each segment's valid values, on each of its valid tokens."""
    out = np.zeros(values.shape)
    for b, where in members(segments):
        where = [t for t in where if mask[b, t]]
        if where:
            out[b, where] = summary([float(values[b, t]) for t in where])
    return out


def mean(values) -> float:
    return sum(values) / len(values)


STATISTICS = {
    "signed_mean": mean,
    "mean_abs": lambda values: mean([abs(v) for v in values]),
    "rms": lambda values: math.sqrt(mean([v * v for v in values])),
    "positive": lambda values: mean([max(v, 0.0) for v in values]),
    "negative": lambda values: mean([min(v, 0.0) for v in values]),
}


def drift(cur, old, mask) -> np.ndarray:
    out = np.zeros(cur.shape)
    for index in np.ndindex(cur.shape):
        if mask[index]:
            out[index] = float(cur[index]) - float(old[index])
    return out


def gate(cur, old, mask, segments, tau=1.0, statistic="signed_mean", map="exp", floor=0.1) -> np.ndarray:
    size = abs(over_segments(drift(cur, old, mask), mask, segments, STATISTICS[statistic]))
    g = np.zeros(cur.shape)
    for index in np.ndindex(g.shape):
        if mask[index]:
            g[index] = {
                "exp": math.exp(-tau * size[index]),
                "clipped_exp": max(math.exp(-tau * size[index]), floor),
                "hard": 1.0 if tau * size[index] <= 1 else 0.0,
            }[map]
    return g


def scopes(mask, scope, sequence_ids=None) -> list[list[tuple[int, int]]]:
    """The positions of every set over which a mean is one."""
    if scope == "sequence":
        return [[(b, t) for t in where] for b, where in sequences(mask, sequence_ids)]
    return [[(b, t) for b, where in sequences(mask) for t in where]]


def normalise(g, mask, scope="minibatch", sequence_ids=None) -> np.ndarray:
    w = np.zeros(g.shape)
    for positions in scopes(mask, scope, sequence_ids):
        gbar = 1.0 if scope == "none" or not positions else mean([float(g[at]) for at in positions])
        for at in positions:
            w[at] = g[at] / gbar
    return w


def drift_gate(
    cur, old, mask, segments, scope="minibatch", sequence_ids=None, statistic="signed_mean", **options
) -> np.ndarray:
    g = gate(cur, old, mask, segments, statistic=statistic, **options)
    if options.get("map") == "hard" and scope != "none":
        # If all of a scope lies beyond the threshold, what drifted least stays.
        size = abs(over_segments(drift(cur, old, mask), mask, segments, STATISTICS[statistic]))
        for positions in scopes(mask, scope, sequence_ids):
            least = min((size[at] for at in positions), default=0.0)
            for at in positions:
                g[at] = max(g[at], size[at] == least)
    return normalise(g, mask, scope, sequence_ids)


def effective_token_ratio(w, mask) -> float:
    values = [float(w[at]) for at in np.ndindex(w.shape) if mask[at]]
    return sum(values) ** 2 / (len(values) * sum(v * v for v in values))
