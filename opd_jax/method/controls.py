"""Control arms: gates that keep some properties of the drift gate and destroy others.

Each takes a gate ``g [B, T]`` (from `relative_gate`) and returns another one, to be passed through
`normalise` as the original would be. A gate is useful only as far as it beats these: the shuffled one
has the same values at the same places in the response, the random one the same values, the
position mean the same profile, and none of them knows the drift of the sequence it weighs.

Segment values move as wholes. Where segments differ in length, the values over *segments* are matched
exactly and those over tokens nearly.

Two arms more are gates of other numbers and need no function: the noise-only gate is
``relative_gate(again, old, ...)``, drift between two readings of the same weights; the oracle gate
is ``relative_gate(kl, 0, ...)`` of the divergence itself, where the drift is its estimate by one sample.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from opd_jax.method.gates import masked, segment_score
from opd_jax.method.segments import segment_largest, sequence_segments

Array = jax.Array


def constant(g: Array, mask: Array, segments: Array) -> Array:
    """Every token alike: 1 on the mask, ``[B, T]``. After `normalise` the ungated loss, to the bit.

    >>> g = jnp.array([[.2, .2, .5, .5, 1., 1.], [.4, .4, .25, .25, 0., 0.]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> constant(g, mask, segments)
    Array([[1., 1., 1., 1., 1., 1.],
           [1., 1., 1., 1., 0., 0.]], dtype=float32)
    """
    return masked(jnp.ones_like(g), mask)


def inverse(g: Array, mask: Array, segments: Array) -> Array:
    """``1 / g``: what drifted most counts most, ``[B, T]``.

    A gate below 1e-15, of a segment 35 nats beyond the least drifted one, counts as 1e-15.

    >>> g = jnp.array([[.2, .2, .5, .5, 1., 1.], [.4, .4, .25, .25, 0., 0.]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> inverse(g, mask, segments)
    Array([[5. , 5. , 2. , 2. , 1. , 1. ],
           [2.5, 2.5, 4. , 4. , 0. , 0. ]], dtype=float32)
    """
    return masked(1.0 / jnp.maximum(g, 1e-15), mask)


def position_mean(
    g: Array,
    mask: Array,
    segments: Array,
    *,
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Each segment gets the mean gate of all sequences at its index in the response, ``[B, T]``.

    Args:
      g, mask, segments: ``[B, T]``.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.
      axis_name: mapped axis whose rows take part.

    >>> g = jnp.array([[.2, .2, .5, .5, 1., 1.], [.4, .4, .25, .25, 0., 0.]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> position_mean(g, mask, segments)
    Array([[0.3  , 0.3  , 0.375, 0.375, 1.   , 1.   ],
           [0.3  , 0.3  , 0.375, 0.375, 0.   , 0.   ]], dtype=float32)
    """
    table, valid = _table(g, segments)
    place = _places(segments, sequence_ids).ravel()
    total, count = (
        jax.ops.segment_sum(x.ravel(), place, num_segments=segments.shape[1])
        for x in (table, valid.astype(jnp.float32))
    )
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    mean = (total / jnp.maximum(count, 1))[place].reshape(table.shape)
    return _spread(mean, mask, segments)


def shuffled(
    g: Array,
    mask: Array,
    segments: Array,
    key: Array,
    *,
    sequence_ids: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Gates are exchanged among the sequences at the same segment index, ``[B, T]``.

    Same marginal and same profile over the response; the link to one's own drift is cut.

    Args:
      g, mask, segments: ``[B, T]``.
      key: typed PRNG key, the same on all devices of ``axis_name``.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.
      axis_name: mapped axis whose rows take part.

    >>> g = jnp.array([[.2, .2, .5, .5, 1., 1.], [.4, .4, .25, .25, 0., 0.]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> shuffled(g, mask, segments, jax.random.key(0))  # each column keeps its gates, the last its only one
    Array([[0.4 , 0.4 , 0.25, 0.25, 1.  , 1.  ],
           [0.2 , 0.2 , 0.5 , 0.5 , 0.  , 0.  ]], dtype=float32)
    """
    return _exchange(g, mask, segments, _places(segments, sequence_ids), key, axis_name)


def random(g: Array, mask: Array, segments: Array, key: Array, *, axis_name: str | None = None) -> Array:
    """Gates are exchanged among all segments of the batch, ``[B, T]``: the same marginal, no more.

    >>> g = jnp.array([[.2, .2, .5, .5, 1., 1.], [.4, .4, .25, .25, 0., 0.]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> random(g, mask, segments, jax.random.key(0))
    Array([[0.4 , 0.4 , 0.25, 0.25, 0.5 , 0.5 ],
           [1.  , 1.  , 0.2 , 0.2 , 0.  , 0.  ]], dtype=float32)
    """
    return _exchange(g, mask, segments, jnp.zeros_like(segments), key, axis_name)


def disagreement(
    g: Array, mask: Array, segments: Array, score: Array, *, axis_name: str | None = None
) -> Array:
    """Gates of the same marginal, handed out by teacher disagreement, ``[B, T]``.

    The segment with the smallest mean ``score`` over its tokens gets the largest gate, and so on.

    Args:
      g, mask, segments: ``[B, T]``.
      score: ``[B, T]``, for example ``|tea - cur|``.
      axis_name: mapped axis whose rows take part.

    >>> g = jnp.array([[.2, .2, .5, .5, 1., 1.], [.4, .4, .25, .25, 0., 0.]])
    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> segments = jnp.array([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, -1, -1]])
    >>> score = jnp.array([[1., 1., 2., 2., 3., 3.], [5., 5., 4., 4., 9., 9.]])
    >>> disagreement(g, mask, segments, score)  # scores 1 to 5 get 1, 0.5, 0.4, 0.25, 0.2
    Array([[1.  , 1.  , 0.5 , 0.5 , 0.4 , 0.4 ],
           [0.2 , 0.2 , 0.25, 0.25, 0.  , 0.  ]], dtype=float32)
    """
    mean = segment_score(score, mask, segments)
    (table, valid), (scores, _) = _table(g, segments), _table(mean, segments)
    rows = table.shape[0]
    table, valid, scores = (_all_rows(x, axis_name) for x in (table, valid, scores))
    rank = jnp.argsort(jnp.argsort(jnp.where(valid, scores, jnp.inf), axis=None)).reshape(valid.shape)
    largest_first = jnp.sort(jnp.where(valid, table, -jnp.inf), axis=None, descending=True)
    return _spread(_own_rows(largest_first[rank], rows, axis_name), mask, segments)


def _exchange(
    g: Array, mask: Array, segments: Array, kinds: Array, key: Array, axis_name: str | None
) -> Array:
    """Gates exchanged among the segments of a kind, ``kinds`` being one for each entry of `_table`."""
    table, valid = _table(g, segments)
    rows = table.shape[0]
    table, valid, kinds = (_all_rows(x, axis_name) for x in (table, valid, kinds))
    noise = noise_a_place(key, *table.shape).ravel()
    shape, kinds = table.shape, jnp.where(valid, kinds, table.size).ravel()
    # Kind by kind, once in order and once at random: the n-th entry of a kind takes the n-th one drawn.
    places, drawn = jnp.argsort(kinds, stable=True), jnp.lexsort((noise, kinds))
    exchanged = jnp.zeros_like(table).ravel().at[places].set(table.ravel()[drawn]).reshape(shape)
    return _spread(_own_rows(exchanged, rows, axis_name), mask, segments)


def noise_a_place(key: Array, rows: int, width: int, first: Array | int = 0) -> Array:
    """Uniform noise of a batch's places, ``[rows, width]`` from row ``first`` on, whatever the batch's shape.

    Each row is drawn with a key of its own, and a place along it whatever follows: padding changes none.

    >>> key = jax.random.key(0)
    >>> jnp.array_equal(noise_a_place(key, 2, 6), noise_a_place(key, 3, 9)[:2, :6])
    Array(True, dtype=bool)
    """
    # jax.random.bits counts along the array (jax_threefry_partitionable): a longer row begins alike.
    own = jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(rows))
    return jax.vmap(lambda key: jax.random.uniform(key, (width,)))(own)


def _places(segments: Array, sequence_ids: Array | None) -> Array:
    """Index of each segment within its own sequence, ``[B, G]`` as in `_table`; 0 where there is none."""
    inside = segments >= 0
    first = -segment_largest(-segments, sequence_segments(inside, sequence_ids))
    return _table(segments - first.astype(segments.dtype), segments)[0]


def _table(values: Array, segments: Array) -> tuple[Array, Array]:
    """One value per segment, ``[B, G]`` with G = T, and which entries are segments at all."""
    row, column = jnp.indices(segments.shape)[0], jnp.where(segments >= 0, segments, segments.shape[1])
    largest = segment_largest(values, segments)
    table = jnp.zeros(segments.shape, values.dtype).at[row, column].set(largest, mode="drop")
    valid = jnp.zeros(segments.shape, bool).at[row, column].set(True, mode="drop")
    return table, valid


def _spread(table: Array, mask: Array, segments: Array) -> Array:
    """The inverse of `_table`: each token reads its segment's value."""
    values = jnp.take_along_axis(table, jnp.maximum(segments, 0), axis=1)
    return masked(jnp.where(segments >= 0, values, 0.0), mask)


def _all_rows(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def _own_rows(x: Array, rows: int, axis_name: str | None) -> Array:
    if axis_name is None:
        return x
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis_name) * rows, rows)
