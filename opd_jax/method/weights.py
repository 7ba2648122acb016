"""The wider family: other ways to weigh a token, each one function of arrays.

A weight is ``[B, T]``, nonnegative, detached, 0 off the mask, and not normalised: several multiply, and
`opd_jax.method.normalise` is applied once to the product. Each function names its source; constants are
the source's where it prints one. What a source leaves open is said, and is an argument without a
default where any number would be ours.

Values that belong to a sequence (reward, group, staleness) come as ``[B, T]`` arrays, the same on every
token of the sequence, because sequences may share a row. ``p`` is the student, ``q`` the teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from opd_jax.method.gates import drift, masked
from opd_jax.method.losses import importance_ratio
from opd_jax.method.segments import first_response, segment_total, sequence_segments

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
    entropy, kl = (masked(jax.lax.stop_gradient(x), mask) for x in (entropy, kl))
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
      student_ids, teacher_ids: ``[B, T, K]`` int32, most likely ids of each model.
      mask: ``[B, T]``, nonzero on response tokens.
      overlap, drop, base: constants of the formula.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.

    >>> parted = jnp.array([[0, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    >>> student = jnp.array([1, 2]) * jnp.ones((2, 6, 1), int)
    >>> teacher = student + parted[..., None]  # {1, 2} or {2, 3}: half in common
    >>> prune(student, teacher, jnp.ones((2, 6)), drop=0.25)
    Array([[1.5 , 1.25, 1.25, 1.  , 1.  , 1.  ],
           [1.25, 1.  , 0.75, 0.5 , 0.5 , 0.5 ]], dtype=float32)
    """
    same = jnp.any(student_ids[..., :, None] == teacher_ids[..., None, :], axis=-1)
    parted = (jnp.mean(same.astype(jnp.float32), axis=-1) < overlap) & mask.astype(bool)
    count = _running_total(parted.astype(jnp.float32), mask, sequence_ids)
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
    a = jnp.abs(masked(jax.lax.stop_gradient(tea), mask) - masked(jax.lax.stop_gradient(old), mask))
    total = segment_total(a, sequence_segments(mask, sequence_ids))
    before = _running_total(a, mask, sequence_ids) - a
    share = jnp.where(total > 0, before / jnp.where(total > 0, total, 1.0), 0.0)
    return masked(1.0 + (largest - 1.0) * jnp.clip(1.0 - share, 0.0, 1.0), mask)


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
    place = _running_total(jnp.ones(mask.shape), mask, sequence_ids)
    return masked((place <= horizon).astype(jnp.float32), mask)


def fire_opd(
    tea: Array,
    entropy: Array,
    teacher_entropy: Array,
    mask: Array,
    *,
    drop: float = 0.2,
    teacher_share: float = 1.0,
    student_share: float = 1.0,
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """FiRe-OPD (arXiv 2606.02684): drop what the teacher finds unlikely, weigh confidence, ``[B, T]``.

    The sequences in the bottom ``drop`` by mean teacher log-prob get 0. The others get
    ``(1 + a c_T) (1 + b c_S)``, mean one over each sequence, with ``c_T = 1 - H_q / max H_q`` the
    teacher's confidence, ``c_S = H_p / max H_p`` the student's confusion and the maxima over the batch.

    Args:
      tea: ``[B, T]`` teacher log-prob of the sampled token.
      entropy, teacher_entropy: ``[B, T]`` of student and teacher, nats.
      mask: ``[B, T]``, nonzero on response tokens.
      drop: share of sequences dropped.
      teacher_share, student_share: a and b.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.
      axis_name: mapped axis whose rows belong to the batch.

    >>> entropy = jnp.array([[0., 0., 0., 2., 2., 2.], [2., 2., 2., 2., 2., 2.]])
    >>> unsure = jnp.full((2, 6), 2.)  # c_T = 0 everywhere
    >>> fire_opd(jnp.zeros((2, 6)), entropy, unsure, jnp.ones((2, 6)))  # (1, 2) / 1.5 and 2 / 2
    Array([[0.6667, 0.6667, 0.6667, 1.3333, 1.3333, 1.3333],
           [1.    , 1.    , 1.    , 1.    , 1.    , 1.    ]], dtype=float32)
    >>> likely = jnp.array([[-2.], [-1.]]) * jnp.ones((2, 6))
    >>> fire_opd(likely, entropy, unsure, jnp.ones((2, 6)))[:, 0]  # the lower half of two is the first
    Array([0., 1.], dtype=float32)
    """
    tea, entropy, teacher_entropy = (
        masked(jax.lax.stop_gradient(x), mask) for x in (tea, entropy, teacher_entropy)
    )
    ids = sequence_segments(mask, sequence_ids)
    length = jnp.maximum(segment_total(mask.astype(bool), ids), 1)
    likely = segment_total(tea, ids) / length
    least = masked_quantile(likely, first_response(mask, sequence_ids), drop, axis_name)
    confidence = jnp.clip(1.0 - teacher_entropy / _largest(teacher_entropy, mask, axis_name), 0.0, 1.0)
    confusion = jnp.clip(entropy / _largest(entropy, mask, axis_name), 0.0, 1.0)
    w = masked((1.0 + teacher_share * confidence) * (1.0 + student_share * confusion), mask)
    w = w * length / jnp.maximum(segment_total(w, ids), 1e-30)
    return masked(jnp.where(likely >= least, w, 0.0), mask)


def scope_opd(
    cur: Array,
    tea: Array,
    reward: Array,
    group: Array,
    mask: Array,
    *,
    temperature: float = 1.0,
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """SCOPE (arXiv 2604.10688): a softmax over each group's right answers and one over its wrong ones.

    Right answers are weighed by how *unlikely* the student found them, ``softmax(-mean cur / temperature)``,
    wrong ones by how likely the teacher did, ``softmax(mean tea / temperature)``; each of the two sums to
    one over the group's sequences. Goes with `scope_loss`.

    Args:
      cur, tea: ``[B, T]`` log-probs of the sampled token.
      reward: ``[B, T]``, above 0 where the sequence's answer is right.
      group: ``[B, T]`` int32 in [0, B * T) (all devices counted), equal for sequences of one problem.
      mask: ``[B, T]``, nonzero on response tokens.
      temperature: of both softmaxes.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.
      axis_name: mapped axis whose rows belong to the batch.

    Returns:
      ``[B, T]``, one number per sequence.

    >>> tea = jnp.log(jnp.array([[.2], [.6]])) * jnp.ones((2, 6))
    >>> wrong, group = jnp.zeros((2, 6)), jnp.zeros((2, 6), int)
    >>> scope_opd(tea, tea, wrong, group, jnp.ones((2, 6)))  # .2 and .6 over .8
    Array([[0.25, 0.25, 0.25, 0.25, 0.25, 0.25],
           [0.75, 0.75, 0.75, 0.75, 0.75, 0.75]], dtype=float32)
    >>> scope_opd(tea, tea, 1 - wrong, group, jnp.ones((2, 6)))[:, 0]  # 1 / .2 and 1 / .6, over their sum
    Array([0.75, 0.25], dtype=float32)
    """
    cur, tea = (masked(jax.lax.stop_gradient(x), mask) for x in (cur, tea))
    inside = mask.astype(bool)
    ids = sequence_segments(mask, sequence_ids)
    length = jnp.maximum(segment_total(inside, ids), 1)
    right = reward > 0
    score = jnp.where(right, -segment_total(cur, ids), segment_total(tea, ids)) / length / temperature
    # Right and wrong answers of a group are two sets; one token speaks for each sequence.
    one = first_response(inside, sequence_ids)
    bucket = jnp.where(one, 2 * group + right, 0).ravel()
    rows = mask.size * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    largest = jax.ops.segment_max(jnp.where(one, score, -jnp.inf).ravel(), bucket, num_segments=2 * rows)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    mine = 2 * group + right
    e = jnp.exp(score - jnp.where(jnp.isfinite(largest), largest, 0.0)[mine])
    total = jax.ops.segment_sum(jnp.where(one, e, 0.0).ravel(), bucket, num_segments=2 * rows)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    return masked(e / jnp.maximum(total[mine], 1e-30), mask)


def f_opd(
    cur: Array,
    old: Array,
    staleness: Array,
    mask: Array,
    *,
    rate: float,
    threshold: float,
    sequence_ids: Array | None = None,
) -> Array:
    """f-OPD (arXiv 2605.17862): fresh sequences count, stale ones fade and then drop out, ``[B, T]``.

    ``relu(exp(-rate * mean |d|) / (staleness + 1) - threshold)`` for each sequence. The paper's drift
    terms and both coefficients are not known to us: mean |d| is our reading, and there is no default.

    Args:
      cur, old: ``[B, T]`` log-probs of the sampled token.
      staleness: ``[B, T]`` updates or rounds since the sequence was drawn.
      mask: ``[B, T]``, nonzero on response tokens.
      rate: per nat of mean |d|.
      threshold: freshness at which a sequence drops out.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.

    >>> cur, old = jnp.log(jnp.array([1., 1., 1., 4., 4., 4.])) * jnp.ones((2, 1)), jnp.zeros((2, 6))
    >>> staleness = jnp.array([[0], [1]]) * jnp.ones((2, 6), int)
    >>> f_opd(cur, old, staleness, jnp.ones((2, 6)), rate=1.0, threshold=0.125)  # 1/2 - 1/8, 1/4 - 1/8
    Array([[0.375, 0.375, 0.375, 0.375, 0.375, 0.375],
           [0.125, 0.125, 0.125, 0.125, 0.125, 0.125]], dtype=float32)
    """
    d = jnp.abs(jax.lax.stop_gradient(drift(cur, old, mask)))
    ids = sequence_segments(mask, sequence_ids)
    mean = segment_total(d, ids) / jnp.maximum(segment_total(mask.astype(bool), ids), 1)
    return masked(jax.nn.relu(jnp.exp(-rate * mean) / (staleness + 1.0) - threshold), mask)


# By the name in a config. What each needs is the list of its parameters without a default.
WEIGHTS: dict[str, Callable[..., Array]] = {
    "token_is": token_is,
    "tip": tip,
    "prune": prune,
    "iw_opd": iw_opd,
    "popd": popd,
    "fire_opd": fire_opd,
    "scope_opd": scope_opd,
    "f_opd": f_opd,
}


def masked_quantile(x: Array, mask: Array, q: float, axis_name: str | None = None) -> Array:
    """Quantile of the valid values of the whole batch, linear between neighbours; inf if there are none.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> x = jnp.array([[1., 2., 3., 4., 5., 6.], [7., 8., 9., 10., 99., 99.]])
    >>> masked_quantile(x, mask, 0.5)  # halfway between the fifth and the sixth of ten
    Array(5.5, dtype=float32)
    """
    values = jnp.where(mask.astype(bool), x, jnp.inf).ravel()
    if axis_name is not None:
        values = jax.lax.all_gather(values, axis_name, tiled=True)
    values = jnp.sort(values)
    place = q * (jnp.sum(jnp.isfinite(values)) - 1).astype(jnp.float32)
    below = jnp.maximum(jnp.floor(place), 0).astype(jnp.int32)
    low, high = values[below], values[jnp.minimum(below + 1, values.size - 1)]
    share = place - below
    return jnp.where(share > 0, low + share * (jnp.where(share > 0, high, low) - low), low)


def _min_max(x: Array, mask: Array, axis_name: str | None) -> Array:
    inside = mask.astype(bool)
    low, high = jnp.min(jnp.where(inside, x, jnp.inf)), jnp.max(jnp.where(inside, x, -jnp.inf))
    if axis_name is not None:
        low, high = jax.lax.pmin(low, axis_name), jax.lax.pmax(high, axis_name)
    spread = high - low
    return masked(jnp.where(spread > 0, (x - low) / jnp.where(spread > 0, spread, 1.0), 0.0), mask)


def _largest(x: Array, mask: Array, axis_name: str | None) -> Array:
    largest = jnp.max(masked(x, mask))
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    return jnp.maximum(largest, 1e-6)


def _running_total(x: Array, mask: Array, sequence_ids: Array | None) -> Array:
    """Sum of ``x`` from the first response token of one's sequence up to and including t."""

    # Starts anew at each sequence: the difference of two sums over the row would round by its neighbours.
    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1])

    first = first_response(mask, sequence_ids)
    return jax.lax.associative_scan(add, (first, masked(x, mask)), axis=1)[1]
