"""The wider family, sequence by sequence: weights that are one number for a sequence, or mean one over it.

As in `opd_jax.method.weights`: ``[B, T]``, nonnegative, detached, 0 off the mask, not normalised. Values
that belong to a sequence (reward, group, staleness) come as ``[B, T]`` arrays, the same on every token of
the sequence, because sequences may share a row. ``p`` is the student, ``q`` the teacher.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opd_jax.method.gates import drift, masked
from opd_jax.method.scope import masked_quantile
from opd_jax.method.segments import first_response, segment_total, sequence_segments

Array = jax.Array


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
    # An entropy below 0 is rounding.
    confidence = 1.0 - jnp.maximum(teacher_entropy, 0.0) / _largest(teacher_entropy, axis_name)
    confusion = jnp.maximum(entropy, 0.0) / _largest(entropy, axis_name)
    w = masked((1.0 + teacher_share * confidence) * (1.0 + student_share * confusion), mask)
    w = w * length / jnp.maximum(segment_total(w, ids), 1e-30)
    return jnp.where(likely >= least, w, 0.0)


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
    cur, tea = jax.lax.stop_gradient(cur), jax.lax.stop_gradient(tea)
    inside = mask.astype(bool)
    ids = sequence_segments(mask, sequence_ids)
    length = jnp.maximum(segment_total(inside, ids), 1)
    right = reward > 0
    score = jnp.where(right, -segment_total(cur, ids), segment_total(tea, ids)) / length / temperature
    # Right and wrong answers of a group are two sets; one token speaks for each sequence.
    one = first_response(inside, sequence_ids)
    mine = 2 * group + right
    sets = 2 * mask.size
    if axis_name is not None:
        sets *= jax.lax.axis_size(axis_name)
    largest = jax.ops.segment_max(jnp.where(one, score, -jnp.inf).ravel(), mine.ravel(), num_segments=sets)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    e = jnp.exp(score - largest[mine])
    total = jax.ops.segment_sum(jnp.where(one, e, 0.0).ravel(), mine.ravel(), num_segments=sets)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    return masked(e / total[mine], mask)


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


def _largest(x: Array, axis_name: str | None) -> Array:
    largest = jnp.max(x)
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    return jnp.maximum(largest, 1e-6)
