"""One value however the batch is cut up: micro-batches, padding, packing, devices.

The gradient over devices. A psum is turned around into a psum by pmap, and by shard_map without checks
(`check_vma=False`): every device sees n cotangents of 1, and the gradient in a replicated parameter is n
times the device's own share. Its mean over devices is the sum of all shares, which is right. Under
shard_map proper the loss is known to be one number on all devices and the parameter too, and the gradient
is the whole one already, on every device: the mean leaves it as it is. So `jax.lax.pmean` of the
gradient is right under all of them; psum is right under none. An array that is split over the
devices has no such remedy: its gradient comes out n-fold under pmap, and right under shard_map.
"""

import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.method import (
    cusum_spans,
    divisor,
    every_token,
    fixed_blocks,
    merge,
    newline_spans,
    objective,
    rescale,
    sampled_token_loss,
    share,
    whole_sequence,
)
from tests.method.batches import SPLIT, WIDE, mesh, wide_batch

THETA = np.float32([0.2, -0.1, 0.3])
WHOLE = PartitionSpec()
ROWS, LENGTH = WIDE
SEGMENTS = {
    "blocks": lambda batch, ids: fixed_blocks(batch["mask"], 4, sequence_ids=ids),
    "tokens": lambda batch, ids: every_token(batch["mask"]),
    "sequences": lambda batch, ids: whole_sequence(batch["mask"], sequence_ids=ids),
    "lines": lambda batch, ids: newline_spans(
        batch["line"], batch["mask"], minimum=2, maximum=5, chunk=3, sequence_ids=ids
    ),
    "adaptive": lambda batch, ids: cusum_spans(
        batch["ref"] - batch["old"], batch["mask"], limit=1.0, minimum=2, maximum=6, sequence_ids=ids
    ),
}
READINGS = [
    {"scope": "minibatch", "reduction": "token_mean"},
    {"scope": "sequence", "reduction": "seq_mean_token_mean"},
    {"scope": "minibatch", "reduction": "seq_mean_token_mean", "statistic": "rms", "map": "clipped_exp"},
]
segmenters = pytest.mark.parametrize("segmenter", SEGMENTS)
# Of each reading but the first, blocks stand for all segments.
cases = pytest.mark.parametrize(
    ("segmenter", "reading"),
    [
        pytest.param(name, reading, marks=[pytest.mark.slow] if reading and name != "blocks" else [])
        for name, reading in itertools.product(SEGMENTS, range(len(READINGS)))
    ],
)


def current(theta, batch):
    """Log-probs of a policy with three parameters."""
    return batch["cur"] + batch["features"] @ theta


def loss(theta, batch, segmenter="blocks", axis_name=None, **options):
    cur, ids = current(theta, batch), batch.get("sequence_ids")
    base = sampled_token_loss(cur, batch["old"], batch["tea"], surrogate="is", mask=batch["mask"])
    segments = SEGMENTS[segmenter](batch, ids)
    return objective(
        cur, batch["old"], batch["mask"], base, segments, sequence_ids=ids, axis_name=axis_name, **options
    ).loss


def differentiated(**options):
    return jax.value_and_grad(functools.partial(loss, **options))


def found(theta, batch, segmenter, reading):
    return jax.jit(differentiated(segmenter=segmenter, **READINGS[reading]))(theta, batch)


@functools.cache
def wanted(segmenter="blocks", reading=0):
    return found(THETA, wide_batch(), segmenter, reading)


def check(got, want):
    """Loss and gradient to 1e-5 of the largest number."""
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(np.abs(b)))


def test_there_is_something_to_average():
    value, slope = wanted()
    assert abs(value) > 1e-2
    assert (np.abs(slope) > 1e-3).all()
    plain = jax.value_and_grad(lambda t: loss(t, wide_batch(), tau=0.0))(THETA)
    assert np.abs(plain[1] - slope).max() > 1e-3  # the gate acts


@segmenters
@pytest.mark.parametrize("n", [2, 8])
def test_micro_batches(n, segmenter):
    def weighted(theta, batch):
        cur = current(theta, batch)
        base = sampled_token_loss(cur, batch["old"], batch["tea"], surrogate="is", mask=batch["mask"])
        part = share(cur, batch["old"], batch["mask"], base, SEGMENTS[segmenter](batch, None))
        return part.weighted, part

    function = jax.jit(jax.grad(weighted, has_aux=True))
    whole = slope = None
    for rows in np.split(np.arange(ROWS), n):
        own, part = function(THETA, {name: x[rows] for name, x in wide_batch().items()})
        if whole is None:
            whole, slope = part, own
        else:
            both = merge(whole, part)
            slope = rescale(slope, whole.least, both.least, 1.0) + rescale(own, part.least, both.least, 1.0)
            whole = both
    check((whole.weighted / divisor(whole), slope / divisor(whole)), wanted(segmenter))


@cases
def test_padding_to_twice_the_length(segmenter, reading):
    def padded(x):
        fill = np.nan if x.dtype == np.float32 else 0
        return np.pad(x, ((0, 3), (0, LENGTH)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)

    batch = {name: padded(x) for name, x in wide_batch().items()}
    batch["features"] = np.nan_to_num(batch["features"])  # a model's inputs are never garbage
    check(found(THETA, batch, segmenter, reading), wanted(segmenter, reading))


@cases
@pytest.mark.parametrize("together", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_packing_several_sequences_in_a_row(segmenter, reading, together):
    shape = ROWS // together, together * LENGTH
    batch = {name: x.reshape(*shape, *x.shape[2:]) for name, x in wide_batch().items()}
    batch["sequence_ids"] = np.repeat(np.arange(1, together + 1), LENGTH) * np.ones((shape[0], 1), int)
    check(found(THETA, batch, segmenter, reading), wanted(segmenter, reading))


def mean_slope(theta, batch, segmenter, reading):
    value, slope = differentiated(segmenter=segmenter, axis_name="rows", **READINGS[reading])(theta, batch)
    return value, jax.lax.pmean(slope, "rows")


def by_jit(segmenter, reading, n):
    batch = jax.device_put(wide_batch(), NamedSharding(mesh(n), SPLIT))
    theta = jax.device_put(THETA, NamedSharding(mesh(n), WHOLE))
    return found(theta, batch, segmenter, reading)


def by_shard_map(segmenter, reading, n, check_vma=True):
    function = functools.partial(mean_slope, segmenter=segmenter, reading=reading)
    split = jax.shard_map(
        function, mesh=mesh(n), in_specs=(WHOLE, SPLIT), out_specs=WHOLE, check_vma=check_vma
    )
    return jax.jit(split)(THETA, wide_batch())


def by_pmap(segmenter, reading, n):
    function = functools.partial(mean_slope, segmenter=segmenter, reading=reading)
    parts = {name: x.reshape(n, ROWS // n, *x.shape[1:]) for name, x in wide_batch().items()}
    got = jax.pmap(function, axis_name="rows", in_axes=(None, 0), devices=jax.devices()[:n])(THETA, parts)
    for x in got:  # the same on every device
        np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
    return [x[0] for x in got]


@pytest.mark.parametrize(
    ("reading", "n"),
    [
        pytest.param(reading, n, marks=[pytest.mark.slow] if reading and n < 8 else [])
        for reading, n in itertools.product(range(len(READINGS)), (1, 2, 8))
    ],
)
@pytest.mark.parametrize(
    "spread",
    [by_jit, by_shard_map, functools.partial(by_shard_map, check_vma=False), by_pmap],
    ids=["jit", "shard_map", "shard_map unchecked", "pmap"],
)
def test_devices(spread, reading, n):
    check(spread("blocks", reading, n), wanted("blocks", reading))


@pytest.mark.parametrize("spread", [by_jit, by_shard_map, by_pmap])
@pytest.mark.parametrize("segmenter", ["tokens", "sequences", "lines", "adaptive"])
def test_devices_and_every_kind_of_segment(spread, segmenter):
    check(spread(segmenter, 0, 2), wanted(segmenter))


def test_the_gradient_in_an_array_that_is_split_is_n_fold_under_pmap_alone():
    @functools.partial(jax.jit, static_argnames="axis_name")
    def slope(cur, batch, axis_name=None):
        return jax.grad(lambda cur: loss(THETA, batch | {"cur": cur}, axis_name=axis_name))(cur)

    batch, spread = wide_batch(), functools.partial(slope, axis_name="rows")
    want = slope(batch["cur"], batch)
    split = jax.shard_map(spread, mesh=mesh(8), in_specs=SPLIT, out_specs=SPLIT)(batch["cur"], batch)
    np.testing.assert_allclose(split, want, rtol=1e-5, atol=1e-7)
    parts = {name: x[:, None] for name, x in batch.items()}
    np.testing.assert_allclose(
        jax.pmap(spread, axis_name="rows")(parts["cur"], parts)[:, 0], 8 * want, rtol=1e-5, atol=1e-6
    )
