"""Drawing a token: frequencies, the nucleus, and ids that never come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from opd_jax.rollout.sampling import nucleus, sample_token

P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


def draw(logits, n, **settings):
    keys = jax.vmap(jax.random.key)(jnp.arange(n))
    return sample_token(jnp.broadcast_to(logits, (n, len(logits))), keys, **settings)


@pytest.mark.parametrize(
    ("temperature", "top_p", "kept"),
    [(1.0, 1.0, 5), (0.7, 1.0, 5), (1.0, 0.8, 3), (1.0, 0.69, 2), (1.0, 0.01, 1), (2.0, 0.6, 3)],
)
def test_frequencies_are_the_distribution(temperature, top_p, kept):
    n = 20_000
    tokens, _ = draw(jnp.log(P), n, temperature=temperature, top_p=top_p, usable=5)
    p = P ** (1 / temperature)
    p = p / p.sum()
    truncated = np.where(np.arange(5) < kept, p, 0)
    truncated /= truncated.sum()
    counts = np.bincount(tokens, minlength=5)
    assert (counts[kept:] == 0).all()
    if kept > 1:
        assert stats.chisquare(counts[:kept], n * truncated[:kept]).pvalue > 1e-4


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = jnp.log(jnp.array([[0.3, 0.05, 0.4, 0.15, 0.1]]))
    for top_p, want in ((0.4, {2}), (0.41, {0, 2}), (0.7, {0, 2}), (0.71, {0, 2, 3}), (1.0, {0, 1, 2, 3, 4})):
        assert set(np.flatnonzero(np.isfinite(nucleus(logits, top_p)[0]))) == want


def test_logprobs_are_raw():
    tokens, logprobs = draw(jnp.log(P), 50, temperature=0.5, top_p=0.5, usable=5)
    raw = 2 * np.log(P) - np.log((P**2).sum())  # temperature stays in, truncation stays out
    np.testing.assert_allclose(logprobs, raw[np.asarray(tokens)], rtol=1e-5)


def test_greedy_takes_the_best_and_reports_temperature_one():
    tokens, logprobs = draw(jnp.log(P[::-1].copy()), 3, temperature=0.0, top_p=0.9, usable=5)
    assert (np.asarray(tokens) == 4).all()
    np.testing.assert_allclose(logprobs, np.log(0.4), rtol=1e-5)


def test_vocabulary_padding_is_never_drawn_but_keeps_its_mass():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    for temperature in (0.0, 1.0):
        tokens, logprobs = draw(logits, 500, temperature=temperature, top_p=0.9, usable=2)
        assert (np.asarray(tokens) < 2).all()
        np.testing.assert_allclose(logprobs, np.log([0.1, 0.2])[np.asarray(tokens)], rtol=1e-5)
