"""Shares of micro-batches: merged in any order they are the whole, however far they drifted."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.method import Share, divisor, fixed_blocks, merge, objective, rescale, share
from tests.method.batches import ROWS, close, compiled, few, fields, masks, nats, typical, wild
from tests.oracle import gates
from tests.oracle import objective as oracle


def merged(cur, old, mask, base, segments, tau=1.0, order=range(ROWS), **options):
    """Every row a micro-batch, merged one by one: the loss, and its gradient in ``base``."""
    parts, slopes = [], []
    for row in order:
        arrays = [x[row : row + 1] for x in (cur, old, mask)]
        own = None if segments is None else segments[row : row + 1]

        def weighted(base, arrays=arrays, own=own):
            part = share(*arrays, base, own, tau=tau, **options)
            return part.weighted, part

        slope, part = jax.grad(weighted, has_aux=True)(base[row : row + 1])
        parts.append(part)
        slopes.append(slope)
    whole = functools.reduce(functools.partial(merge, tau=tau), parts)
    slopes = [
        rescale(s, part.least, whole.least, tau) / divisor(whole)
        for s, part in zip(slopes, parts, strict=True)
    ]
    back = np.argsort(np.array(order))
    return whole.weighted / divisor(whole), jnp.concatenate([slopes[i] for i in back])


@jax.value_and_grad
def whole(base, cur, mask, segments):
    return objective(cur, 0 * cur, mask, base, segments).loss


@few
@given(
    nats,
    nats,
    typical(-3, 3),
    masks,
    st.sampled_from([0.0, 0.5, 3.0]),
    st.sampled_from(["signed_mean", "rms"]),
)
def test_merged_shares_are_the_printed_objective(cur, old, base, mask, tau, statistic):
    segments = np.asarray(compiled(fixed_blocks, size=3)(mask))
    loss, slopes = compiled(merged, statistic=statistic)(cur, old, mask, base, segments, tau=tau)
    if mask.any():
        w = gates.drift_gate(cur, old, mask, segments, tau=tau, statistic=statistic)
        close(loss, oracle.weighted_loss(base, w, mask))
        close(slopes, w / mask.sum())
    else:
        np.testing.assert_array_equal(loss, 0)


@few
@given(wild, typical(-3, 3), masks, st.sampled_from([(0, 1, 2, 3), (2, 3, 0, 1)]))
def test_any_drift_any_order_and_empty_rows(cur, base, mask, order):
    segments = compiled(fixed_blocks, size=3)(mask)
    cur, base = np.where(mask, cur, np.nan), np.where(mask, base, np.inf)
    got = compiled(merged, order=order)(cur, 0 * cur, mask, base, segments)
    chex.assert_tree_all_finite(got)

    want = compiled(whole)(base, cur, mask, segments)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-7)


def test_by_hand():
    old, mask, base = jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.array([[3.0, 6.0]])
    one = share(jnp.log(jnp.array([[2.0, 1.0]])), old, mask, base, jnp.array([[0, 1]]))
    chex.assert_trees_all_close(one, Share(*map(jnp.float32, (7.5, 1.5, 2, 0))))  # g = 1/2 and 1
    other = share(jnp.log(jnp.array([[4.0, 8.0]])), old, mask, base, jnp.array([[0, 1]]))
    chex.assert_trees_all_close(other, Share(*map(jnp.float32, (6, 1.5, 2, np.log(4)))), rtol=1e-6)  # 1, 1/2
    # g of the second is a quarter of what it was, seen from the first
    both = merge(one, other)
    chex.assert_trees_all_close(both, Share(*map(jnp.float32, (9, 1.875, 4, 0))), rtol=1e-6)
    np.testing.assert_allclose(both.weighted / divisor(both), 9 / 1.875, rtol=1e-6)
    np.testing.assert_allclose(rescale(jnp.array(8.0), jnp.log(4.0), jnp.array(0.0), 2.0), 0.5, rtol=1e-6)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_an_empty_micro_batch_adds_nothing(tau):
    batch = fields()
    arrays = [batch[name] for name in ("cur", "old", "mask", "base")]
    segments = fixed_blocks(batch["mask"], 3)
    full = share(*arrays, segments, tau=tau)
    nothing = np.zeros_like(batch["mask"])
    empty = share(*arrays[:2], nothing, arrays[3], fixed_blocks(nothing, 3), tau=tau)
    for both in (merge(full, empty, tau), merge(empty, full, tau)):
        chex.assert_trees_all_equal(both, full)
    none = merge(empty, empty, tau)
    assert none.weighted / divisor(none) == 0


def test_without_segments_it_is_the_plain_mean():
    batch = fields(1)
    mask, base = batch["mask"], batch["base"]
    loss, slopes = merged(batch["cur"], batch["old"], mask, base, None)
    np.testing.assert_allclose(loss, base[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(slopes, mask / mask.sum(), rtol=1e-6)


def test_only_the_base_loss_is_differentiated():
    batch = fields(2)
    segments = fixed_blocks(batch["mask"], 3)

    def total(cur, old, tau):
        part = share(cur, old, batch["mask"], batch["base"], segments, tau=tau)
        return sum(merge(part, part, tau))

    slopes = jax.grad(total, (0, 1))(batch["cur"], batch["old"], 1.0)
    chex.assert_trees_all_equal(slopes, (0 * batch["cur"], 0 * batch["old"]))


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_jit_without_and_under_pmap(self):
        batch = fields(3)
        arrays = [batch[name] for name in ("cur", "old", "mask", "base")]
        segments = np.asarray(fixed_blocks(batch["mask"], 3))
        loss, slopes = self.variant(merged)(*arrays, segments)
        w = gates.drift_gate(*arrays[:3], segments)
        close(loss, oracle.weighted_loss(batch["base"], w, batch["mask"]))
        close(slopes, w / batch["mask"].sum())


@pytest.mark.parametrize("eps", [1e-8, 0.01, 0.5])
def test_eps_is_that_of_the_whole(eps):
    batch = fields(4)
    arrays = [batch[name] for name in ("cur", "old", "mask", "base")]
    segments = fixed_blocks(batch["mask"], 3)
    part = share(*arrays, segments)
    want = objective(*arrays, segments, eps=eps).loss
    np.testing.assert_allclose(part.weighted / divisor(part, eps), want, rtol=1e-6)


def test_a_divisor_below_one_is_one_like_any():
    for total, tokens, want in ((0.5, 10, 0.5), (1.5, 1, 1.5), (0, 10, 1), (0, 0, 1)):
        whole = Share(*map(jnp.float32, (1, total, tokens, 0)))
        np.testing.assert_allclose(divisor(whole), want, rtol=1e-6)


def test_a_micro_batch_of_one_token_counts_as_it_would_in_the_whole():
    cur, old, mask = jnp.array([[3.0, 9.0], [1.0, 2.0]]), jnp.zeros((2, 2)), jnp.array([[1, 0], [1, 1]])
    segments = jnp.array([[0, -1], [0, 1]])
    one, other = (
        share(cur[b : b + 1], old[:1], mask[b : b + 1], cur[:1], segments[b : b + 1]) for b in (0, 1)
    )
    chex.assert_trees_all_close(one, Share(*map(jnp.float32, (3, 1, 1, 3))), rtol=1e-6)
    both = merge(one, other)
    e = np.exp([-2, 0, -1])  # relative to a drift of 1
    want = e[0] * 3 + e[1] * 3 + e[2] * 9, e.sum(), 3, 1
    chex.assert_trees_all_close(both, Share(*map(jnp.float32, want)), rtol=1e-6)
