"""The gate against loops, its limits, and what may never reach it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from opd_jax.method import STATISTICS, drift_gate, every_token, fixed_blocks, gate, normalise, whole_sequence
from tests import oracle_numpy

SHAPE = (3, 12)
nats = arrays(np.float32, SHAPE, elements=st.floats(-4, 0, width=32))
masks = arrays(bool, SHAPE).filter(lambda m: m.any())
fast = settings(max_examples=40, deadline=None)


@fast
@given(
    nats, nats, masks, st.sampled_from(sorted(STATISTICS)), st.sampled_from(["none", "sequence", "minibatch"])
)
def test_weights_are_the_printed_formula(cur, old, mask, statistic, scope):
    segments = fixed_blocks(jnp.array(mask), 5)
    got = drift_gate(cur, old, jnp.array(mask), segments, tau=0.7, statistic=statistic, scope=scope)
    want = oracle_numpy.gate_weights(cur, old, mask, np.asarray(segments), 0.7, statistic, scope)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@fast
@given(nats, nats, masks)
def test_composition_equals_the_stable_form(cur, old, mask):
    mask = jnp.array(mask)
    segments = fixed_blocks(mask, 4)
    composed = normalise(gate(cur, old, mask, segments), mask)
    np.testing.assert_allclose(drift_gate(cur, old, mask, segments), composed, rtol=1e-5)


@fast
@given(nats, nats, masks)
def test_mean_one_nonnegative_and_zero_behind_the_mask(cur, old, mask):
    w = np.asarray(drift_gate(cur, old, jnp.array(mask), fixed_blocks(jnp.array(mask), 4)))
    assert (w >= 0).all()
    assert (w[~mask] == 0).all()
    np.testing.assert_allclose(w.sum(), mask.sum(), rtol=1e-5)


@fast
@given(nats, st.floats(-3, 3, width=32), masks)
def test_equal_drift_on_every_token_weighs_all_the_same(cur, shift, mask):
    w = drift_gate(cur, cur + np.float32(shift), jnp.array(mask), every_token(jnp.array(mask)))
    np.testing.assert_allclose(w, mask.astype(np.float32), atol=1e-5)


def test_no_drift_is_exactly_one():
    cur, mask = jnp.array(np.random.default_rng(0).normal(size=SHAPE)), jnp.ones(SHAPE)
    w = drift_gate(cur, cur, mask, fixed_blocks(mask, 5))
    assert (np.asarray(w) == 1.0).all()


@fast
@given(nats, nats, masks)
def test_block_one_is_the_token_gate_and_a_long_block_the_sequence_gate(cur, old, mask):
    mask = jnp.array(mask)
    for blocks, other in ((1, every_token(mask)), (SHAPE[1], whole_sequence(mask))):
        np.testing.assert_array_equal(
            drift_gate(cur, old, mask, fixed_blocks(mask, blocks)), drift_gate(cur, old, mask, other)
        )


def test_a_sequence_gate_normalised_per_sequence_does_nothing():
    rng = np.random.default_rng(1)
    cur, old, mask = rng.normal(size=SHAPE), rng.normal(size=SHAPE), jnp.ones(SHAPE)
    w = drift_gate(cur, old, mask, whole_sequence(mask), scope="sequence")
    np.testing.assert_allclose(w, 1.0, rtol=1e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scope", ["none", "sequence", "microbatch", "minibatch"])
def test_garbage_behind_the_mask_changes_nothing(garbage, scope):
    rng = np.random.default_rng(2)
    cur, old = rng.normal(size=SHAPE).astype(np.float32), rng.normal(size=SHAPE).astype(np.float32)
    mask = rng.random(SHAPE) < 0.6
    mask[1] = False  # a row of padding
    segments = fixed_blocks(jnp.array(mask), 4)
    clean = drift_gate(cur, old, jnp.array(mask), segments, scope=scope)
    dirty = drift_gate(
        np.where(mask, cur, garbage), np.where(mask, old, -garbage), jnp.array(mask), segments, scope=scope
    )
    np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_drift_stays_finite_and_mean_one(size):
    cur = jnp.zeros(SHAPE).at[0, :6].set(size).at[1].set(size)
    mask = jnp.ones(SHAPE)
    for scope in ("sequence", "minibatch"):
        w = drift_gate(cur, jnp.zeros(SHAPE), mask, fixed_blocks(mask, 3), scope=scope)
        assert np.isfinite(w).all()
        np.testing.assert_allclose(w.sum(), mask.sum(), rtol=1e-5)
    # every token a thousand nats away: the printed form underflows, the shifted one weighs them alike
    w = drift_gate(jnp.full(SHAPE, size), jnp.zeros(SHAPE), mask, fixed_blocks(mask, 3))
    np.testing.assert_allclose(w, 1.0)


def test_an_empty_batch_gives_zeros():
    w = drift_gate(jnp.ones(SHAPE), jnp.zeros(SHAPE), jnp.zeros(SHAPE), jnp.full(SHAPE, -1))
    assert (np.asarray(w) == 0).all()


def test_no_gradient_flows_through_any_gate():
    old, mask = jnp.zeros(SHAPE), jnp.ones(SHAPE)
    segments = fixed_blocks(mask, 4)
    cur = jnp.array(np.random.default_rng(3).normal(size=SHAPE))
    for function in (gate, drift_gate):
        gradient = jax.grad(lambda cur, f=function: jnp.sum(f(cur, old, mask, segments) * jnp.arange(12)))(
            cur
        )
        assert (np.asarray(gradient) == 0).all()


def test_axis_name_makes_the_mean_global():
    rng = np.random.default_rng(4)
    cur, old = jnp.array(rng.normal(size=(8, 12))), jnp.array(rng.normal(size=(8, 12)))
    mask = jnp.array(rng.random((8, 12)) < 0.7)
    whole = drift_gate(cur, old, mask, fixed_blocks(mask, 4))
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("rows")
    parts = jax.shard_map(
        lambda c, o, m: drift_gate(c, o, m, fixed_blocks(m, 4), axis_name="rows"),
        mesh=mesh,
        in_specs=(spec, spec, spec),
        out_specs=spec,
    )(cur, old, mask)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_unknown_names_are_refused():
    x, ids = jnp.zeros(SHAPE), jnp.zeros(SHAPE, int)
    with pytest.raises(ValueError, match="statistic must be one of"):
        gate(x, x, x, ids, statistic="median")
    with pytest.raises(ValueError, match="scope must be"):
        normalise(x, x, scope="batch")
