"""The core of the vocabulary head against float64 loops, the naive softmax, and its promise of memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from opd_jax.model.head import read_head

B, T, D, V = 3, 7, 12, 37
# More positions at a time than there are; all but one, which makes two halves; less, unevenly; one.
CASES = [(512, 0.7), (20, 1.0), (5, 0.7), (1, 1.3)]  # chunk, temperature


def arrays(seed=0, dtype=jnp.float32):
    """Hidden states, a matrix and ids, some of them equal at one position."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(V, size=(B, T, 5))
    ids[..., 3] = ids[..., 0]
    ids[1, :, 4] = ids[1, :, 0]
    hidden, matrix = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    return jnp.asarray(hidden, dtype), jnp.asarray(matrix, jnp.float32), jnp.asarray(ids, jnp.int32)


@functools.partial(jax.jit, static_argnames=("chunk", "temperature", "k", "usable"))
def read(hidden, matrix, ids, **how):
    return read_head(hidden, matrix, ids, **how)


def by_loops(hidden, matrix, ids, temperature):
    """Shifted logits of the ids, log-sum-exp, entropy and all log-probs of every position, in float64."""
    hidden, matrix = np.asarray(hidden, np.float64), np.asarray(matrix, np.float64)
    logits, lse, entropy = np.zeros(ids.shape), np.zeros(ids.shape[:2]), np.zeros(ids.shape[:2])
    logprobs = np.zeros((*ids.shape[:2], matrix.shape[1]))
    for b, t in np.ndindex(*ids.shape[:2]):
        z = [sum(hidden[b, t, d] * matrix[d, v] for d in range(len(matrix))) for v in range(matrix.shape[1])]
        z = np.array(z) / temperature
        z -= z.max()
        lse[b, t] = np.log(np.exp(z).sum())
        logprobs[b, t] = z - lse[b, t]
        entropy[b, t] = -sum(np.exp(x) * x for x in logprobs[b, t])
        logits[b, t] = [z[v] for v in np.asarray(ids)[b, t]]
    return logits, lse, entropy, logprobs


@pytest.mark.parametrize(("chunk", "temperature"), CASES)
def test_it_says_what_loops_say(chunk, temperature):
    hidden, matrix, ids = arrays()
    logits, lse, entropy, _ = by_loops(hidden, matrix, ids, temperature)
    got, asked = read(hidden, matrix, ids, chunk=chunk, temperature=temperature)
    np.testing.assert_array_equal(asked, ids)
    np.testing.assert_allclose(got.logits, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.logsumexp, lse, rtol=1e-5)
    np.testing.assert_allclose(got.entropy, entropy, rtol=1e-5, atol=1e-6)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}


def test_large_logits_keep_their_digits():
    """In eighths every logit is exact, and what is left of 4096 + log-sum-exp is not."""
    hidden, matrix, ids = arrays()
    hidden, matrix = jnp.round(8 * hidden).at[..., 0].set(8) / 8, jnp.round(8 * matrix) / 8
    common = matrix.at[0].add(4096.0)  # the same for every id
    got, _ = read(hidden, common, ids, chunk=8)
    *_, logprobs = by_loops(hidden, common, ids, 1.0)
    want = np.take_along_axis(logprobs, np.asarray(ids), -1)
    np.testing.assert_allclose(got.logprobs, want, rtol=1e-6, atol=1e-6)
    loss = lambda h: jnp.sum(read(h, common, ids, chunk=8)[0].logprobs[..., 0])  # noqa: E731
    of_logits = jax.jit(jax.grad(loss))(hidden)
    of_z = np.eye(V)[ids[..., 0]] - np.exp(logprobs)
    # Against the matrix as it was: what is common has no gradient.
    np.testing.assert_allclose(of_logits[..., 1:], (of_z @ np.asarray(matrix).T)[..., 1:], atol=1e-5)


def test_the_likeliest_ids():
    hidden, matrix, ids = arrays()
    *_, logprobs = by_loops(hidden, matrix, ids, 1.3)
    for usable in (None, 20, 6):
        got, all_ids = read(hidden, matrix, ids, chunk=5, temperature=1.3, k=6, usable=usable)
        want = np.argsort(-logprobs[..., :usable], axis=-1, kind="stable")[..., :6]
        np.testing.assert_array_equal(all_ids, np.concatenate([ids, want], -1))
        np.testing.assert_allclose(
            got.logprobs, np.take_along_axis(logprobs, np.asarray(all_ids), -1), rtol=1e-5, atol=1e-5
        )
    assert all_ids.dtype == jnp.int32


def test_the_lowest_id_comes_first_among_equals():
    hidden, matrix, ids = arrays()
    equal = matrix.at[:, jnp.arange(3, V, 7)].set(5 * matrix[:, :1])
    *_, logprobs = by_loops(hidden, equal, ids, 1.0)
    _, all_ids = read(hidden, equal, ids, chunk=8, k=9)
    want = np.argsort(-logprobs.round(9), axis=-1, kind="stable")[..., :9]
    np.testing.assert_array_equal(all_ids[..., 5:], want)


def test_an_id_outside_the_vocabulary_is_no_number():
    hidden, matrix, ids = arrays()
    ids = ids.at[0, 0, 1].set(V).at[2, 3, 2].set(-1)
    odd = (np.asarray(ids) < 0) | (np.asarray(ids) >= V)

    def loss(hidden, matrix):
        logits = read(hidden, matrix, ids, chunk=8)[0].logits
        return jnp.sum(jnp.where(odd, 0.0, logits) ** 2), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, matrix)
    np.testing.assert_array_equal(np.isnan(logits), odd)
    assert all(np.isfinite(x).all() for x in gradients)


def naive(hidden, matrix, ids, temperature):
    z = jnp.einsum("btd,dv->btv", hidden, matrix) / temperature
    z = z - jax.lax.stop_gradient(z.max(-1, keepdims=True))
    return jnp.take_along_axis(z, ids, -1), jax.nn.logsumexp(z, axis=-1)


def weighing(logits, logsumexp, weights):
    """A loss in which every output counts differently, and not linearly."""
    of_logits, of_lse = weights
    return jnp.sum(of_logits * jnp.sin(logits)) + jnp.sum(of_lse * jnp.cos(logsumexp))


WEIGHTS = [np.random.default_rng(1).normal(size=shape).astype(np.float32) for shape in ((B, T, 5), (B, T))]


def close(got, want, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


@pytest.mark.parametrize(("chunk", "temperature"), CASES)
def test_its_gradient_is_that_of_the_naive_softmax(chunk, temperature):
    hidden, matrix, ids = arrays()

    def loss(hidden, matrix):
        got, _ = read(hidden, matrix, ids, chunk=chunk, temperature=temperature)
        return weighing(got.logits, got.logsumexp, WEIGHTS)

    def want(hidden, matrix):
        return weighing(*naive(hidden, matrix, ids, temperature), WEIGHTS)

    close(
        jax.jit(jax.grad(loss, (0, 1)))(hidden, matrix), jax.jit(jax.grad(want, (0, 1)))(hidden, matrix), 1e-5
    )


def test_the_gradient_of_a_tied_matrix_reaches_the_embedding():
    hidden, matrix, ids = arrays()
    embed = matrix.T

    def loss(embed):
        got, _ = read(hidden, embed.T, ids, chunk=8)
        return jnp.sum(WEIGHTS[0] * got.logprobs) + jnp.sum(embed[ids[..., 0]] ** 2)

    def want(embed):
        logits, logsumexp = naive(hidden, embed.T, ids, 1.0)
        return jnp.sum(WEIGHTS[0] * (logits - logsumexp[..., None])) + jnp.sum(embed[ids[..., 0]] ** 2)

    close(jax.jit(jax.grad(loss))(embed), jax.jit(jax.grad(want))(embed), 1e-5)


def test_its_gradient_is_that_of_differences():
    hidden, matrix, ids = arrays()

    # The largest logit is a constant to the gradient, so only log-probs are differences' business.
    def logprobs(hidden, matrix):
        return read(hidden, matrix, ids[:1, :3], chunk=2, temperature=1.4)[0].logprobs

    check_grads(logprobs, (hidden[:1, :3], matrix), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_the_likeliest_have_a_gradient_and_the_entropy_has_none():
    hidden, matrix, ids = arrays()

    def loss(hidden):
        got, all_ids = read(hidden, matrix, ids, chunk=8, k=4)
        return jnp.sum(jnp.sin(got.logprobs[..., 5:])), all_ids[..., 5:]

    def want(hidden, likeliest):
        logits, logsumexp = naive(hidden, matrix, likeliest, 1.0)
        return jnp.sum(jnp.sin(logits - logsumexp[..., None]))

    gradient, likeliest = jax.jit(jax.grad(loss, has_aux=True))(hidden)
    close(gradient, jax.jit(jax.grad(want))(hidden, likeliest), 1e-5)
    entropy = lambda h, w: jnp.sum(read(h, w, ids, chunk=8)[0].entropy)  # noqa: E731
    for x in jax.jit(jax.grad(entropy, (0, 1)))(hidden, matrix):
        np.testing.assert_array_equal(x, 0)


def test_every_product_is_accumulated_in_float32():
    """Said in the program: a CPU may keep more digits than it was asked for."""
    given = arrays(dtype=jnp.bfloat16)
    loss = lambda h, w, i: jnp.sum(read_head(h, w, i, chunk=8)[0].logprobs)  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*given))
    assert re.findall(r":(\w+)\[[\d,]*\] = dot_general", program) == ["f32"] * 4


@pytest.mark.parametrize("chunk", [512, 8])
def test_bfloat16_is_rounded_where_it_says(chunk):
    """Logits and sums in float32; the logits' gradient rounded once, by up to 2^-8 of itself."""
    hidden, matrix, ids = arrays(dtype=jnp.bfloat16)
    seen = np.asarray(matrix.astype(jnp.bfloat16), np.float64)  # the matrix as the products see it
    logits, lse, entropy, logprobs = by_loops(hidden, seen, ids, 0.7)
    got, _ = read(hidden, matrix, ids, chunk=chunk, temperature=0.7)
    np.testing.assert_allclose(got.logits, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.logsumexp, lse, rtol=1e-5)
    np.testing.assert_allclose(got.entropy, entropy, rtol=1e-5, atol=1e-6)

    def loss(hidden, matrix):
        got, _ = read(hidden, matrix, ids, chunk=chunk, temperature=0.7)
        return jnp.sum(WEIGHTS[0] * got.logits) + jnp.sum(WEIGHTS[1] * got.logsumexp)

    of_hidden, of_matrix = jax.jit(jax.grad(loss, (0, 1)))(hidden, matrix)
    assert (of_hidden.dtype, of_matrix.dtype) == (jnp.bfloat16, jnp.float32)
    of_z = np.exp(logprobs) * WEIGHTS[1][..., None]
    for b, t, k in np.ndindex(*ids.shape):
        of_z[b, t, ids[b, t, k]] += WEIGHTS[0][b, t, k]
    of_z /= 0.7
    h, tiny = np.asarray(hidden, np.float64), 2**-8 * 1.01
    want = np.einsum("btd,btv->dv", h, of_z)
    bound = np.einsum("btd,btv->dv", np.abs(h), np.abs(of_z)) * tiny
    assert (np.abs(of_matrix - want) <= bound).all()
    want = np.einsum("btv,dv->btd", of_z, seen)
    bound = np.einsum("btv,dv->btd", np.abs(of_z), np.abs(seen)) * tiny
    assert (np.abs(np.asarray(of_hidden, np.float64) - want) <= bound + 2**-8 * np.abs(want)).all()


def test_the_matrix_gradient_is_summed_in_float32_over_chunks():
    """1 + 4096 x 2^-10: the small ones are lost one by one in a bfloat16 sum."""
    hidden = jnp.full((1, 4097, 1), 2**-10, jnp.bfloat16).at[0, 0].set(1.0)
    ids = jnp.zeros((1, 4097, 1), jnp.int32)
    for dtype, want in ((jnp.float32, 5.0), (jnp.bfloat16, 5.0)):
        matrix = jnp.zeros((1, 2), dtype)
        loss = lambda w: jnp.sum(read(hidden, w, ids, chunk=1)[0].logits)  # noqa: E731
        gradient = jax.jit(jax.grad(loss))(matrix)
        assert gradient.dtype == dtype
        np.testing.assert_array_equal(np.asarray(gradient, np.float32), [[want, 0.0]])


@pytest.mark.parametrize(("chunk", "dtype"), [(512, jnp.float32), (8, jnp.float32), (8, jnp.bfloat16)])
def test_a_gradient_changes_no_bit_of_the_value(chunk, dtype):
    hidden, matrix, ids = arrays(dtype=dtype)

    def loss(hidden, matrix):
        got, _ = read_head(hidden, matrix, ids, chunk=chunk)
        return jnp.sum(got.logprobs**2) + jnp.sum(got.logsumexp), got

    alone = jax.jit(lambda h, w: read_head(h, w, ids, chunk=chunk)[0])(hidden, matrix)
    first = jax.jit(lambda h, w: read_head(h, w, ids[..., :1], chunk=chunk)[0].logprobs)(hidden, matrix)
    (_, beside), _ = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, matrix)
    jax.tree.map(np.testing.assert_array_equal, alone, beside)
    np.testing.assert_array_equal(first, beside.logprobs[..., :1])


def test_memory_grows_with_the_chunk_and_with_nothing_else():
    size, width = 151_936, 16

    def temporary(rows, length, chunk):
        def loss(hidden, matrix, ids):
            return jnp.sum(read_head(hidden, matrix, ids, chunk=chunk)[0].logprobs ** 2)

        shapes = (
            ((rows, length, width), jnp.bfloat16),
            ((width, size), jnp.float32),
            ((rows, length, 9), jnp.int32),
        )
        given = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(2, 128, 64), temporary(8, 512, 64)
    everything = 4 * size * (8 * 512 - 2 * 128)  # bytes of the logits that the longer one has more
    assert long - short < everything / 1000
    # One chunk's logits and their gradient, and the matrix with what its gradient is summed in.
    assert long < 3 * 4 * size * 64 + 3 * 4 * size * width
    double = temporary(8, 512, 128)
    assert 0.9 < (double - long) / (2 * 4 * size * 64) < 1.3
