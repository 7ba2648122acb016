"""Drawing a token: frequencies, the nucleus, and ids that never come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from opd_jax.rollout.sampling import likeliest, nucleus, sample_token

P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


# As in a trained model: two of a kind, some unlikely, one that may never come.
LOGITS = np.array([1.3, -0.4, 2.1, 0.2, 0.2, -1.5, 0.9, 3.0])
UNUSED, N = 7, 100_000


def draw(logits, n, **settings):
    keys = jax.vmap(jax.random.key)(jnp.arange(n))
    return sample_token(jnp.broadcast_to(logits, (n, len(logits))), keys, **settings)


def exact(logits, temperature, top_k, top_p, drawable):
    """The distribution in float64, token by token."""
    order = sorted(drawable, key=lambda i: -logits[i])
    kept = order[: top_k or None]
    z = {i: np.exp(logits[i] / temperature) for i in kept}
    nucleus, mass = [], 0.0
    for i in kept:
        if mass >= top_p * sum(z.values()):
            break
        nucleus.append(i)
        mass += z[i]
    return np.array([z[i] / mass if i in nucleus else 0.0 for i in range(len(logits))])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [
        (1.0, 0, 1.0, 6),
        (0.7, 0, 1.0, 6),
        (1.7, 0, 1.0, 6),
        (1.0, 1, 1.0, 1),
        (1.0, 2, 1.0, 2),
        (1.0, 3, 1.0, 3),
        (1.0, 0, 0.8, 3),
        (1.0, 0, 0.5, 2),
        (0.7, 0, 0.9, 3),
        (1.7, 3, 0.75, 2),  # of three; of all it would take four
        (0.7, 6, 0.99, 5),
        (1.0, 8, 1.0, 6),
    ],
)
def test_frequencies_are_the_distribution(temperature, top_k, top_p, kept):
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "usable": UNUSED, "banned": (1,)}
    tokens, _ = jax.jit(lambda z: draw(z, N, **settings))(jnp.array(LOGITS, jnp.float32))
    want = exact(LOGITS, temperature, top_k, top_p, [0, 2, 3, 4, 5, 6])
    support = want > 0
    assert support.sum() == kept
    counts = np.bincount(tokens, minlength=len(want))
    assert counts[~support].sum() == 0
    if kept > 1:
        assert stats.chisquare(counts[support], N * want[support]).pvalue > 1e-4


def test_the_likeliest_are_as_many_as_asked_for_and_their_equals():
    logits = jnp.log(jnp.array([[0.3, 0.05, 0.35, 0.15, 0.15]]))
    for top_k, want in ((0, {0, 1, 2, 3, 4}), (1, {2}), (2, {0, 2}), (3, {0, 2, 3, 4}), (5, {0, 1, 2, 3, 4})):
        assert set(np.flatnonzero(np.isfinite(likeliest(logits, top_k)[0]))) == want


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
