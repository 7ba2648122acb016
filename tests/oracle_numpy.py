"""The method again, in float64 NumPy with loops, read off the paper's formulas and nothing else."""

from __future__ import annotations

import math

import numpy as np


def blocks(mask: np.ndarray, size: int) -> np.ndarray:
    out = np.full(mask.shape, -1)
    for b, row in enumerate(mask):
        valid = [t for t in range(len(row)) if row[t]]
        for t in valid:
            out[b, t] = (t - valid[0]) // size
    return out


def spans(newline, mask, minimum, maximum, chunk) -> np.ndarray:
    out = np.full(mask.shape, -1)
    for b in range(len(mask)):
        valid = [t for t in range(mask.shape[1]) if mask[b, t]]
        lines = any(newline[b, t] for t in valid)
        segment, length = 0, 0
        for index, t in enumerate(valid):
            out[b, t] = segment
            length += 1
            left = len(valid) - index - 1
            if lines:
                close = (newline[b, t] and length >= minimum and left >= minimum) or length == maximum
            else:
                close = length == chunk
            if close:
                segment, length = segment + 1, 0
    return out


def scores(d, mask, segments, statistic="signed_mean") -> np.ndarray:
    s = np.zeros(d.shape)
    for b in range(d.shape[0]):
        for segment in set(segments[b][segments[b] >= 0].tolist()):
            where = [t for t in range(d.shape[1]) if segments[b, t] == segment and mask[b, t]]
            values = [float(d[b, t]) for t in where]
            n = len(values)
            s[b, where] = {
                "signed_mean": sum(values) / n,
                "mean_abs": sum(abs(v) for v in values) / n,
                "rms": math.sqrt(sum(v * v for v in values) / n),
                "positive": sum(max(v, 0) for v in values) / n,
                "negative": sum(min(v, 0) for v in values) / n,
            }[statistic]
    return s


def gate_weights(cur, old, mask, segments, tau=1.0, statistic="signed_mean", scope="minibatch"):
    """The printed form: g / mean(g), no shift of the exponent."""
    d = np.where(mask, cur.astype(np.float64) - old.astype(np.float64), 0)
    g = np.where(mask, np.exp(-tau * np.abs(scores(d, mask, segments, statistic))), 0)
    if scope == "none":
        return g
    if scope == "sequence":
        means = [row[m].mean() if m.any() else 1.0 for row, m in zip(g, mask, strict=True)]
        return g / np.array(means)[:, None]
    return g / g[mask].mean()


def sampled_token(cur, old, tea, surrogate, advantage, low=0.2, high=0.2, dual=3.0):
    out = np.zeros(cur.shape)
    for index in np.ndindex(cur.shape):
        c, o, t = float(cur[index]), float(old[index]), float(tea[index])
        a = t - (o if advantage == "old" else c)
        rho = math.exp(c - o)
        if surrogate == "reinforce":
            out[index] = -c * a
        elif surrogate == "is":
            out[index] = -rho * a
        else:
            out[index] = max(-a * rho, -a * min(max(rho, 1 - low), 1 + high))
            if a < 0:
                out[index] = min(out[index], -dual * a)
    return out


def topk(logits, teacher):
    """Loss and its gradient p_u (b_u - L) in the student's logits."""
    loss, gradient = np.zeros(logits.shape[:-1]), np.zeros(logits.shape)
    for index in np.ndindex(loss.shape):
        p = np.exp(logits[index].astype(np.float64))
        q = np.exp(teacher[index].astype(np.float64))
        p, q = p / p.sum(), q / q.sum()
        b = np.log(p) - np.log(q)
        loss[index] = (p * b).sum()
        gradient[index] = p * (b - loss[index])
    return loss, gradient
