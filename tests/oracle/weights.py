"""The wider family of weights, one sequence and one token at a time."""

from __future__ import annotations

import math

import numpy as np

from tests.oracle.gates import mean, scopes
from tests.oracle.segments import sequences


def quantile(values, q) -> float:
    """Linear between neighbours."""
    values = sorted(values)
    place = q * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def _valid(x, mask) -> list[float]:
    return [float(x[at]) for positions in scopes(mask, "minibatch") for at in positions]


def token_is(cur, old, mask, low, high) -> np.ndarray:
    w = np.zeros(mask.shape)
    for at in np.ndindex(w.shape):
        if mask[at]:
            w[at] = min(max(math.exp(float(cur[at]) - float(old[at])), low), high)
    return w


def tip_scores(entropy, kl, mask, clip_quantile) -> np.ndarray:
    entropies, kls = _valid(entropy, mask), _valid(kl, mask)
    highest = quantile(entropies, clip_quantile)
    entropies = [min(x, highest) for x in entropies]

    def scaled(x, values):
        spread = max(values) - min(values)
        return (x - min(values)) / spread if spread else 0.0

    score = np.zeros(mask.shape)
    for at in np.ndindex(score.shape):
        if mask[at]:
            h, k = scaled(min(float(entropy[at]), highest), entropies), scaled(float(kl[at]), kls)
            score[at] = h + k - h * k
    return score


def tip_distance(entropy, kl, mask, keep, clip_quantile) -> np.ndarray:
    """How far above the least score that is kept."""
    score = tip_scores(entropy, kl, mask, clip_quantile)
    return np.where(mask, score - quantile(_valid(score, mask), 1 - keep), -1.0)


def prune(student_ids, teacher_ids, mask, overlap, drop, base, sequence_ids=None) -> np.ndarray:
    w = np.zeros(mask.shape)
    for b, where in sequences(mask, sequence_ids):
        parted = 0
        for t in where:
            common = set(student_ids[b, t].tolist()) & set(teacher_ids[b, t].tolist())
            parted += len(common) / student_ids.shape[-1] < overlap
            w[b, t] = min(max(1 - drop * parted, 0.0), 1.0) + base
    return w


def iw_opd(old, tea, mask, largest, sequence_ids=None) -> np.ndarray:
    w = np.zeros(mask.shape)
    for b, where in sequences(mask, sequence_ids):
        a = [abs(float(tea[b, t]) - float(old[b, t])) for t in where]
        for index, t in enumerate(where):
            share = sum(a[:index]) / sum(a) if sum(a) else 0.0
            w[b, t] = 1 + (largest - 1) * (1 - share)
    return w


def popd(mask, step, start, growth, every, sequence_ids=None) -> np.ndarray:
    w = np.zeros(mask.shape)
    for b, where in sequences(mask, sequence_ids):
        for number, t in enumerate(where, start=1):
            w[b, t] = number <= start + growth * (step // every)
    return w


def fire_opd(tea, entropy, teacher_entropy, mask, drop, a, c, sequence_ids=None) -> np.ndarray:
    w = np.zeros(mask.shape)
    likely = [mean([float(tea[b, t]) for t in where]) for b, where in sequences(mask, sequence_ids)]
    least = quantile(likely, drop)
    largest_p = max(max(_valid(entropy, mask)), 1e-6)
    largest_q = max(max(_valid(teacher_entropy, mask)), 1e-6)
    for (b, where), value in zip(sequences(mask, sequence_ids), likely, strict=True):
        raw = [
            (1 + a * (1 - teacher_entropy[b, t] / largest_q)) * (1 + c * entropy[b, t] / largest_p)
            for t in where
        ]
        for t, x in zip(where, raw, strict=True):
            w[b, t] = x / mean(raw) if value >= least else 0.0
    return w


def scope_opd(cur, tea, reward, group, mask, temperature, sequence_ids=None) -> np.ndarray:
    w = np.zeros(mask.shape)
    scores: dict[tuple[int, bool], list[float]] = {}

    def score(b, where):
        right = bool(reward[b, where[0]] > 0)
        mean_of = mean([-float(cur[b, t]) if right else float(tea[b, t]) for t in where])
        return (int(group[b, where[0]]), right), math.exp(mean_of / temperature)

    for b, where in sequences(mask, sequence_ids):
        rivals, value = score(b, where)
        scores.setdefault(rivals, []).append(value)
    for b, where in sequences(mask, sequence_ids):
        rivals, value = score(b, where)
        w[b, where] = value / sum(scores[rivals])
    return w


def f_opd(cur, old, staleness, mask, rate, threshold, sequence_ids=None) -> np.ndarray:
    w = np.zeros(mask.shape)
    for b, where in sequences(mask, sequence_ids):
        drift = mean([abs(float(cur[b, t]) - float(old[b, t])) for t in where])
        fresh = math.exp(-rate * drift) / (float(staleness[b, where[0]]) + 1)
        w[b, where] = max(fresh - threshold, 0.0)
    return w
