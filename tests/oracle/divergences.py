"""Divergences over a vocabulary, one position and one id at a time."""

from __future__ import annotations

import math

import numpy as np

from tests.oracle.losses import positions, renormalised


def _kl(a, b) -> float:
    return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True) if x > 0)


def full_kl(student, teacher, direction) -> np.ndarray:
    def one(student, teacher):
        p, q = renormalised(student), renormalised(teacher)
        return _kl(p, q) if direction == "reverse" else _kl(q, p)

    return positions(one, student, teacher)


def jsd(student, teacher, beta) -> np.ndarray:
    def one(student, teacher):
        p, q = renormalised(student), renormalised(teacher)
        if beta in (0, 1):
            return _kl(p, q) if beta else _kl(q, p)
        m = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]
        return beta * _kl(q, m) + (1 - beta) * _kl(p, m)

    return positions(one, student, teacher)
