"""Base losses, one position at a time."""

from __future__ import annotations

import math

import numpy as np


def positions(function, *arrays) -> np.ndarray:
    """``function`` of what each ``[B, T]`` or ``[B, T, K]`` array holds at a position, as ``[B, T]``."""
    out = np.zeros(np.shape(arrays[0])[:2])
    for index in np.ndindex(out.shape):
        out[index] = function(*(np.asarray(x[index], np.float64) for x in arrays))
    return out


def surrogate(cur, old, a, kind, low=0.2, high=0.2, dual=3.0) -> float:
    rho = math.exp(cur - old)
    if kind == "reinforce":
        return -cur * a
    if kind == "is":
        return -rho * a
    loss = max(-a * rho, -a * min(max(rho, 1 - low), 1 + high))
    return min(loss, -dual * a) if a < 0 else loss


def sampled_token(cur, old, tea, kind, advantage, held=None, **clip) -> np.ndarray:
    """``held`` is the cur of the advantage, which a derivative does not move."""
    held = cur if held is None else held

    def one(cur, old, tea, held):
        return surrogate(cur, old, tea - (old if advantage == "old" else held), kind, **clip)

    return positions(one, cur, old, tea, held)


def cross_entropy(cur) -> np.ndarray:
    return positions(lambda cur: -cur, cur)


def renormalised(logits) -> list[float]:
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def _topk(logits, teacher) -> tuple[float, list[float]]:
    p, q = renormalised(logits), renormalised(teacher)
    b = [math.log(x) - math.log(y) for x, y in zip(p, q, strict=True)]
    loss = sum(x * y for x, y in zip(p, b, strict=True))
    return loss, [x * (y - loss) for x, y in zip(p, b, strict=True)]


def topk(logits, teacher) -> np.ndarray:
    return positions(lambda z, y: _topk(z, y)[0], logits, teacher)


def topk_gradient(logits, teacher) -> np.ndarray:
    """p_u (b_u - L)"""
    out = np.zeros(logits.shape)
    for index in np.ndindex(logits.shape[:2]):
        out[index] = _topk(logits[index], teacher[index])[1]
    return out


def topk_unrenormalised(log_p, log_q) -> np.ndarray:
    return positions(
        lambda log_p, log_q: sum(math.exp(x) * (x - y) for x, y in zip(log_p, log_q, strict=True)),
        log_p,
        log_q,
    )


def topk_tail(log_p, log_q) -> np.ndarray:
    def one(log_p, log_q):
        tail_p, tail_q = (1 - sum(math.exp(x) for x in side) for side in (log_p, log_q))
        on_support = sum(math.exp(x) * (x - y) for x, y in zip(log_p, log_q, strict=True))
        return on_support + tail_p * (math.log(tail_p) - math.log(tail_q))

    return positions(one, log_p, log_q)


def topk_generalised(log_p, log_q) -> np.ndarray:
    def one(log_p, log_q):
        return sum(
            math.exp(x) * (x - y) - math.exp(x) + math.exp(y) for x, y in zip(log_p, log_q, strict=True)
        )

    return positions(one, log_p, log_q)


def student_topk(cur, old, tea, kind, advantage, held=None, **clip) -> np.ndarray:
    held = cur if held is None else held

    def one(cur, old, tea, held):
        p, q = renormalised(old if advantage == "old" else held), renormalised(tea)
        a = [-x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True)]
        return sum(surrogate(*at, kind, **clip) for at in zip(cur, old, a, strict=True))

    return positions(one, cur, old, tea, held)
