"""Base losses: what a token would cost if every token counted the same.

Every loss is unreduced, ``[B, T]`` in nats, and carries no weight; `objective` weighs and divides once.
A loss that is given the mask replaces what lies behind it before the first operation, so that NaN or
infinity there can reach neither a value nor a gradient (the double-where form).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from opd_jax.method.arithmetic import wide

Array = jax.Array
Surrogate = Literal["ppo", "is", "reinforce"]
Advantage = Literal["old", "cur"]

# exp(20) is 5e8: past it a ratio carries no information and its products overflow.
LARGEST_LOG_RATIO = 20.0
# An id that a model excludes has a log-prob of -inf, and 0 * inf is no number: on a support it is this.
SMALLEST_LOGPROB = -1e5


def importance_ratio(cur: Array, old: Array) -> Array:
    """``rho = exp(cur - old)``, the log clipped to +-20, ``[B, T]``.

    >>> old = jnp.full((2, 6), -3.)
    >>> rho = jnp.array([1., 1.1, 2., 4., 0.5, 0.9])
    >>> importance_ratio(old + jnp.log(rho), old)
    Array([[1. , 1.1, 2. , 4. , 0.5, 0.9],
           [1. , 1.1, 2. , 4. , 0.5, 0.9]], dtype=float32)
    """
    return jnp.exp(jnp.clip(wide(cur) - wide(old), -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))


def k3(r: Array) -> Array:
    """``exp(r) - 1 - r``, at least 0: an estimate of KL(p || q) from ``r = log q - log p`` drawn from p."""
    # Written with expm1 because of the small r of drift: 1 + r + r^2 / 2 has no digits left for r^2.
    r = wide(r)
    return jnp.expm1(jnp.clip(r, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)) - r


def read(mask: Array | None, *arrays: Array) -> list[Array]:
    """The arrays in float32, zeros behind the mask if there is one; ``[B, T]`` or ``[B, T, K]``."""
    arrays = tuple(wide(x) for x in arrays)
    if mask is None:
        return list(arrays)
    inside = mask.astype(bool)
    return [jnp.where(inside.reshape(inside.shape + (1,) * (x.ndim - 2)), x, 0.0) for x in arrays]


def read_support(mask: Array | None, *arrays: Array) -> list[Array]:
    """`read` for log-probs or logits on a support ``[B, T, K]``: of excluded ids ``p log p`` is 0."""
    return [jnp.maximum(x, SMALLEST_LOGPROB) for x in read(mask, *arrays)]


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
    mask: Array | None = None,
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
      mask: ``[B, T]``, to read nothing behind it.

    Returns:
      ``[B, T]``.

    Raises:
      ValueError: an unknown surrogate or advantage.

    >>> old = jnp.full((2, 6), -3.)
    >>> rho = jnp.array([1., 1.1, 2., 4., 0.5, 0.9])
    >>> cur, tea = old + jnp.log(rho), old + jnp.array([[1.], [-1.]])  # A = 1 and A = -1
    >>> sampled_token_loss(cur, old, tea)  # ratios are clipped at 1.2 and 0.8, the cost of a bad token at 3
    Array([[-1. , -1.1, -1.2, -1.2, -0.5, -0.9],
           [ 1. ,  1.1,  2. ,  3. ,  0.8,  0.9]], dtype=float32)
    >>> sampled_token_loss(cur, old, tea, surrogate="is")
    Array([[-1. , -1.1, -2. , -4. , -0.5, -0.9],
           [ 1. ,  1.1,  2. ,  4. ,  0.5,  0.9]], dtype=float32)
    """
    cur, old, tea = read(mask, cur, old, tea)
    old, tea = jax.lax.stop_gradient(old), jax.lax.stop_gradient(tea)
    if advantage not in ("old", "cur"):
        raise ValueError(f"advantage must be old or cur: got {advantage!r}")
    # A reward is no function of the parameters being trained: detached also when recomputed.
    a = tea - (old if advantage == "old" else jax.lax.stop_gradient(cur))
    return surrogate_loss(
        cur, old, a, surrogate=surrogate, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )


def surrogate_loss(
    cur: Array,
    old: Array,
    a: Array,
    *,
    surrogate: Surrogate = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    mask: Array | None = None,
) -> Array:
    """The surrogate of any advantage ``a``, ``[B, T]``; arguments as in `sampled_token_loss`.

    >>> cur = jnp.array([[-1., -2., -3., -4., -5., -6.], [-1., -1., -1., -1., -1., -1.]])
    >>> surrogate_loss(cur, cur, jnp.array([[1.], [-2.]]), surrogate="reinforce")  # -cur A
    Array([[ 1.,  2.,  3.,  4.,  5.,  6.],
           [-2., -2., -2., -2., -2., -2.]], dtype=float32)
    >>> surrogate_loss(cur, cur, jnp.array([[1.], [-2.]]))  # rho = 1
    Array([[-1., -1., -1., -1., -1., -1.],
           [ 2.,  2.,  2.,  2.,  2.,  2.]], dtype=float32)
    """
    cur, old, a = read(mask, cur, old, a)
    if surrogate == "reinforce":
        return -cur * a
    rho = importance_ratio(cur, old)
    if surrogate == "is":
        return -rho * a
    if surrogate != "ppo":
        raise ValueError(f"surrogate must be ppo, is or reinforce: got {surrogate!r}")
    clipped = jnp.maximum(-a * rho, -a * jnp.clip(rho, 1.0 - clip_low, 1.0 + clip_high))
    return jnp.where(a < 0, jnp.minimum(clipped, -dual_clip * a), clipped)


def topk_loss(
    student_logits_on_support: Array, teacher_logprobs_on_support: Array, *, mask: Array | None = None
) -> Array:
    """Reverse KL on the teacher's top-K support, both sides renormalised (arXiv 2603.25562).

    ``sum_S p (log p - log q)``, differentiated directly and without an importance ratio. The gradient
    in the student's logits is ``p_u (b_u - L)`` on the support, ``b = log p - log q`` and L the loss,
    and exactly 0 off it. Blind to mass outside the support, which is why that mass is logged.

    Args:
      student_logits_on_support: ``[B, T, K]``; log-probs do as well, renormalisation removes the rest.
      teacher_logprobs_on_support: ``[B, T, K]``.
      mask: ``[B, T]``, to read nothing behind it.

    Returns:
      ``[B, T]``.

    >>> p = jnp.log(jnp.array([[[.5, .5]], [[.25, .75]]])) * jnp.ones((2, 6, 1))
    >>> q = jnp.log(jnp.array([.25, .75])) * jnp.ones((2, 6, 1))
    >>> topk_loss(p, q)  # .5 log(.5 / .25) + .5 log(.5 / .75), and nothing where p = q
    Array([[0.1438, 0.1438, 0.1438, 0.1438, 0.1438, 0.1438],
           [0.    , 0.    , 0.    , 0.    , 0.    , 0.    ]], dtype=float32)
    """
    z, log_q = read_support(mask, student_logits_on_support, teacher_logprobs_on_support)
    log_p = jax.nn.log_softmax(z, axis=-1)
    log_q = jax.nn.log_softmax(jax.lax.stop_gradient(log_q), axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def topk_unrenormalised_loss(
    student_logprobs_on_support: Array, teacher_logprobs_on_support: Array, *, mask: Array | None = None
) -> Array:
    """``sum_S p (log p - log q)`` of raw probabilities, ``[B, T]``.

    Not a divergence: it falls when the student leaves the support altogether, and training on it is
    reported to collapse (arXiv 2603.25562). Arguments as in `topk_loss`, both of them log-probs.

    >>> p = jnp.log(jnp.array([[[.5, .1]], [[.25, .2]]])) * jnp.ones((2, 6, 1))
    >>> q = jnp.log(jnp.array([.25, .2])) * jnp.ones((2, 6, 1))
    >>> topk_unrenormalised_loss(p, q)  # .5 log 2 - .1 log 2
    Array([[0.2773, 0.2773, 0.2773, 0.2773, 0.2773, 0.2773],
           [0.    , 0.    , 0.    , 0.    , 0.    , 0.    ]], dtype=float32)
    """
    log_p, log_q = read_support(mask, student_logprobs_on_support, teacher_logprobs_on_support)
    log_q = jax.lax.stop_gradient(log_q)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def topk_tail_loss(
    student_logprobs_on_support: Array, teacher_logprobs_on_support: Array, *, mask: Array | None = None
) -> Array:
    """Reverse KL with all tokens off the support in one bucket, ``[B, T]``.

    ``sum_S p (log p - log q) + P (log P - log Q)`` with P and Q the mass outside: the reverse KL after
    merging the tail, a lower bound of the full one. Arguments as in `topk_unrenormalised_loss`.

    >>> p = jnp.log(jnp.array([[[.5, .1]], [[.25, .2]]])) * jnp.ones((2, 6, 1))
    >>> q = jnp.log(jnp.array([.25, .2])) * jnp.ones((2, 6, 1))
    >>> topk_tail_loss(p, q)  # .5 log 2 - .1 log 2 + .4 log(.4 / .55)
    Array([[0.1499, 0.1499, 0.1499, 0.1499, 0.1499, 0.1499],
           [0.    , 0.    , 0.    , 0.    , 0.    , 0.    ]], dtype=float32)
    """
    log_p, log_q = read_support(mask, student_logprobs_on_support, teacher_logprobs_on_support)
    log_q = jax.lax.stop_gradient(log_q)
    tail_p, tail_q = _log_outside(log_p), _log_outside(log_q)
    on_support = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return on_support + jnp.exp(tail_p) * (tail_p - tail_q)


def topk_generalised_loss(
    student_logprobs_on_support: Array, teacher_logprobs_on_support: Array, *, mask: Array | None = None
) -> Array:
    """Generalised KL on the support, ``sum_S p log(p / q) - p + q``, ``[B, T]``.

    The Bregman divergence of negative entropy between measures that need not sum to one: never
    negative, and 0 only where p = q on the whole support. Arguments as in `topk_unrenormalised_loss`.

    >>> p = jnp.log(jnp.array([[[.5, .1]], [[.25, .2]]])) * jnp.ones((2, 6, 1))
    >>> q = jnp.log(jnp.array([.25, .2])) * jnp.ones((2, 6, 1))
    >>> topk_generalised_loss(p, q)  # .5 log 2 - .1 log 2 - .6 + .45
    Array([[0.1273, 0.1273, 0.1273, 0.1273, 0.1273, 0.1273],
           [0.    , 0.    , 0.    , 0.    , 0.    , 0.    ]], dtype=float32)
    """
    log_p, log_q = read_support(mask, student_logprobs_on_support, teacher_logprobs_on_support)
    log_q = jax.lax.stop_gradient(log_q)
    p = jnp.exp(log_p)
    return jnp.sum(p * (log_p - log_q) - p + jnp.exp(log_q), axis=-1)


# Below this a float32 sum of probabilities cannot tell the mass outside from rounding.
SMALLEST_TAIL = 1e-7


def _log_outside(logprobs: Array) -> Array:
    """``log(1 - sum exp(logprobs))`` over the last axis, at least ``log SMALLEST_TAIL``."""
    inside = jax.nn.logsumexp(logprobs, axis=-1)
    some = inside < jnp.log1p(-SMALLEST_TAIL)
    # Where nothing is outside, the logarithm and its gradient are taken at a harmless place.
    return jnp.where(some, jnp.log(-jnp.expm1(jnp.where(some, inside, -1.0))), jnp.log(SMALLEST_TAIL))


def student_topk_loss(
    cur_on_support: Array,
    old_on_support: Array,
    tea_on_support: Array,
    *,
    surrogate: Surrogate = "ppo",
    advantage: Advantage = "old",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    mask: Array | None = None,
) -> Array:
    """Student-support top-k (arXiv 2604.13016): a policy gradient over the student's own K likeliest ids.

    With p and q renormalised on the support, every support token has the advantage
    ``A = -p (log p - log q)`` and a ratio of its own, ``rho = exp(cur - old)``; their surrogates are
    summed over K. At rho = 1 the value is the renormalised reverse KL; the gradient is too where the support
    holds all of the student's mass, and otherwise lowers that mass as well.

    Args:
      cur_on_support, old_on_support, tea_on_support: ``[B, T, K]`` log-probs of the ids under the
        parameters being trained, the behaviour policy and the teacher.
      surrogate, advantage, clip_low, clip_high, dual_clip: as in `sampled_token_loss`; ``advantage`` says
        whose p is in A.
      mask: ``[B, T]``, to read nothing behind it.

    Returns:
      ``[B, T]``.

    >>> p = jnp.log(jnp.array([[[.5, .5]], [[.25, .75]]])) * jnp.ones((2, 6, 1))
    >>> q = jnp.log(jnp.array([.25, .75])) * jnp.ones((2, 6, 1))
    >>> student_topk_loss(p, p, q)  # the reverse KL: .5 log(.5 / .25) + .5 log(.5 / .75)
    Array([[0.1438, 0.1438, 0.1438, 0.1438, 0.1438, 0.1438],
           [0.    , 0.    , 0.    , 0.    , 0.    , 0.    ]], dtype=float32)
    """
    cur, old, tea = read_support(mask, cur_on_support, old_on_support, tea_on_support)
    old, tea = jax.lax.stop_gradient(old), jax.lax.stop_gradient(tea)
    if advantage not in ("old", "cur"):
        raise ValueError(f"advantage must be old or cur: got {advantage!r}")
    log_p = jax.nn.log_softmax(old if advantage == "old" else jax.lax.stop_gradient(cur), axis=-1)
    a = -jnp.exp(log_p) * (log_p - jax.nn.log_softmax(tea, axis=-1))
    return jnp.sum(
        surrogate_loss(
            cur, old, a, surrogate=surrogate, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
        ),
        axis=-1,
    )


def cross_entropy(cur: Array, *, mask: Array | None = None) -> Array:
    """Supervised loss of given targets, ``-cur``, ``[B, T]`` nats.

    >>> cross_entropy(jnp.array([[-.5, -1., -2., -3., -4., -5.], [-1., -1., -1., -1., -1., -1.]]))
    Array([[0.5, 1. , 2. , 3. , 4. , 5. ],
           [1. , 1. , 1. , 1. , 1. , 1. ]], dtype=float32)
    """
    [cur] = read(mask, cur)
    return -cur
