"""The wider family, token by token: other ways to weigh a token, each one function of arrays.

A weight is ``[B, T]``, nonnegative, detached, 0 off the mask, and not normalised: several multiply, and
`opd_jax.method.normalise` is applied once to the product. Each function names its source; constants are
the source's where it prints one. What a source leaves open is said, and is an argument without a
default where any number would be ours. ``p`` is the student, ``q`` the teacher.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opd_jax.method.arithmetic import quotient, wide
from opd_jax.method.gates import drift, masked
from opd_jax.method.losses import importance_ratio
from opd_jax.method.scope import masked_quantile
from opd_jax.method.segments import running_total, sequence_total

Array = jax.Array


def token_is(cur: Array, old: Array, mask: Array, *, low: float = 0.0, high: float = 2.0) -> Array:
    """Token-IS: the clipped importance ratio ``clip(exp(d), low, high)``, ``[B, T]``.

    For losses without a ratio of their own (reinforce, top-K); with ``ppo`` and ``is`` the ratio would
    count twice. The paper prints no bounds; these are ours.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> rho = jnp.array([[.5, 1., 1.5, 2., 3., 4.], [.1, .2, .5, 9., 9., 9.]])
    >>> token_is(jnp.log(rho), jnp.zeros((2, 6)), mask)
    Array([[0.5, 1. , 1.5, 2. , 2. , 2. ],
           [0.1, 0.2, 0.5, 2. , 0. , 0. ]], dtype=float32)
    """
    d = jax.lax.stop_gradient(drift(cur, old, mask))
    return masked(jnp.clip(importance_ratio(d, jnp.zeros_like(d)), low, high), mask)


def tip(
    entropy: Array,
    kl: Array,
    mask: Array,
    *,
    keep: float = 0.5,
    clip_quantile: float = 0.98,
    axis_name: str | None = None,
) -> Array:
    """TIP (arXiv 2604.14084): keep the tokens where the student is unsure or wrong, ``[B, T]`` of 0 and 1.

    ``score = h + k - h k`` with ``h`` the student's entropy, its top 2% clipped, and ``k`` its divergence
    from the teacher, each min-max scaled over the batch; the top ``keep`` of the scores stay.

    Args:
      entropy: ``[B, T]`` of the student, nats.
      kl: ``[B, T]`` KL(p || q), or an estimate on the support.
      mask: ``[B, T]``, nonzero on response tokens.
      keep: share of the tokens that stay.
      clip_quantile: of the entropies, before scaling; 1 clips nothing.
      axis_name: mapped axis whose rows belong to the batch.

    >>> entropy = jnp.array([[0., 0., 0., 0., 0., 4.], [0., 0., 2., 0., 0., 0.]])
    >>> kl = jnp.array([[0., 1., 0., 0., 0., 0.], [3., 0., 0., 0., 0., 4.]])
    >>> tip(entropy, kl, jnp.ones((2, 6)), keep=1/3, clip_quantile=1.0)  # 4 of 12: 1, 3/4, 1/2, 1, not 1/4
    Array([[0., 0., 0., 0., 0., 1.],
           [1., 0., 1., 0., 0., 1.]], dtype=float32)
    """
    entropy, kl = jax.lax.stop_gradient((entropy, kl))  # a least value over devices has no derivative
    highest = masked_quantile(entropy, mask, clip_quantile, axis_name)
    h = _min_max(jnp.minimum(entropy, highest), mask, axis_name)
    k = _min_max(kl, mask, axis_name)
    score = h + k - h * k
    least = masked_quantile(score, mask, 1.0 - keep, axis_name)
    return masked((score >= least).astype(jnp.float32), mask)


def prune(
    student_ids: Array,
    teacher_ids: Array,
    mask: Array,
    *,
    overlap: float = 0.7,
    drop: float = 0.01,
    base: float = 0.5,
    sequence_ids: Array | None = None,
) -> Array:
    """Prune-OPD (arXiv 2605.07804): less weight the more often the two models have parted, ``[B, T]``.

    ``clip(1 - drop * #{s <= t: overlap_s < overlap}, 0, 1) + base``, where ``overlap_s`` is the share of
    ids that the two top-K sets have in common at s (K = 16 in the paper).

    Args:
      student_ids, teacher_ids: ``[B, T, K]`` int32, most likely ids of each model, as many of either.
      mask: ``[B, T]``, nonzero on response tokens.
      overlap, drop, base: constants of the formula.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.

    Raises:
      ValueError: the two sets are not of one size, and their overlap no share of either.

    >>> parted = jnp.array([[0, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    >>> student = jnp.array([1, 2]) * jnp.ones((2, 6, 1), int)
    >>> teacher = student + parted[..., None]  # {1, 2} or {2, 3}: half in common
    >>> prune(student, teacher, jnp.ones((2, 6)), drop=0.25)
    Array([[1.5 , 1.25, 1.25, 1.  , 1.  , 1.  ],
           [1.25, 1.  , 0.75, 0.5 , 0.5 , 0.5 ]], dtype=float32)
    """
    sizes = student_ids.shape[-1], teacher_ids.shape[-1]
    if sizes[0] != sizes[1]:
        raise ValueError(f"two top-K sets of one size overlap by a share: got {sizes}; cut the longer one")
    same = jnp.any(student_ids[..., :, None] == teacher_ids[..., None, :], axis=-1)
    parted = (jnp.mean(same.astype(jnp.float32), axis=-1) < overlap) & mask.astype(bool)
    count = running_total(parted.astype(jnp.float32), mask, sequence_ids)
    return masked(jnp.clip(1.0 - drop * count, 0.0, 1.0) + base, mask)


def iw_opd(
    old: Array, tea: Array, mask: Array, *, largest: float = 1.5, sequence_ids: Array | None = None
) -> Array:
    """IW-OPD (arXiv 2606.22600): more weight before most of the disagreement has happened, ``[B, T]``.

    ``1 + (largest - 1) (1 - F_t)`` with ``F_t`` the share of the sequence's ``|A|``, ``A = tea - old``,
    that lies before t (exclusive, as in the authors' code).

    Args:
      old, tea, mask: ``[B, T]``.
      largest: weight of the first token.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> tea = jnp.array([[-1., 2., -1., 0., 0., 0.], [1., 1., 1., 1., 9., 9.]])
    >>> iw_opd(jnp.zeros((2, 6)), tea, mask)  # 0, 1, 3, 4 of 4 lie before; 0, 1, 2, 3 of 4
    Array([[1.5  , 1.375, 1.125, 1.   , 1.   , 1.   ],
           [1.5  , 1.375, 1.25 , 1.125, 0.   , 0.   ]], dtype=float32)
    """
    a = jnp.abs(jax.lax.stop_gradient(wide(tea) - wide(old)))
    total = sequence_total(a, mask, sequence_ids)
    before = running_total(a, mask, sequence_ids) - a
    return masked(1.0 + (largest - 1.0) * jnp.maximum(1.0 - quotient(before, total), 0.0), mask)


def sg_opd(old: Array, tea: Array, mask: Array, *, tau: float) -> Array:
    """The weights of SG-OPD (arXiv 2606.09304): no token pulls harder than ``tau`` allows, ``[B, T]``.

    ``min(1, tau / |A|)`` with ``A = tea - old``; the normaliser makes their mean one. Goes with
    `sign_gated_loss`.

    Args:
      old, tea, mask: ``[B, T]``.
      tau: nats; not known to us, no default.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> tea = jnp.array([[1., -1., 2., -4., 8., 0.], [0., 0., 0., 4., 9., 9.]])
    >>> sg_opd(jnp.zeros((2, 6)), tea, mask, tau=2.)
    Array([[1.  , 1.  , 1.  , 0.5 , 0.25, 1.  ],
           [1.  , 1.  , 1.  , 0.5 , 0.  , 0.  ]], dtype=float32)
    """
    a = jnp.abs(jax.lax.stop_gradient(wide(tea) - wide(old)))
    return masked(tau / jnp.maximum(a, tau), mask)


def popd(
    mask: Array,
    step: Array,
    *,
    start: int,
    growth: int,
    every: int,
    sequence_ids: Array | None = None,
) -> Array:
    """POPD (arXiv 2605.31490): only the first H tokens count, and H grows with training, ``[B, T]``.

    ``1[t <= H]`` with ``H = start + growth * floor(step / every)``. The paper's three constants are not
    known to us, so there is no default; it also stops *sampling* at H, which a weight cannot.

    >>> mask = jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> popd(mask, jnp.array(25), start=1, growth=1, every=10)  # H = 1 + 2
    Array([[0., 0., 1., 1., 1., 0.],
           [1., 1., 1., 0., 0., 0.]], dtype=float32)
    """
    horizon = start + growth * (step // every)
    place = running_total(jnp.ones(mask.shape), mask, sequence_ids)
    return masked((place <= horizon).astype(jnp.float32), mask)


def _min_max(x: Array, mask: Array, axis_name: str | None) -> Array:
    """``x`` scaled to [0, 1] over the mask, 0 where all of it is one number; behind the mask anything."""
    inside, x = mask.astype(bool), wide(x)
    low, high = jnp.min(jnp.where(inside, x, jnp.inf)), jnp.max(jnp.where(inside, x, -jnp.inf))
    if axis_name is not None:
        low, high = jax.lax.pmin(low, axis_name), jax.lax.pmax(high, axis_name)
    return quotient(x - low, high - low)
