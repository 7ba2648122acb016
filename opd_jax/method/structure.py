"""Is drift coherent along a response, or noise by token? Three readings that test the paper's explanation.

A block mean helps if neighbouring tokens drift together and single tokens are noisy. Then the
autocorrelation is positive over some tens of positions, block means vary more than means of
independent tokens would, and little cancels within a block.

`structure_sums` gives moments that add up over micro-batches, devices and updates;
`structure_readings` turns their totals into the three readings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.method.gates import masked
from opd_jax.method.segments import fixed_blocks, segment_total, sequence_segments

Array = jax.Array
Sums = dict[str, tuple[Array, Array]]

LAGS = (1, 2, 4, 8, 16, 32, 64)
SIZES = (1, 4, 16, 64, 256)
ROUNDING = 1e-5  # of float32 moments


def structure_sums(
    d: Array,
    mask: Array,
    *,
    lags: Sequence[int] = LAGS,
    sizes: Sequence[int] = SIZES,
    sequence_ids: Array | None = None,
) -> Sums:
    """Moments of drift along the response, as (sum, count) pairs.

    Args:
      d: drift ``[B, T]`` nats.
      mask: ``[B, T]``, nonzero on response tokens.
      lags: distances in positions; those past the row are empty.
      sizes: block sizes in tokens.
      sequence_ids: ``[B, T]`` int32 of packed rows; by default a row is one sequence.

    Returns:
      ``moment_1``, ``moment_2``, ``abs``: of d over tokens. ``lag_l``: of ``d_t d_(t+l)`` over pairs
      within a sequence. ``square_n``: (sum over blocks of n_b times its squared mean, blocks).
      ``kept_n``: sum over blocks of |sum of d|, over tokens.

    >>> mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    >>> d = jnp.array([[1., 1., -1., -1., 1., 1.], [2., -2., 2., -2., jnp.nan, 9.]])
    >>> sums = structure_sums(d, mask, lags=(1,), sizes=(2,))
    >>> sums["lag_1"]  # 1 - 1 + 1 - 1 + 1 and -4 - 4 - 4, over 5 + 3 pairs
    (Array(-11., dtype=float32), Array(8., dtype=float32))
    >>> sums["kept_2"]  # 2 + 2 + 2 and nothing, over ten tokens
    (Array(6., dtype=float32), Array(10., dtype=float32))
    >>> sums["square_2"]  # 3 * 2 * 1^2 and nothing, over five blocks
    (Array(6., dtype=float32), Array(5., dtype=float32))
    """
    d = masked(d, mask)
    ids = sequence_segments(mask, sequence_ids)
    count = jnp.sum(ids >= 0).astype(jnp.float32)
    sums = {
        "moment_1": (jnp.sum(d), count),
        "moment_2": (jnp.sum(jnp.square(d)), count),
        "abs": (jnp.sum(jnp.abs(d)), count),
    }
    for lag in lags:
        pair = (ids[:, :-lag] == ids[:, lag:]) & (ids[:, lag:] >= 0)
        products = jnp.where(pair, d[:, :-lag] * d[:, lag:], 0.0)
        sums[f"lag_{lag}"] = (jnp.sum(products), jnp.sum(pair).astype(jnp.float32))
    for size in sizes:
        blocks = fixed_blocks(mask, size, sequence_ids=sequence_ids)
        # Each token carries its block's total; divided by the length they add up to one a block.
        total = segment_total(d, blocks)
        length = jnp.maximum(segment_total(blocks >= 0, blocks), 1)
        share = masked(1.0 / length, mask)
        sums[f"square_{size}"] = (jnp.sum(jnp.square(total) / length * share), jnp.sum(share))
        sums[f"kept_{size}"] = (jnp.sum(jnp.abs(total) * share), count)
    return sums


def structure_readings(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, dict[int, float]]:
    """The three readings from totals of `structure_sums`.

    Returns:
      - ``autocorrelation``: by lag, of d around its mean; noise gives 0.
      - ``block_variance``: by size, the variance of block means over what independent tokens would
        give, ``mean of n_b (mean_b - mean)^2 / variance of d``; noise gives 1, full coherence n.
      - ``cancellation``: by size, ``|mean d| / mean |d|`` over blocks, weighted by length; nothing
        cancels at 1, independent signs give about ``1 / sqrt(n)``.

      A reading without data is left out.

    >>> d = jnp.array([[1., 1., 1., -1., -1., -1.], [1., 1., 1., -1., -1., -1.]])  # of variance 1
    >>> readings = structure_readings(structure_sums(d, jnp.ones((2, 6)), lags=(1, 3), sizes=(2, 3)))
    >>> readings["autocorrelation"]  # 4 - 1 of 5 pairs, -3 of 3
    {1: 0.6, 3: -1.0}
    >>> {size: round(x, 3) for size, x in readings["block_variance"].items()}  # (2 + 0 + 2) / 3 blocks, and 3
    {2: 1.333, 3: 3.0}
    >>> {size: round(x, 3) for size, x in readings["cancellation"].items()}  # (2 + 0 + 2) of 6, and all
    {2: 0.667, 3: 1.0}
    """
    mean, square, absolute = (_quotient(sums[name]) for name in ("moment_1", "moment_2", "abs"))
    # Of equal drift everywhere rounding leaves a variance of its own, which is no data.
    variance = square - mean**2 if square - mean**2 > ROUNDING * square else 0.0
    tokens = float(sums["moment_1"][1])
    readings: dict[str, dict[int, float]] = {"autocorrelation": {}, "block_variance": {}, "cancellation": {}}
    for name, (total, count) in sums.items():
        kind, _, number = name.partition("_")
        if kind == "lag" and count > 0 and variance > 0:
            readings["autocorrelation"][int(number)] = (float(total) / float(count) - mean**2) / variance
        elif kind == "square" and count > 0 and variance > 0:
            around_mean = (float(total) - tokens * mean**2) / float(count)
            readings["block_variance"][int(number)] = around_mean / variance
        elif kind == "kept" and absolute > 0:
            readings["cancellation"][int(number)] = _quotient((total, count)) / absolute
    return readings


def _quotient(pair: tuple[Any, Any]) -> float:
    total, count = pair
    return float(total) / float(count) if count else 0.0
