"""The vocabulary head: chunking, temperature and gradients change nothing that they should not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.model import forward, readout, token_logprobs, top_k_logprobs
from opd_jax.rollout import make_rows


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(40, size=n) for n in (2, 5, 3)]
    responses = [rng.integers(40, size=n) for n in (9, 1, 6)]
    return jax.tree.map(jnp.asarray, make_rows(prompts, responses, 13))


def dense(params, rows, config, temperature):
    z = forward(params, rows.tokens, config, positions=rows.positions, sequence_ids=rows.sequence_ids)
    return np.asarray(jax.nn.log_softmax(z / temperature, axis=-1), np.float64)


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_readout_is_the_softmax(small, rows, chunk, temperature):
    config, params = small
    config = dataclasses.replace(config, head_chunk=chunk)
    want = dense(params, rows, config, temperature)
    ids = jnp.stack([rows.targets, (rows.targets + 7) % 40], axis=-1)
    got = readout(params, rows, ids, config, temperature=temperature)
    np.testing.assert_allclose(got.logprobs, np.take_along_axis(want, np.asarray(ids), -1), atol=2e-5)
    np.testing.assert_allclose(got.entropy, -(np.exp(want) * want).sum(-1), atol=2e-5)
    one = token_logprobs(params, rows, config, temperature=temperature)
    np.testing.assert_allclose(one, got.logprobs[..., 0], atol=1e-6)


@pytest.mark.parametrize("chunk", [4, 512])
def test_top_k_is_sorted_raw_and_beside_the_target(small, rows, chunk):
    config, params = small
    config = dataclasses.replace(config, head_chunk=chunk)
    want = dense(params, rows, config, 1.3)
    got = top_k_logprobs(params, rows, 5, config, temperature=1.3)
    np.testing.assert_allclose(got.logprobs, -np.sort(-want, -1)[..., :5], atol=2e-5)
    np.testing.assert_allclose(np.take_along_axis(want, np.asarray(got.ids), -1), got.logprobs, atol=2e-5)
    np.testing.assert_allclose(got.entropy, -(np.exp(want) * want).sum(-1), atol=2e-5)
    np.testing.assert_allclose(
        got.sampled, np.take_along_axis(want, np.asarray(rows.targets)[..., None], -1)[..., 0], atol=2e-5
    )


def test_chunks_give_the_same_gradient(small, rows):
    config, params = small

    def gradient(chunk):
        chunked = dataclasses.replace(config, head_chunk=chunk)
        loss = lambda p: jnp.sum(jnp.sin(token_logprobs(p, rows, chunked)) * rows.mask)  # noqa: E731
        return jax.grad(loss)(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), gradient(4), gradient(512)
    )


def test_a_policy_compared_with_itself_agrees_to_the_bit(small, rows):
    """What makes drift exactly zero: the gradient program computes the forward program's bits."""
    config, params = small
    alone = jax.jit(lambda p: token_logprobs(p, rows, config))(params)
    ids = jnp.concatenate([rows.targets[..., None], jnp.ones((*rows.targets.shape, 3), int)], -1)

    def loss(p):
        out = readout(p, rows, ids, config)
        return jnp.sum(out.logprobs[..., 1:] ** 2), out.logprobs[..., 0]

    (_, beside), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(alone, beside)


def test_more_likeliest_ids_than_may_be_chosen_are_refused(small, rows):
    config, params = small
    with pytest.raises(InputError, match=r"asked for 8 of 7; lower k"):
        top_k_logprobs(params, rows, 8, config, usable=7)
    with pytest.raises(InputError, match=r"asked for 41 of 40"):
        top_k_logprobs(params, rows, 41, config, usable=50)
