"""Base losses: what a token would cost if every token counted the same.

Every loss is unreduced, ``[B, T]`` in nats, and sees neither mask nor weight; `objective` applies
both and divides once.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array
Surrogate = Literal["ppo", "is", "reinforce"]
Advantage = Literal["old", "cur"]

# exp(20) is 5e8: past it a ratio carries no information and its products overflow.
LARGEST_LOG_RATIO = 20.0


def importance_ratio(cur: Array, old: Array) -> Array:
    """``rho = exp(cur - old)``, the log clipped to +-20, ``[B, T]``."""
    return jnp.exp(jnp.clip(cur - old, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))


def sampled_token_loss(
    cur: Array,
    old: Array,
    tea: Array,
    *,
    surrogate: Surrogate = "ppo",
    advantage: Advantage = "old",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> Array:
    """Sampled-token OPD: a policy gradient whose reward is the teacher's log-prob of each token.

    With ``A = tea - x``, where x is ``old`` (frozen: computed once per rollout) or ``sg(cur)``
    (recomputed), and ``rho = exp(cur - old)``:

    - ``ppo``: ``max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))``, and where A < 0 at most
      ``-dual_clip A``;
    - ``is``: ``-rho A``;
    - ``reinforce``: ``-cur A``.

    Args:
      cur: ``[B, T]`` log-prob of the sampled token under the parameters being trained, nats.
      old: ``[B, T]`` the same under the behaviour policy.
      tea: ``[B, T]`` the same under the teacher.
      surrogate: which of the three.
      advantage: ``old`` or ``cur``.
      clip_low, clip_high, dual_clip: of ``ppo``.

    Returns:
      ``[B, T]``.

    Raises:
      ValueError: an unknown surrogate or advantage.

    >>> sampled_token_loss(jnp.array([[0.]]), jnp.array([[0.]]), jnp.array([[-2.]]))
    Array([[2.]], dtype=float32)
    """
    old, tea = jax.lax.stop_gradient(old), jax.lax.stop_gradient(tea)
    if advantage not in ("old", "cur"):
        raise ValueError(f"advantage must be old or cur: got {advantage!r}")
    # A reward is no function of the parameters being trained: detached also when recomputed.
    a = tea - (old if advantage == "old" else jax.lax.stop_gradient(cur))
    if surrogate == "reinforce":
        return -cur * a
    rho = importance_ratio(cur, old)
    if surrogate == "is":
        return -rho * a
    if surrogate != "ppo":
        raise ValueError(f"surrogate must be ppo, is or reinforce: got {surrogate!r}")
    clipped = jnp.maximum(-a * rho, -a * jnp.clip(rho, 1.0 - clip_low, 1.0 + clip_high))
    return jnp.where(a < 0, jnp.minimum(clipped, -dual_clip * a), clipped)


def topk_loss(student_logits_on_support: Array, teacher_logprobs_on_support: Array) -> Array:
    """Reverse KL on the teacher's top-K support, both sides renormalised (arXiv 2603.25562).

    ``sum_S p (log p - log q)``, differentiated directly and without an importance ratio. The gradient
    in the student's logits is ``p_u (b_u - L)`` on the support, ``b = log p - log q`` and L the loss,
    and exactly 0 off it. Blind to mass outside the support, which is why that mass is logged.

    Args:
      student_logits_on_support: ``[B, T, K]``; log-probs do as well, renormalisation removes the rest.
      teacher_logprobs_on_support: ``[B, T, K]``.

    Returns:
      ``[B, T]``.

    >>> loss = topk_loss(jnp.log(jnp.array([[[.5, .5]]])), jnp.log(jnp.array([[[.25, .75]]])))
    >>> round(float(loss[0, 0]), 4)  # .5 log(.5 / .25) + .5 log(.5 / .75)
    0.1438
    """
    log_p = jax.nn.log_softmax(student_logits_on_support, axis=-1)
    log_q = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logprobs_on_support), axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def cross_entropy(cur: Array) -> Array:
    """Supervised loss of given targets, ``-cur``, ``[B, T]``."""
    return -cur
