"""The one page: value, single division, masks, and that no gate is no gate."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.method import (
    clip_weights,
    drift_gate,
    drift_weights,
    fixed_blocks,
    inverse,
    objective,
    residual,
    sampled_token_loss,
    token_mean,
    token_share,
    topk_loss,
    weighted_loss,
)
from tests.method.batches import SHAPE, close, compiled, few, fields, nats, packings, typical, wild
from tests.oracle import controls, gates, losses
from tests.oracle import objective as oracle

REDUCTIONS = ("token_mean", "seq_mean_token_mean")
READINGS = st.sampled_from(
    [("minibatch", "token_mean"), ("sequence", "seq_mean_token_mean"), ("none", "token_mean")]
)


def value(cur, old, tea, mask, size=4, **options):
    segments = fixed_blocks(mask, size) if size else None
    base = sampled_token_loss(cur, old, tea, mask=mask)
    return objective(cur, old, mask, base, segments, **options).loss


slope, value_and_slope = jax.grad(value), jax.value_and_grad(value)


@few
@given(nats, nats, nats, packings(), READINGS)
def test_the_objective_is_the_printed_formula_in_both_readings(cur, old, tea, packing, reading):
    mask, ids = packing
    scope, reduction = reading
    if not mask.any():
        return
    segments = np.asarray(compiled(fixed_blocks, size=3)(mask, sequence_ids=ids))
    base = compiled(sampled_token_loss)(cur, old, tea)
    got = compiled(objective, scope=scope, reduction=reduction)(
        cur, old, mask, np.where(mask, base, np.nan), segments, sequence_ids=ids
    )
    w = gates.drift_gate(cur, old, mask, segments, scope, ids)
    want = oracle.weighted_loss(losses.sampled_token(cur, old, tea, "ppo", "old"), w, mask, reduction, ids)
    close(got.weights, w)
    close(got.drift, gates.drift(cur, old, mask))
    np.testing.assert_allclose(got.loss, want, rtol=2e-5, atol=2e-5)


@few
@given(nats, nats, nats, packings(), READINGS)
def test_the_gate_scales_each_tokens_gradient_by_its_weight(cur, old, tea, packing, reading):
    mask, _ = packing
    scope, reduction = reading
    gated = compiled(slope, scope=scope, reduction=reduction)(cur, old, tea, mask)
    plain = compiled(slope, size=None, reduction=reduction)(cur, old, tea, mask)
    w = gates.drift_gate(cur, old, mask, np.asarray(fixed_blocks(mask, 4)), scope)
    np.testing.assert_allclose(gated, w * plain, rtol=1e-4, atol=1e-7)


@few
@given(nats, nats, packings(), st.sampled_from(REDUCTIONS))
def test_without_drift_the_gated_loss_is_bitwise_the_ungated(cur, tea, packing, reduction):
    mask, _ = packing
    for function in (value, slope):
        gated = compiled(function, reduction=reduction)(cur, cur, tea, mask)
        np.testing.assert_array_equal(
            gated, compiled(function, size=None, reduction=reduction)(cur, cur, tea, mask)
        )


@few
@given(wild, wild, packings(), READINGS)
def test_garbage_and_huge_drift_leave_value_and_gradient_finite(cur, old, packing, reading):
    mask, _ = packing
    scope, reduction = reading
    for garbage in (np.nan, np.inf):
        dirty = [np.where(mask, x, sign * garbage) for x, sign in ((cur, 1), (old, -1), (old, 1))]
        function = compiled(value_and_slope, scope=scope, reduction=reduction)
        got = function(*dirty, mask)
        chex.assert_tree_all_finite(got)
        assert not np.asarray(got[1])[~mask].any()
    np.testing.assert_array_equal(function(*dirty, np.zeros_like(mask))[0], 0)


def test_the_value_by_hand():
    cur, old = jnp.log(jnp.array([[2.0, 1.0, 4.0], [1.0, 1.0, 1.0]])), jnp.zeros((2, 3))
    mask, base = jnp.array([[1, 1, 0], [1, 0, 0]]), jnp.array([[3.0, 6.0, 99.0], [8.0, 99.0, 99.0]])
    # g = (1/2, 1), 1 with mean 5/6: w = (.6, 1.2), 1.2
    got = objective(cur, old, mask, base, jnp.array([[0, 1, -1], [0, -1, -1]]))
    np.testing.assert_allclose(got.weights, [[0.6, 1.2, 0], [1.2, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(got.loss, (1.8 + 7.2 + 9.6) / 3, rtol=1e-6)
    # by sequence: w = (2/3, 4/3), 1; means (2 + 8) / 2 and 8
    segments = jnp.array([[0, 1, -1], [0, -1, -1]])
    got = objective(cur, old, mask, base, segments, scope="sequence", reduction="seq_mean_token_mean")
    np.testing.assert_allclose(got.loss, (5 + 8) / 2, rtol=1e-6)


def test_weights_are_made_of_gate_reweighing_and_bounds_in_this_order():
    batch = fields()
    cur, old, mask = batch["cur"], batch["old"], batch["mask"]
    segments = fixed_blocks(mask, 3)
    options = {"tau": 2.0, "statistic": "mean_abs", "map": "clipped_exp", "floor": 0.2}
    d, w = drift_weights(cur, old, mask, segments, **options)
    np.testing.assert_array_equal(w, drift_gate(cur, old, mask, segments, **options))
    np.testing.assert_array_equal(d, np.where(mask, cur - old, 0))
    got = drift_weights(
        cur,
        old,
        mask,
        segments,
        **options,
        reweigh=lambda g: inverse(g, mask, segments),
        bound=lambda w: residual(clip_weights(w, mask, 0.5, 1.5), mask, 0.5),
    )[1]
    g = gates.gate(cur, old, mask, np.asarray(segments), **options)
    inverted = gates.normalise(controls.inverse(g, mask), mask)
    np.testing.assert_allclose(got, residual(clip_weights(inverted, mask, 0.5, 1.5), mask, 0.5), rtol=1e-5)
    np.testing.assert_allclose(np.sum(got), mask.sum(), rtol=1e-5)
    # Without segments there is no gate, but whatever else weighs.
    np.testing.assert_array_equal(drift_weights(cur, old, mask, None)[1], mask)
    ramp = jnp.arange(12.0)
    w = drift_weights(cur, old, mask, None, reweigh=lambda g: ramp * g)[1]
    close(w, gates.normalise(np.asarray(ramp) * mask, mask))


@few
@given(typical(-3, 3), typical(0, 2), packings())
def test_means_over_tokens_and_over_sequences(base, w, packing):
    mask, ids = packing
    if not mask.any():
        return
    dirty = np.where(mask, base, np.nan), np.where(mask, w, np.inf)
    for reduction in REDUCTIONS:
        got = compiled(weighted_loss, reduction=reduction)(*dirty, mask, sequence_ids=ids)
        close(got, oracle.weighted_loss(base, w, mask, reduction, ids))
        share = compiled(token_share, reduction=reduction)(mask, sequence_ids=ids)
        count = oracle.weighted_loss(1 / np.maximum(share, 1e-9), share, mask, reduction, ids)
        np.testing.assert_allclose(count, 1, rtol=1e-5)
    close(compiled(token_mean)(dirty[0], mask), base[mask].mean())
    sequences = len({(b, i) for b, row in enumerate(ids) for i in row[mask[b]]})
    np.testing.assert_allclose(np.sum(share), sequences, rtol=1e-5)


def test_drift_and_weights_are_detached():
    batch = fields()

    def total(cur, old):
        d, w = drift_weights(cur, old, batch["mask"], fixed_blocks(batch["mask"], 3))
        return jnp.sum(jnp.arange(12) * (d + w))

    slopes = jax.grad(total, (0, 1))(batch["cur"], batch["old"])
    chex.assert_trees_all_equal(slopes, (0 * batch["cur"], 0 * batch["old"]))


def test_mask_equals_removal():
    batch = fields(1)
    arrays = [batch[name] for name in ("cur", "old", "tea")]
    wide = [
        np.pad(np.where(batch["mask"], x, np.nan), ((0, 2), (0, 7)), constant_values=np.nan) for x in arrays
    ]
    mask = np.pad(batch["mask"], ((0, 2), (0, 7)))
    for function in (value, lambda *x: slope(*x)[: SHAPE[0], : SHAPE[1]]):
        np.testing.assert_allclose(
            function(*wide, mask), function(*arrays, batch["mask"]), rtol=1e-5, atol=1e-8
        )


def test_the_topk_objective_has_the_weighted_printed_gradient():
    batch = fields(2)
    cur, old, mask = batch["cur"], batch["old"], batch["mask"]
    teacher = batch["teacher_logprobs_on_support"]
    segments = fixed_blocks(mask, 4)

    def loss(z):
        return objective(cur, old, mask, topk_loss(z, teacher, mask=mask), segments).loss

    w = gates.drift_gate(cur, old, mask, np.asarray(segments))
    want = losses.topk_gradient(batch["student_logits_on_support"], teacher) * w[..., None] / mask.sum()
    close(jax.grad(loss)(batch["student_logits_on_support"]), want, atol=1e-6)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_jit_without_and_under_pmap(self):
        batch = fields(3)
        arrays = [batch[name] for name in ("cur", "old", "tea", "mask")]
        got = self.variant(value_and_slope)(*arrays)
        chex.assert_shape(got, [(), SHAPE])
        chex.assert_trees_all_close(got, compiled(value_and_slope)(*arrays), rtol=1e-5, atol=1e-8)


def test_one_trace_serves_a_changing_tau():
    chex.clear_trace_counter()
    batch = fields(4)
    arrays = [batch[name] for name in ("cur", "old", "tea", "mask")]
    function = jax.jit(chex.assert_max_traces(value, n=1))
    assert len({float(function(*arrays, tau=tau)) for tau in (0.0, 1.0, 2.0)}) == 3


def test_nonsense_is_refused():
    batch = fields()
    arrays = [batch[name] for name in ("cur", "old", "mask", "base")]
    with pytest.raises(ValueError, match="reduction must be"):
        objective(*arrays, None, reduction="mean")
    with pytest.raises(ValueError, match="scope must be"):
        objective(*arrays, None, scope="batch")


def test_a_mask_says_in_or_out_whatever_its_numbers():
    base = jnp.arange(12.0).reshape(2, 6)
    mask = jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    for kind in (2, 0.5, -1):
        np.testing.assert_array_equal(token_mean(base, kind * mask), token_mean(base, mask))
        for reduction in ("token_mean", "seq_mean_token_mean"):
            got, want = (weighted_loss(base, base, m, reduction=reduction) for m in (kind * mask, mask))
            np.testing.assert_array_equal(got, want)
