"""Divergences over the whole vocabulary, for comparison: they need both models' logits.

p is the student, q the teacher; the gradient flows into the student's logits alone. Every loss is
unreduced, ``[B, T]`` nats.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from opd_jax.method.losses import SMALLEST_LOGPROB, read

Array = jax.Array


def full_kl_loss(
    student_logits: Array,
    teacher_logits: Array,
    *,
    direction: Literal["reverse", "forward"] = "reverse",
    mask: Array | None = None,
) -> Array:
    """KL divergence over the whole vocabulary, ``[B, T]``.

    ``reverse`` is ``KL(p || q) = sum p (log p - log q)``, ``forward`` is ``KL(q || p)``.

    Args:
      student_logits, teacher_logits: ``[B, T, V]``, at the sampling temperature.
      direction: which of the two.
      mask: ``[B, T]``, to read nothing behind it.

    Raises:
      ValueError: an unknown direction.

    >>> p = jnp.log(jnp.array([[[.5, .5]], [[.25, .75]]])) * jnp.ones((2, 6, 1))
    >>> q = jnp.log(jnp.array([.25, .75])) * jnp.ones((2, 6, 1))
    >>> full_kl_loss(p, q)  # .5 log(.5 / .25) + .5 log(.5 / .75)
    Array([[0.1438, 0.1438, 0.1438, 0.1438, 0.1438, 0.1438],
           [0.    , 0.    , 0.    , 0.    , 0.    , 0.    ]], dtype=float32)
    >>> full_kl_loss(p, q, direction="forward")[:, 0]  # .25 log(.25 / .5) + .75 log(.75 / .5)
    Array([0.1308, 0.    ], dtype=float32)
    """
    log_p, log_q = _logprobs(student_logits, teacher_logits, mask)
    if direction == "reverse":
        return _kl(log_p, log_q)
    if direction == "forward":
        return _kl(log_q, log_p)
    raise ValueError(f"direction must be reverse or forward: got {direction!r}")


def jsd_loss(
    student_logits: Array, teacher_logits: Array, *, beta: float = 0.5, mask: Array | None = None
) -> Array:
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649), ``[B, T]``.

    ``beta KL(q || M) + (1 - beta) KL(p || M)`` with ``M = beta q + (1 - beta) p``: the weight of a side
    in the mixture is its weight in the sum. As in the code bases that use it, beta = 0 is the forward
    KL(q || p) and beta = 1 the reverse KL(p || q), the limits of the divergence over its weight.

    Args:
      student_logits, teacher_logits: ``[B, T, V]``, at the sampling temperature.
      beta: in [0, 1].
      mask: ``[B, T]``, to read nothing behind it.

    Raises:
      ValueError: beta lies outside [0, 1].

    >>> p = jnp.log(jnp.array([[[.5, .5]], [[.25, .75]]])) * jnp.ones((2, 6, 1))
    >>> q = jnp.log(jnp.array([.25, .75])) * jnp.ones((2, 6, 1))
    >>> jsd_loss(p, q)  # M = (.375, .625)
    Array([[0.0338, 0.0338, 0.0338, 0.0338, 0.0338, 0.0338],
           [0.    , 0.    , 0.    , 0.    , 0.    , 0.    ]], dtype=float32)
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1]: got {beta}; 0.5 weighs both sides alike")
    log_p, log_q = _logprobs(student_logits, teacher_logits, mask)
    if beta == 0:
        return _kl(log_q, log_p)
    if beta == 1:
        return _kl(log_p, log_q)
    # Of an id that a side excludes a finite logarithm, for the gradient: it adds as little to the mixture.
    finite_p, finite_q = (jnp.maximum(x, SMALLEST_LOGPROB) for x in (log_p, log_q))
    log_m = jnp.logaddexp(jnp.log(beta) + finite_q, jnp.log1p(-beta) + finite_p)
    return beta * _kl(log_q, log_m) + (1.0 - beta) * _kl(log_p, log_m)


def _logprobs(student: Array, teacher: Array, mask: Array | None) -> tuple[Array, Array]:
    student, teacher = read(mask, student, teacher)
    teacher = jax.lax.stop_gradient(teacher)
    return jax.nn.log_softmax(student, axis=-1), jax.nn.log_softmax(teacher, axis=-1)


def _kl(log_a: Array, log_b: Array) -> Array:
    """``sum a (log a - log b)``; an id that ``a`` excludes (log-prob -inf) adds nothing."""
    there = log_a > -jnp.inf
    difference = jnp.where(there, log_a, 0.0) - jnp.where(there, log_b, 0.0)
    return jnp.sum(jnp.exp(log_a) * difference, axis=-1)
