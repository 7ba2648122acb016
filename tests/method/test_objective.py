"""The one page: value, single division, masks, and that no gate is no gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.method import (
    drift_diagnostics,
    effective_token_ratio,
    fixed_blocks,
    histogram,
    objective,
    sampled_token_loss,
)
from tests import oracle_numpy

SHAPE = (4, 16)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    cur, old, tea = (-rng.exponential(size=SHAPE).astype(np.float32) for _ in range(3))
    return cur, old, tea, rng.random(SHAPE) < 0.7


def value(cur, old, tea, mask, size=4):
    segments = fixed_blocks(jnp.array(mask), size) if size else None
    base = sampled_token_loss(cur, old, tea)
    return objective(cur, old, jnp.array(mask), base, segments).loss


def test_value_is_weighted_sum_over_token_count(arrays):
    cur, old, tea, mask = arrays
    segments = np.asarray(fixed_blocks(jnp.array(mask), 4))
    w = oracle_numpy.gate_weights(cur, old, mask, segments)
    base = oracle_numpy.sampled_token(cur, old, tea, "ppo", "old")
    np.testing.assert_allclose(value(*arrays), (w * base)[mask].sum() / mask.sum(), rtol=1e-5)


def test_the_gate_scales_each_tokens_gradient_by_its_weight(arrays):
    cur, old, tea, mask = arrays
    gated = jax.grad(value)(jnp.array(cur), old, tea, mask)
    plain = jax.grad(lambda c: value(c, old, tea, mask, size=None))(jnp.array(cur))
    w = oracle_numpy.gate_weights(cur, old, mask, np.asarray(fixed_blocks(jnp.array(mask), 4)))
    np.testing.assert_allclose(gated, w * plain, rtol=1e-4, atol=1e-8)


def test_without_drift_the_gated_loss_is_bitwise_the_ungated(arrays):
    cur, _, tea, mask = arrays
    for function in (value, jax.grad(value)):
        gated = function(jnp.array(cur), cur, tea, mask, 4)
        plain = function(jnp.array(cur), cur, tea, mask, None)
        np.testing.assert_array_equal(gated, plain)


def test_mask_equals_removal(arrays):
    cur, old, tea, mask = arrays
    padded = [np.pad(x, ((0, 2), (0, 7)), constant_values=np.nan) for x in (cur, old, tea)]
    padded = [np.where(np.pad(mask, ((0, 2), (0, 7))), x, np.nan) for x in padded]
    wide = np.pad(mask, ((0, 2), (0, 7)))
    np.testing.assert_allclose(value(*padded, wide), value(*arrays), rtol=1e-6)


def test_the_mean_over_sequences_counts_each_sequence_once(arrays):
    cur, old, tea, mask = arrays
    mask = mask.copy()
    mask[2] = False  # an empty row is no sequence
    base = oracle_numpy.sampled_token(cur, old, tea, "ppo", "old")
    options = {"scope": "sequence", "reduction": "seq_mean_token_mean"}
    segments = fixed_blocks(jnp.array(mask), 4)
    got = objective(cur, old, jnp.array(mask), jnp.array(base), segments, **options)
    w = oracle_numpy.gate_weights(cur, old, mask, np.asarray(segments), scope="sequence")
    means = [(w * base)[row][mask[row]].mean() for row in (0, 1, 3)]
    np.testing.assert_allclose(got.loss, np.mean(means), rtol=1e-5)
    # Packed in two rows of two sequences each it is the same.
    packed = [x.reshape(2, 32) for x in (cur, old, mask, base)]
    ids = jnp.repeat(jnp.array([[1, 2], [1, 2]]), 16, axis=1)
    segments = fixed_blocks(jnp.array(packed[2]), 4, sequence_ids=ids)
    again = objective(
        packed[0],
        packed[1],
        jnp.array(packed[2]),
        jnp.array(packed[3]),
        segments,
        sequence_ids=ids,
        **options,
    )
    np.testing.assert_allclose(again.loss, got.loss, rtol=1e-5)
    with pytest.raises(ValueError, match="reduction must be"):
        objective(cur, old, jnp.array(mask), jnp.array(base), None, reduction="mean")


def test_diagnostics_are_sums_and_counts(arrays):
    cur, old, tea, mask = arrays
    segments = fixed_blocks(jnp.array(mask), 4)
    result = objective(cur, old, jnp.array(mask), jnp.zeros(SHAPE), segments)
    sums = drift_diagnostics(cur, old, tea, result.drift, result.weights, jnp.array(mask), clip=(0.2, 0.2))
    d = (cur - old)[mask].astype(np.float64)
    rho = np.exp(d)
    want = {
        "drift": d.mean(),
        "drift_abs": np.abs(d).mean(),
        "clip_fraction": ((rho < 0.8) | (rho > 1.2)).mean(),
        "kl_old_k3": (rho - 1 - d).mean(),
        "kl_teacher_k1": (rho * (cur - tea)[mask]).mean(),
    }
    for name, expected in want.items():
        total, count = sums[name]
        assert count == mask.sum()
        np.testing.assert_allclose(total / count, expected, rtol=1e-4, atol=1e-6, err_msg=name)
    w = np.asarray(result.weights, np.float64)[mask]
    top, bottom = sums["effective_token_ratio"]
    np.testing.assert_allclose(top / bottom, w.sum() ** 2 / (len(w) * (w**2).sum()), rtol=1e-5)


def test_effective_token_ratio_limits():
    mask = jnp.ones((1, 4))
    for weights, want in (([1, 1, 1, 1], 1.0), ([4, 0, 0, 0], 0.25), ([2, 2, 0, 0], 0.5)):
        top, bottom = effective_token_ratio(jnp.array([weights], jnp.float32), mask)
        assert top / bottom == want


def test_histogram_counts_every_masked_value_once():
    values = jnp.array(np.random.default_rng(1).normal(size=(5, 40)))
    mask = values > -0.5
    edges = (-1.0, 0.0, 0.5, 1.0)
    want = np.histogram(np.asarray(values)[np.asarray(mask)], [-np.inf, *edges, np.inf])[0]
    np.testing.assert_array_equal(histogram(values, mask, edges), want)
