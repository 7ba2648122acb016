"""Losses that add to a base loss or switch it, one position at a time."""

from __future__ import annotations

import math

import numpy as np

from tests.oracle.losses import positions, surrogate


def _forward_kl(log_p, log_q) -> float:
    return sum(math.exp(y) * (y - x) for x, y in zip(log_p, log_q, strict=True))


def topk_forward_kl(log_p, log_q) -> np.ndarray:
    return positions(_forward_kl, log_p, log_q)


def entropy_aware(base, teacher_entropy, log_p, log_q, alpha, threshold) -> np.ndarray:
    def one(base, entropy, log_p, log_q):
        return base + (alpha * _forward_kl(log_p, log_q) if entropy >= threshold else 0.0)

    return positions(one, base, teacher_entropy, log_p, log_q)


def trust_region(base, cur, tea, log_p, log_q, noise) -> np.ndarray:
    def one(base, cur, tea, log_p, log_q, noise):
        return base if noise < min(math.exp(tea - cur), 1.0) else _forward_kl(log_p, log_q)

    return positions(one, base, cur, tea, log_p, log_q, noise)


def sign_gated_advantage(old, tea, ref, reward, extrapolation, conflict) -> np.ndarray:
    def one(old, tea, ref, reward):
        a = tea - old
        agree = a > 0 if reward > 0 else a < 0
        return (ref - old) + extrapolation * (tea - ref) if agree else conflict * a

    return positions(one, old, tea, ref, reward)


def sign_gated(cur, old, tea, ref, reward, kind, **options) -> np.ndarray:
    a = sign_gated_advantage(old, tea, ref, reward, **options)
    return positions(lambda *at: surrogate(*at, kind), cur, old, a)


def scope(cur, old, tea, reward, held=None) -> np.ndarray:
    def one(cur, old, tea, reward, held):
        rho = math.exp(cur - old)
        return -rho if reward > 0 else rho * (held - tea)

    return positions(one, cur, old, tea, reward, cur if held is None else held)


def reference_kl(cur, ref) -> np.ndarray:
    return positions(lambda cur, ref: math.exp(ref - cur) - 1 - (ref - cur), cur, ref)


def stable(base, kl, gold, kl_weight, gold_weight) -> np.ndarray:
    return positions(lambda b, k, g: b + kl_weight * k + gold_weight * g, base, kl, gold)
