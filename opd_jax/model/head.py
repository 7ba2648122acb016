"""The core of the vocabulary head: one pass from hidden states to what is asked of their softmax.

Positions pass through the matrix ``head_chunk`` at a time, forward and backward, and between the two
only the largest logit and the log-sum-exp of each are kept: no ``[B, T, V]`` array ever exists, and
what is held at a time is ``head_chunk x V`` logits on each device, however many rows it has.

Under a mesh every device reads its own rows against its own slice of the vocabulary. Both loops are free
of communication: before them the matrix is gathered over the axes that split its width, once, and kept for
the backward pass; after them the slices are merged, and the matrix's gradient is summed and scattered, once.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.model.per_device import Axes, per_device, vary_alike
from opd_jax.model.precision import exact_products
from opd_jax.types import Readout

Array = jax.Array
HIDDEN, MATRIX, WHOLE = ("batch", "length", "width"), ("embed", "vocab"), ("width", "vocab")
EACH, IDS = ("batch", "length"), ("batch", "length", "support")


@dataclasses.dataclass(frozen=True)
class _Question:
    """What is asked of the softmax, beside the ids."""

    temperature: float
    chunk: int  # positions held at a time, on each device
    k: int  # likeliest ids to add to those asked about
    usable: int | None  # ids from here on are never among them
    dtype: Any  # of the stored matrix, and so of its gradient


class _Slice(NamedTuple):
    """What one slice of the vocabulary says of a position; the logits in it are not shifted yet."""

    largest: Array  # [P]
    mass: Array  # [P]: sum of exp(z - largest)
    moment: Array  # [P]: sum of exp(z - largest) (z - largest)
    asked: Array  # [P, K]: logits of the ids, zero for those of other slices
    best: Array  # [P, k]: its own likeliest, best first
    best_ids: Array  # [P, k]


class _Answer(NamedTuple):
    logits: Array  # [B, T, K + k]
    ids: Array  # [B, T, K + k]: those asked about, then the likeliest
    largest: Array  # [B, T]
    logsumexp: Array  # [B, T]
    entropy: Array  # [B, T]


ANSWER = _Answer._make((IDS, IDS, EACH, EACH, EACH))


def read_head(
    hidden: Array,
    matrix: Array,
    ids: Array,
    *,
    chunk: int,
    temperature: float = 1.0,
    k: int = 0,
    usable: int | None = None,
) -> tuple[Readout, Array]:
    """Logits of given ids and of the ``k`` likeliest, log-sum-exp and entropy at every position.

    With ``z`` the logits over the temperature, less the largest of each position, it computes
    ``z[ids]``, ``log sum exp z`` and ``log sum exp z - sum p z``; the gradient in the logits is
    ``p dlse + sum of dz[id] at id``, and the entropy and the choice of the likeliest have none. Logits,
    sums and both results of the backward pass are accumulated in float32; its matrix products take the
    logits' gradient in the compute dtype, which in bfloat16 rounds each entry by up to 2^-8 of itself.

    Args:
      hidden: ``[B, T, D]`` in the compute dtype, the final norm done.
      matrix: ``[D, V]`` as stored; it is read in the compute dtype, its gradient is in its own.
      ids: ``[B, T, K]`` int32. One outside the vocabulary gets NaN.
      chunk: positions that are in memory at a time, on each device.
      temperature: logits are divided by it.
      k: how many of the likeliest ids to add, the lowest first among equals.
      usable: ids from here on are never among those.

    Returns:
      The `Readout` of K + k ids, and the ids ``[B, T, K + k]``.

    Raises:
      InputError: B, D or V does not divide by the mesh axes that it is split over.
    """
    hidden, matrix, ids = vary_alike(hidden, matrix, ids)
    question = _Question(temperature, chunk, k, usable, jnp.dtype(matrix.dtype))
    answer = _read(question, hidden, matrix, ids)
    known = (answer.ids >= 0) & (answer.ids < matrix.shape[1])
    logits = jnp.where(known, answer.logits, jnp.nan)
    return Readout(logits, answer.logsumexp, answer.entropy), answer.ids


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(question: _Question, hidden: Array, matrix: Array, ids: Array) -> _Answer:
    return _forward(question, hidden, matrix, ids)[0]


def _forward(question: _Question, hidden: Array, matrix: Array, ids: Array) -> tuple[_Answer, Any]:
    answering = functools.partial(_answer, question)
    answer, whole = per_device(answering, (HIDDEN, MATRIX, IDS), (ANSWER, WHOLE))(hidden, matrix, ids)
    return answer, (hidden, whole, answer.ids, answer.largest, answer.logsumexp)


def _backward(question: _Question, kept: Any, gradient: _Answer) -> tuple[Array, Array, None]:
    turning_back = functools.partial(_gradients, question)
    takes = HIDDEN, WHOLE, IDS, EACH, EACH, IDS, EACH
    gradients = per_device(turning_back, takes, (HIDDEN, MATRIX))
    return *gradients(*kept, gradient.logits, gradient.logsumexp), None


_read.defvjp(_forward, _backward)


def _answer(
    question: _Question, axes: Axes, hidden: Array, matrix: Array, ids: Array
) -> tuple[_Answer, Array]:
    """The answer for one device's rows, with the matrix ``[D, V of the slice]`` that gave it."""
    whole = matrix.astype(hidden.dtype)
    if axes["embed"]:
        whole = jax.lax.all_gather(whole, axes["embed"], axis=0, tiled=True)
    first = _first_id(axes, whole)

    def read(piece: tuple[Array, Array]) -> _Slice:
        hidden, ids = piece
        z = _logits(hidden, whole, question)
        largest = jnp.max(z, axis=-1)
        # Only differences of logits mean anything, and those of a confident model keep their digits when
        # the large common part is gone before the log-sum-exp is taken.
        shifted = z - largest[:, None]
        exponentials = jnp.exp(shifted)
        local, inside = _local(ids, first, z)
        return _Slice(
            largest,
            jnp.sum(exponentials, axis=-1),
            jnp.sum(exponentials * shifted, axis=-1),
            jnp.where(inside, jnp.take_along_axis(z, local, axis=-1), 0.0),
            *_likeliest(z, first, question),
        )

    pieces = _pieces(question.chunk, hidden, ids)
    found: _Slice = jax.tree.map(lambda x: _joined(x, ids), jax.lax.map(read, pieces))
    return _merged(found, ids, axes, question), whole


def _merged(found: _Slice, ids: Array, axes: Axes, question: _Question) -> _Answer:
    """The whole vocabulary's answer from those of its slices."""
    largest, best, best_ids = found.largest, found.best, found.best_ids
    if axes["vocab"]:
        largest = jax.lax.pmax(largest, axes["vocab"])
    if axes["vocab"] and question.k:
        gather = functools.partial(jax.lax.all_gather, axis_name=axes["vocab"], axis=-1, tiled=True)
        # Candidates stand in the order of the slices, so that among equals the lowest id comes first.
        best, place = jax.lax.top_k(gather(best), question.k)
        best_ids = jnp.take_along_axis(gather(best_ids), place, axis=-1)
    below = found.largest - largest
    scale = jnp.exp(below)
    sums = scale * found.mass, scale * (found.moment + below * found.mass), found.asked
    mass, moment, asked = jax.lax.psum(sums, axes["vocab"]) if axes["vocab"] else sums
    logsumexp = jnp.log(mass)
    return _Answer(
        jnp.concatenate([asked, best], axis=-1) - largest[..., None],
        jnp.concatenate([ids, best_ids], axis=-1),
        largest,
        logsumexp,
        logsumexp - moment / mass,
    )


def _gradients(
    question: _Question,
    axes: Axes,
    hidden: Array,
    whole: Array,
    ids: Array,
    largest: Array,
    logsumexp: Array,
    of_logits: Array,
    of_logsumexp: Array,
) -> tuple[Array, Array]:
    """The gradients in one device's rows and in its share of the matrix."""
    # Without the barrier the compiler may keep a lone chunk's logits from the forward pass, whose
    # rounding then depends on whether a gradient is taken.
    hidden = jax.lax.optimization_barrier(hidden)
    first = _first_id(axes, whole)

    def back(total: Array, piece: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden, ids, largest, logsumexp, of_logits, of_logsumexp = piece
        z = _logits(hidden, whole, question) - largest[:, None]
        of_z = jnp.exp(z - logsumexp[:, None]) * of_logsumexp[:, None]
        local, inside = _local(ids, first, z)
        position = jnp.arange(len(ids))[:, None]
        of_z = of_z.at[position, local].add(jnp.where(inside, _once(of_logits, ids), 0.0))
        of_z = (of_z / question.temperature).astype(hidden.dtype)
        with exact_products(hidden.dtype):
            of_matrix = jnp.einsum("pd,pv->dv", hidden, of_z, preferred_element_type=jnp.float32)
            of_hidden = jnp.einsum("pv,dv->pd", of_z, whole, preferred_element_type=jnp.float32)
        return total + of_matrix, of_hidden

    pieces = _pieces(question.chunk, hidden, ids, largest, logsumexp, of_logits, of_logsumexp)
    total, _ = vary_alike(jnp.zeros(whole.shape, jnp.float32), hidden)
    total, of_hidden = jax.lax.scan(back, total, pieces)
    of_hidden = _joined(of_hidden, ids)
    if axes["vocab"]:
        of_hidden = jax.lax.psum(of_hidden, axes["vocab"])
    # The width is split over axes that split the rows too: their sum is scattered where it is taken.
    if axes["embed"]:
        total = jax.lax.psum_scatter(total, axes["embed"], scatter_dimension=0, tiled=True)
    if others := tuple(axis for axis in axes["batch"] if axis not in axes["embed"]):
        total = jax.lax.psum(total, others)
    return of_hidden.astype(hidden.dtype), total.astype(question.dtype)


def _logits(hidden: Array, whole: Array, question: _Question) -> Array:
    """``[P, V]`` float32, over the temperature."""
    with exact_products(hidden.dtype):
        z = jnp.einsum("pd,dv->pv", hidden, whole, preferred_element_type=jnp.float32)
    return z / question.temperature


def _likeliest(z: Array, first: Array | int, question: _Question) -> tuple[Array, Array]:
    """The ``k`` largest logits of a slice that may be chosen at all, and their ids, ``[P, k]``."""
    if not question.k:
        return z[:, :0], jnp.zeros((len(z), 0), jnp.int32)
    if question.usable is not None:
        z = jnp.where(first + jnp.arange(z.shape[1]) < question.usable, z, -jnp.inf)
    best, local = jax.lax.top_k(z, min(question.k, z.shape[1]))
    return best, (first + local).astype(jnp.int32)


def _first_id(axes: Axes, whole: Array) -> Array | int:
    """The id that the slice of the vocabulary begins with."""
    return jax.lax.axis_index(axes["vocab"]) * whole.shape[1] if axes["vocab"] else 0


def _local(ids: Array, first: Array | int, z: Array) -> tuple[Array, Array]:
    """Where ids stand in a slice, and whether they do."""
    local = ids - first
    inside = (local >= 0) & (local < z.shape[1])
    return jnp.where(inside, local, 0), inside


def _once(x: Array, ids: Array) -> Array:
    """The sum of ``x [P, K]`` over equal ids where an id first stands, zero where it stands again.

    A device that scatters in parallel then adds nothing but zeros to a place twice, in whatever order.
    """
    same = ids[:, :, None] == ids[:, None, :]
    again = jnp.any(jnp.tril(same, -1), axis=-1)
    return jnp.where(again, 0.0, jnp.sum(jnp.where(same, x[:, None, :], 0.0), axis=-1))


def _pieces(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    """``[B, T, ...]`` arrays as ``[pieces, P, ...]``, P at most ``chunk``, zeros at the end."""
    positions = arrays[0].shape[0] * arrays[0].shape[1]
    count = -(-positions // chunk)
    size = -(-positions // count)

    def split(x: Array) -> Array:
        x = x.reshape(positions, *x.shape[2:])
        x = jnp.pad(x, [(0, count * size - positions)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, size, *x.shape[1:])

    return tuple(split(x) for x in arrays)


def _joined(x: Array, like: Array) -> Array:
    """``[pieces, P, ...]`` as ``[B, T, ...]``, with the first two dimensions of ``like``."""
    rows, length = like.shape[:2]
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[: rows * length].reshape(
        rows, length, *x.shape[2:]
    )
