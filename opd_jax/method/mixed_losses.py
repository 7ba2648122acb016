"""The wider family: losses that add to, switch or extrapolate a base loss, unreduced ``[B, T]`` nats.

Each function names its source; what a source leaves open is an argument without a default. Given the
mask, none reads what lies behind it, forward or backward.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opd_jax.method.losses import Surrogate, importance_ratio, k3, read, read_support, surrogate_loss

Array = jax.Array


def topk_forward_kl(
    student_logprobs_on_support: Array, teacher_logprobs_on_support: Array, *, mask: Array | None = None
) -> Array:
    """``sum_S q (log q - log p)`` of raw probabilities on the teacher's support, ``[B, T]``.

    >>> p = jnp.log(jnp.array([[[.5, .25]], [[.5, .5]]])) * jnp.ones((2, 6, 1))
    >>> q = jnp.log(jnp.array([.5, .5])) * jnp.ones((2, 6, 1))
    >>> topk_forward_kl(p, q)  # .5 log(.5 / .25)
    Array([[0.3466, 0.3466, 0.3466, 0.3466, 0.3466, 0.3466],
           [0.    , 0.    , 0.    , 0.    , 0.    , 0.    ]], dtype=float32)
    """
    log_p, log_q = read_support(mask, student_logprobs_on_support, teacher_logprobs_on_support)
    log_q = jax.lax.stop_gradient(log_q)
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def entropy_aware_loss(
    base: Array,
    teacher_entropy: Array,
    student_logprobs_on_support: Array,
    teacher_logprobs_on_support: Array,
    *,
    alpha: float = 1.0,
    entropy_threshold: float = 0.8,
    mask: Array | None = None,
) -> Array:
    """Entropy-aware OPD (arXiv 2603.07079): forward KL is added where the teacher is unsure, ``[B, T]``.

    ``base + alpha * 1[H_q >= entropy_threshold] * sum_S q (log q - log p)``; the base stays on every token.

    Args:
      base: ``[B, T]``.
      teacher_entropy: ``[B, T]`` nats.
      student_logprobs_on_support, teacher_logprobs_on_support: ``[B, T, K]``, K = 16 in the paper.
      alpha, entropy_threshold: the paper's, as reported of its code.
      mask: ``[B, T]``, to read nothing behind it.

    >>> p = jnp.log(jnp.array([[[.5, .25]], [[.5, .5]]])) * jnp.ones((2, 6, 1))
    >>> q = jnp.log(jnp.array([.5, .5])) * jnp.ones((2, 6, 1))
    >>> entropy = jnp.array([.0, .4, .7, .8, 1., 2.]) * jnp.ones((2, 1))
    >>> entropy_aware_loss(jnp.ones((2, 6)), entropy, p, q)  # 1 + .5 log 2 from an entropy of .8 on
    Array([[1.    , 1.    , 1.    , 1.3466, 1.3466, 1.3466],
           [1.    , 1.    , 1.    , 1.    , 1.    , 1.    ]], dtype=float32)
    """
    [base] = read(mask, base)
    forward = topk_forward_kl(student_logprobs_on_support, teacher_logprobs_on_support, mask=mask)
    return base + alpha * jnp.where(teacher_entropy >= entropy_threshold, forward, 0.0)


def trust_region_loss(
    base: Array,
    cur: Array,
    tea: Array,
    student_logprobs_on_support: Array,
    teacher_logprobs_on_support: Array,
    noise: Array,
    *,
    mask: Array | None = None,
) -> Array:
    """TrOPD (arXiv 2606.01249): tokens the teacher would not accept get forward KL instead, ``[B, T]``.

    Each token keeps ``base`` with probability ``min(q / p, 1)``, the acceptance rule of speculative
    decoding; an outlier gets ``sum_S q (log q - log p)`` on the teacher's top K, 64 in the paper. Its third
    term, on prefixes written by the teacher, has no counterpart in rollouts of the student alone.

    Args:
      base, cur, tea: ``[B, T]``.
      student_logprobs_on_support, teacher_logprobs_on_support: ``[B, T, K]``.
      noise: ``[B, T]`` uniform in [0, 1), drawn anew for every update.
      mask: ``[B, T]``, to read nothing behind it.

    >>> p = jnp.log(jnp.array([[[.5, .25]], [[.5, .25]]])) * jnp.ones((2, 6, 1))
    >>> q = jnp.log(jnp.array([.5, .5])) * jnp.ones((2, 6, 1))
    >>> cur, tea = jnp.full((2, 6), -1.), -1. + jnp.log(jnp.array([[.5], [2.]]))  # q / p = 1/2 and 2
    >>> noise = jnp.array([.0, .2, .4, .6, .8, .9]) * jnp.ones((2, 1))
    >>> trust_region_loss(jnp.ones((2, 6)), cur, tea, p, q, noise)  # an outlier costs .5 log 2
    Array([[1.    , 1.    , 1.    , 0.3466, 0.3466, 0.3466],
           [1.    , 1.    , 1.    , 1.    , 1.    , 1.    ]], dtype=float32)
    """
    base, cur, tea = read(mask, base, cur, tea)
    kept = noise < importance_ratio(tea, cur)  # a choice, which has no gradient
    outlier = topk_forward_kl(student_logprobs_on_support, teacher_logprobs_on_support, mask=mask)
    return jnp.where(kept, base, outlier)


def sign_gated_advantage(
    old: Array,
    tea: Array,
    ref: Array,
    reward: Array,
    *,
    extrapolation: float = 1.8,
    conflict: float = 1.0,
    mask: Array | None = None,
) -> Array:
    """SG-OPD (arXiv 2606.09304): the teacher is trusted further where the verifier agrees, ``[B, T]``.

    With ``A = tea - old`` and the task's direction R, +1 for a right answer and -1 for a wrong one:
    where the signs agree ``(ref - old) + extrapolation (tea - ref)``, which passes the teacher on the
    line from the reference; where they differ ``conflict * A``. The source's factor ``min(1, tau / |A|)``
    of mean one is the weight `sg_opd`.

    Args:
      old, tea, ref: ``[B, T]`` log-probs of the sampled token: behaviour, teacher, reference (the
        student before training).
      reward: ``[B, T]``, above 0 where the sequence's answer is right.
      extrapolation, conflict: as reproduced in arXiv 2608.24696, not read in the source itself.
      mask: ``[B, T]``, to read nothing behind it.

    >>> old, right = jnp.zeros((2, 6)), jnp.array([[1.], [0.]]) * jnp.ones((2, 6))
    >>> tea = jnp.array([1., 2., -1., -2., 0., 8.]) * jnp.ones((2, 1))
    >>> sign_gated_advantage(old, tea, old, right)  # 1.8 A where they agree
    Array([[ 1.8,  3.6, -1. , -2. ,  0. , 14.4],
           [ 1. ,  2. , -1.8, -3.6,  0. ,  8. ]], dtype=float32)
    """
    old, tea, ref = (jax.lax.stop_gradient(x) for x in read(mask, old, tea, ref))
    a = tea - old
    agree = jnp.sign(a) == jnp.where(reward > 0, 1.0, -1.0)
    return jnp.where(agree, (ref - old) + extrapolation * (tea - ref), conflict * a)


def sign_gated_loss(
    cur: Array,
    old: Array,
    tea: Array,
    ref: Array,
    reward: Array,
    *,
    extrapolation: float = 1.8,
    conflict: float = 1.0,
    surrogate: Surrogate = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    mask: Array | None = None,
) -> Array:
    """SG-OPD as a loss: `surrogate_loss` of `sign_gated_advantage`, whose arguments these are, ``[B, T]``.

    Goes with the weights `sg_opd`.

    >>> old, right = jnp.zeros((2, 6)), jnp.array([[1.], [0.]]) * jnp.ones((2, 6))
    >>> tea = jnp.array([1., 2., -1., -2., -3., 8.]) * jnp.ones((2, 1))
    >>> sign_gated_loss(old, old, tea, old, right)  # at rho = 1 minus the advantage
    Array([[ -1.8,  -3.6,   1. ,   2. ,   3. , -14.4],
           [ -1. ,  -2. ,   1.8,   3.6,   5.4,  -8. ]], dtype=float32)
    """
    a = sign_gated_advantage(old, tea, ref, reward, extrapolation=extrapolation, conflict=conflict, mask=mask)
    return surrogate_loss(
        cur,
        jax.lax.stop_gradient(old),
        a,
        surrogate=surrogate,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        mask=mask,
    )


def scope_loss(cur: Array, old: Array, tea: Array, reward: Array, *, mask: Array | None = None) -> Array:
    """SCOPE's base loss (arXiv 2604.10688), ``[B, T]``: imitate right answers, distil on wrong ones.

    ``-rho`` on right answers, whose gradient at rho = 1 is that of maximum likelihood, and
    ``rho (sg(cur) - tea)`` on wrong ones. Goes with the weights `scope_opd`.

    >>> old = jnp.full((2, 6), -3.)
    >>> cur = old + jnp.log(jnp.array([1., 1., 1., 2., 2., 2.]))
    >>> right = jnp.array([[1.], [0.]]) * jnp.ones((2, 6))
    >>> scope_loss(cur, old, cur - 2., right)  # -rho, and rho (cur - tea) = 2 rho
    Array([[-1., -1., -1., -2., -2., -2.],
           [ 2.,  2.,  2.,  4.,  4.,  4.]], dtype=float32)
    """
    cur, old, tea = read(mask, cur, old, tea)
    rho = importance_ratio(cur, jax.lax.stop_gradient(old))
    gap = jax.lax.stop_gradient(cur - tea)
    return jnp.where(reward > 0, -rho, rho * gap)


def reference_kl(cur: Array, ref: Array, *, mask: Array | None = None) -> Array:
    """The k3 estimate of KL(p || ref) on sampled tokens, ``exp(r) - 1 - r``, ``r = ref - cur``, ``[B, T]``.

    >>> cur, r = jnp.full((2, 6), -3.), jnp.log(jnp.array([[2.], [1.]]))
    >>> reference_kl(cur, cur + r)  # 2 - 1 - log 2
    Array([[0.3069, 0.3069, 0.3069, 0.3069, 0.3069, 0.3069],
           [0.    , 0.    , 0.    , 0.    , 0.    , 0.    ]], dtype=float32)
    """
    cur, ref = read(mask, cur, ref)
    return k3(jax.lax.stop_gradient(ref) - cur)


def stable_loss(
    base: Array,
    kl_to_reference: Array,
    gold: Array,
    *,
    kl_weight: float,
    gold_weight: float,
    mask: Array | None = None,
) -> Array:
    """StableOPD (arXiv 2604.08527): ``base + kl_weight * KL + gold_weight * gold``, ``[B, T]``.

    Args:
      base: ``[B, T]``, 0 on rows of gold solutions.
      kl_to_reference: ``[B, T]``, see `reference_kl`.
      gold: ``[B, T]`` cross-entropy on rows of gold solutions, 0 on rollouts.
      kl_weight, gold_weight: not published, no default.
      mask: ``[B, T]``, to read nothing behind it.

    >>> base = jnp.array([[1., 2., 3., 4., 5., 6.], [0., 0., 0., 0., 0., 0.]])
    >>> gold = jnp.array([[0., 0., 0., 0., 0., 0.], [4., 4., 4., 8., 8., 8.]])
    >>> stable_loss(base, jnp.ones((2, 6)), gold, kl_weight=0.5, gold_weight=0.25)
    Array([[1.5, 2.5, 3.5, 4.5, 5.5, 6.5],
           [1.5, 1.5, 1.5, 2.5, 2.5, 2.5]], dtype=float32)
    """
    base, kl_to_reference, gold = read(mask, base, kl_to_reference, gold)
    return base + kl_weight * kl_to_reference + gold_weight * gold
