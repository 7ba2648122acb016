"""Every reading of an update, as the mean over valid tokens that it is."""

from __future__ import annotations

import math

import numpy as np

from tests.oracle.gates import effective_token_ratio, mean


def over_tokens(function, mask, *arrays) -> float:
    at_all = [at for at in np.ndindex(mask.shape) if mask[at]]
    return mean([function(*(np.asarray(x[at], np.float64) for x in arrays)) for at in at_all])


def readings(cur, old, tea, w, mask, low, high) -> dict[str, float]:
    rho = np.exp(np.where(mask, cur.astype(np.float64) - old.astype(np.float64), 0))

    def one(function):
        return over_tokens(function, mask, cur, old, tea)

    return {
        "drift": one(lambda c, o, t: c - o),
        "drift_abs": one(lambda c, o, t: abs(c - o)),
        "weight": over_tokens(lambda w: w, mask, w),
        "ratio": one(lambda c, o, t: math.exp(c - o)),
        "clip_fraction": one(lambda c, o, t: float(not 1 - low <= math.exp(c - o) <= 1 + high)),
        "kl_old_k1": one(lambda c, o, t: o - c),
        "kl_old_k3": one(lambda c, o, t: math.exp(c - o) - 1 - (c - o)),
        "kl_teacher_k1": one(lambda c, o, t: math.exp(c - o) * (c - t)),
        "kl_teacher_k3": one(lambda c, o, t: math.exp(c - o) * (math.exp(t - c) - 1 - (t - c))),
        "effective_token_ratio": effective_token_ratio(w, mask),
        "importance_ess": effective_token_ratio(rho, mask),
    }


def support_mass(log_p, mask) -> float:
    return over_tokens(lambda row: sum(math.exp(x) for x in row), mask, log_p)


def overlap(ids_a, ids_b, mask) -> float:
    return over_tokens(lambda a, b: len(set(a.tolist()) & set(b.tolist())) / len(a), mask, ids_a, ids_b)


def histogram(values, mask, edges) -> list[int]:
    counts = [0] * (len(edges) + 1)
    for at in np.ndindex(mask.shape):
        if mask[at]:
            counts[sum(values[at] >= edge for edge in edges)] += 1
    return counts
