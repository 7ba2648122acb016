"""Attention within the sequences of a row, against loops, and what cuDNN is told to compute."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.model import make_mesh
from opd_jax.model.attention import (
    Blocks,
    attention,
    block_attention,
    cache_mask,
    causal_mask,
    row_attention,
)
from tests.conftest import said_by_a_program

# Two and a half sequences and padding; one sequence that fills its row; one with padding; padding alone.
PACKED = [[1, 1, 1, 2, 3, 3, 3, 0, 0], [1] * 9]
PADDED = [[1] * 9, [1, 1, 1, 1, 0, 0, 0, 0, 0], [0] * 9]


def arrays(rows, length, heads=4, kv_heads=2, width=6, dtype=jnp.float32, seed=0):
    """Query, key, value and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    sizes = heads, kv_heads, kv_heads, heads
    return [jnp.asarray(rng.normal(size=(rows, length, n, width)), dtype) for n in sizes]


def loop(query, key, value, ids):
    """Attention as its definition says it, position by position in float64."""
    query, key, value, ids = (np.asarray(x).astype(np.float64) for x in (query, key, value, ids))
    rows, length, heads, width = query.shape
    group = heads // key.shape[2]
    out = np.zeros(query.shape)
    for b in range(rows):
        for t in range(length):
            seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t]]
            for n in range(heads):
                scores = [query[b, t, n] @ key[b, s, n // group] / math.sqrt(width) for s in seen]
                shares = np.exp(np.array(scores) - max(scores))
                shares /= shares.sum()
                for share, s in zip(shares, seen, strict=True):
                    out[b, t, n] += share * value[b, s, n // group]
    return out


@pytest.mark.parametrize("ids", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_xla_attention_equals_a_loop(ids, kv_heads):
    query, key, value, _ = arrays(len(ids), 9, kv_heads=kv_heads)
    got = row_attention(query, key, value, jnp.asarray(ids), "xla")
    np.testing.assert_allclose(got, loop(query, key, value, ids), atol=2e-6)


def test_xla_attention_is_the_masked_one_to_the_bit():
    query, key, value, _ = arrays(2, 9, dtype=jnp.bfloat16)
    ids = jnp.asarray(PACKED)
    got = jax.jit(row_attention, static_argnums=4)(query, key, value, ids, "xla")
    want = jax.jit(lambda *x: attention(*x, causal_mask(ids)))(query, key, value)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("dtype", "scale", "atol"), [("float32", 1, 2e-6), ("float32", 100, 2e-4), ("bfloat16", 1, 0.03)]
)
@pytest.mark.parametrize("positions", [[[3], [11], [12]], [[0, 1, 2, 3], [2, 9, 4, 0], [20, 21, 22, 23]]])
def test_attention_in_blocks_is_attention(positions, dtype, scale, atol):
    positions = jnp.asarray(positions)
    query = scale * arrays(3, positions.shape[1], dtype=dtype)[0]
    _, key, value, _ = arrays(3, 24, dtype=dtype, seed=1)
    mask = cache_mask(positions, 24)
    want = attention(query, key, value, mask)
    assert want.dtype == dtype
    for size in (1, 4, 24):
        past = (x.swapaxes(1, 2) for x in (key, value))
        got = block_attention(query, *past, mask, Blocks(size, 24 // size))
        assert got.dtype == dtype
        np.testing.assert_allclose(np.float32(got), np.float32(want), atol=atol)


def test_blocks_beyond_the_last_position_change_no_bit():
    said_by_a_program("tests.model.block_bits")  # other optimisations would add up otherwise


def test_an_unknown_kernel_is_no_kernel():
    with pytest.raises(ValueError, match="xla, cudnn or splash: got 'auto'"):
        row_attention(*arrays(2, 9)[:3], jnp.asarray(PACKED), "auto")


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """What cuDNN is asked for, computed by XLA, which takes the same arguments to mean the same.

    Beyond a row's length it leaves NaN: cuDNN does not say what it leaves there.
    """
    ask = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        if implementation == "xla":
            return ask(*args, implementation="xla", **kwargs)
        out, logsumexp = ask(*args, implementation="xla", **kwargs)
        inside = jnp.arange(out.shape[1]) < kwargs["query_seq_lengths"][:, None]
        return jnp.where(inside[..., None, None], out, jnp.nan), logsumexp

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)


def test_cudnn_is_told_the_lengths_of_padded_rows(cudnn_by_xla):
    query, key, value, seed = arrays(3, 9)
    ids = jnp.asarray(PADDED)
    # Nothing reads padding, so no cotangent comes from it; the row of padding alone is computed as full.
    read = jnp.asarray([[True] * 9, [True] * 4 + [False] * 5, [True] * 9])[..., None, None]

    def outputs(kernel):
        out, pull = jax.vjp(lambda *x: row_attention(*x, ids, kernel), query, key, value)
        return jnp.where(read, out, 0), pull(jnp.where(read, seed, 0))

    (got, got_gradient), (want, want_gradient) = outputs("cudnn"), outputs("xla")
    np.testing.assert_allclose(got, want, atol=1e-6)
    for a, b in zip(got_gradient, want_gradient, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("ids", [PACKED[0], [0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 1, 1, 1]])
def test_cudnn_gives_nan_where_it_would_attend_across(cudnn_by_xla, ids):
    query, key, value, _ = arrays(2, 9)
    got = row_attention(query, key, value, jnp.asarray([ids, PADDED[1]]), "cudnn")
    assert jnp.isnan(got[0]).all()
    assert jnp.isfinite(got[1]).all()
    assert (got[1, 4:] == 0).all()


def cuda_program(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def cudnn_calls(program):
    """Name, operands and the rest of every call, as the program spells them."""
    return re.findall(r"custom_call @(__cudnn\$\w+)\((.*?)\) \{(.*)", program)


def test_cudnn_is_called_with_lengths_and_without_a_mask(monkeypatch):
    private = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91_200)  # a CPU build holds none
    length = 48
    query, key, value, _ = arrays(4, length, width=64, dtype=jnp.bfloat16)
    ids = jnp.ones((4, length), jnp.int32)

    def loss(*args):
        return row_attention(*args, "cudnn").astype(jnp.float32).sum()

    forward = cuda_program(lambda *args: row_attention(*args, "cudnn"), query, key, value, ids)
    backward = cuda_program(jax.grad(loss, argnums=(0, 1, 2)), query, key, value, ids)
    for program in (forward, backward):
        assert "PADDING_CAUSAL" in program
        assert "Bias" not in program
        assert f"{length}x{length}" not in program
    (alone,), (inside, gradient) = cudnn_calls(forward), cudnn_calls(backward)
    assert alone[0] == "__cudnn$fmhaSoftmax"
    assert gradient[0] == "__cudnn$fmhaSoftmaxBackward"
    for _, operands, _ in (alone, inside, gradient):
        queries, keys = operands.split(", ")[-2:]
        assert queries == keys  # one length, of queries and of keys
    # The forward pass is one and the same, whether a gradient is taken or not.
    assert alone[2] == inside[2]

    with jax.set_mesh(make_mesh(2, 2, 2)):
        sharded = cuda_program(jax.grad(loss, argnums=(0, 1, 2)), query, key, value, ids)
    for _, _, call in cudnn_calls(sharded):
        # One row, two query heads, one key-value head and one length on each device.
        assert "(tensor<1x48x2x64xbf16>, tensor<1x48x1x64xbf16>, tensor<1x48x1x64xbf16>" in call
        assert "tensor<1xi32>, tensor<1xi32>)" in call


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "width"), [(64, 64), (200, 128), (1024, 128)])
def test_cudnn_equals_xla(length, width):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    rows = 4
    query, key, value, seed = arrays(rows, length, heads=8, width=width, dtype=jnp.bfloat16)
    lengths = jnp.asarray([length, length // 2 + 1, 1, 0])
    ids = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
    read = (ids > 0)[..., None, None]

    def outputs(kernel, *qkv):
        out, pull = jax.vjp(lambda *x: row_attention(*x, ids, kernel), *qkv)
        return out, pull(jnp.where(read, seed, 0).astype(out.dtype))

    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    want, want_gradient = jax.jit(outputs, static_argnums=0)("xla", *wide)
    got, got_gradient = jax.jit(outputs, static_argnums=0)("cudnn", query, key, value)
    alone = jax.jit(row_attention, static_argnums=4)(query, key, value, ids, "cudnn")
    np.testing.assert_array_equal(got, alone)
    assert jnp.isfinite(got).all()
    got, want = (jnp.where(read, got, 0), *got_gradient), (jnp.where(read, want, 0), *want_gradient)
    for a, b in zip(got, want, strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float32) / scale, b / scale, atol=1e-2)
