"""One batch that every peer is asked about, our answer to it and theirs.

Ours goes through `objective` on the student's logits. Theirs takes the peer's loss of each token, weighs it
with the float64 gate of `tests.oracle` and reduces it in torch, so that both the gate and the fact that no
gradient passes through it are part of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.method import drift_gate, fixed_blocks, objective, weighted_loss
from tests.oracle import gates, segments

B, T, V, K = 4, 9, 11, 4
BLOCK = 3
# Of the largest entry: a gradient's small entries are what is left of large ones.
TOLERANCE = 2e-5


class Gate(NamedTuple):
    """How a batch is weighed and averaged; ``on`` False is no gate."""

    on: bool
    scope: str = "minibatch"
    reduction: str = "token_mean"


UNGATED = Gate(False)
GATES = {
    "ungated": UNGATED,
    "blocks": Gate(True),
    "blocks by sequence": Gate(True, "sequence", "seq_mean_token_mean"),
}


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def pick(z: Any, ids: np.ndarray) -> Any:
    """Entries of the last axis: ``[B, T]`` for one id a position, ``[B, T, K]`` for K."""
    if ids.ndim == z.ndim:
        return jnp.take_along_axis(z, ids, axis=-1)
    return jnp.take_along_axis(z, ids[..., None], axis=-1)[..., 0]


# Three policies, of which the student has drifted far from the behaviour policy: ratios of 0.07 to 6.
_draw = np.random.default_rng(41)
STUDENT = _draw.normal(scale=1.5, size=(B, T, V)).astype(np.float32)
BEHAVIOUR = (STUDENT + _draw.normal(scale=1.0, size=STUDENT.shape)).astype(np.float32)
TEACHER = (STUDENT + _draw.normal(scale=1.2, size=STUDENT.shape)).astype(np.float32)
IDS = _draw.integers(V, size=(B, T))
# Ragged, with a hole.
MASK = np.arange(T) < np.array([9, 7, 4, 2])[:, None]
MASK[0, 4] = False

CUR, OLD, TEA = (np.asarray(pick(log_softmax(z), IDS)) for z in (STUDENT, BEHAVIOUR, TEACHER))
TEACHER_IDS = np.argsort(-TEACHER, axis=-1)[..., :K]
STUDENT_IDS = np.argsort(-STUDENT, axis=-1)[..., :K]


def cur_of(z: jax.Array) -> jax.Array:
    """Log-prob of the sampled tokens."""
    return pick(jax.nn.log_softmax(z, axis=-1), IDS)


def on_support(z: jax.Array, ids: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Raw log-probs of student and teacher on a support, ``[B, T, K]``."""
    return pick(jax.nn.log_softmax(z, axis=-1), ids), pick(log_softmax(TEACHER), ids)


def gate_weights(gate: Gate) -> np.ndarray:
    """The gate as printed, in float64 NumPy; ones without one."""
    if not gate.on:
        return MASK.astype(np.float64)
    return gates.drift_gate(CUR, OLD, MASK, segments.fixed_blocks(MASK, BLOCK), scope=gate.scope)


def our_gate(z: jax.Array) -> jax.Array:
    """The same, ours, over the minibatch."""
    return drift_gate(cur_of(z), jnp.array(OLD), jnp.array(MASK), fixed_blocks(jnp.array(MASK), BLOCK))


class Answer(NamedTuple):
    value: Any  # scalar
    gradient: Any  # [B, T, V], in the student's logits


def ours(base: Callable[[jax.Array], jax.Array], gate: Gate = UNGATED) -> Answer:
    """Our loss of the batch; ``base`` makes ``[B, T]`` from the student's logits."""
    segments = fixed_blocks(jnp.array(MASK), BLOCK) if gate.on else None

    def loss(z: jax.Array) -> jax.Array:
        how = {"scope": gate.scope, "reduction": gate.reduction}
        return objective(cur_of(z), jnp.array(OLD), jnp.array(MASK), base(z), segments, **how).loss

    return Answer(*jax.value_and_grad(loss)(jnp.array(STUDENT)))


def theirs(base: Callable[[Any], Any], gate: Gate = UNGATED) -> Answer:
    """A peer's; ``base`` makes ``[B, T]`` from the student's logits in torch."""
    import torch

    mask = torch.tensor(MASK)
    w = torch.tensor(gate_weights(gate), dtype=torch.float32)

    def loss(z: Any) -> Any:
        gated = torch.where(mask, w * base(z), 0.0)
        if gate.reduction == "token_mean":
            return gated.sum() / mask.sum()
        return (gated.sum(1) / mask.sum(1)).mean()

    return theirs_reduced(loss)


def theirs_reduced(loss: Callable[[Any], Any]) -> Answer:
    """A peer's that reduces by itself: ``loss`` makes a scalar from the student's logits in torch."""
    import torch

    z = torch.tensor(STUDENT, requires_grad=True)
    value = loss(z)
    value.backward()
    return Answer(value.item(), z.grad.numpy())


def weighted(
    base: Callable[[jax.Array], jax.Array], *weights: Callable[[jax.Array], Any], **how: Any
) -> Answer:
    """Our loss under a product of weights that is not normalised; each makes ``[B, T]`` from the logits."""

    def loss(z: jax.Array) -> jax.Array:
        w = jnp.ones(MASK.shape)
        for weight in weights:
            w = w * weight(z)
        return weighted_loss(base(z), w, jnp.array(MASK), **how)

    return Answer(*jax.value_and_grad(loss)(jnp.array(STUDENT)))


def assert_same(ours: Answer, theirs: Answer) -> None:
    """To the tolerance, in value and gradient, none of them trivial."""
    for got, want in zip(ours, theirs, strict=True):
        got, want = np.asarray(got), np.asarray(want)
        size = np.abs(want).max()
        assert np.isfinite(want).all()
        assert size > 1e-3
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * size)
