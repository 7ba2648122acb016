"""Control arms that have one right answer; the random ones are tested by what they keep."""

from __future__ import annotations

import numpy as np

from tests.oracle.gates import mean
from tests.oracle.segments import members


def inverse(g, mask) -> np.ndarray:
    out = np.zeros(g.shape)
    for index in np.ndindex(g.shape):
        if mask[index]:
            out[index] = 1.0 / float(g[index])
    return out


def position_mean(g, segments, places=None) -> np.ndarray:
    """The mean of the gates at a segment's place in its sequence, each segment counted once."""
    out, places = np.zeros(g.shape), segments if places is None else places
    at_number: dict[int, list[float]] = {}
    for b, where in members(segments):
        at_number.setdefault(int(places[b, where[0]]), []).append(float(g[b, where[0]]))
    for b, where in members(segments):
        out[b, where] = mean(at_number[int(places[b, where[0]])])
    return out


def disagreement(g, segments, score) -> np.ndarray:
    """The least score gets the largest gate, the next the next."""

    def mean_score(segment):
        b, where = segment
        return mean([float(score[b, t]) for t in where])

    out = np.zeros(g.shape)
    gates = sorted((float(g[b, where[0]]) for b, where in members(segments)), reverse=True)
    for value, (b, where) in zip(gates, sorted(members(segments), key=mean_score), strict=True):
        out[b, where] = value
    return out
