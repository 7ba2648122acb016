"""Splash attention against the plain one: interpreted where there is no TPU, and compiled for one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding

from opd_jax.errors import InputError
from opd_jax.model import make_mesh, splash, token_logprobs
from opd_jax.model.attention import row_attention
from opd_jax.model.sharding import MESH_AXES, partition
from opd_jax.rollout import Request, make_rows, make_sampler, sample
from tests.model.test_attention import arrays


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel as plain JAX, in tiles of 128."""
    monkeypatch.setattr(splash, "LARGEST_BLOCK", 128)
    by_jax = functools.partial(splash.splash_attention, interpret=True)
    monkeypatch.setattr(splash, "splash_attention", by_jax)


def rows_of(*lengths_of_sequences, length):
    """Sequence ids [B, T] of rows that hold sequences of these lengths, then padding."""
    ids = np.zeros((len(lengths_of_sequences), length), np.int32)
    for row, lengths in zip(ids, lengths_of_sequences, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return jnp.asarray(ids)


def outputs(kernel, ids, query, key, value, seed):
    out, pull = jax.vjp(lambda *x: row_attention(*x, ids, kernel), query, key, value)
    return out, *pull(seed)


@pytest.mark.parametrize(
    ("tiles", "dtype", "atol"),
    [
        (2, jnp.float32, 3e-6),
        pytest.param(2, jnp.bfloat16, 2e-2, marks=pytest.mark.slow),
        pytest.param(5, jnp.float32, 3e-6, marks=pytest.mark.slow),
    ],
)
def test_splash_equals_xla_packed_and_padded(interpreted, tiles, dtype, atol):
    length = 128 * tiles
    # Borders of sequences inside a tile, on the border of tiles, and rows with padding or of nothing else.
    ids = rows_of([100, 28, 1, 60], [length], [], length=length)
    qkv = arrays(3, length, width=8, dtype=dtype)
    got = jax.jit(functools.partial(outputs, "splash"))(ids, *qkv)
    want = jax.jit(functools.partial(outputs, "xla"))(ids, *(x.astype(jnp.float32) for x in qkv))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float32) / scale, b / scale, atol=atol)
    alone = jax.jit(row_attention, static_argnums=4)(*qkv[:3], ids, "splash")
    np.testing.assert_array_equal(got[0], alone)  # the same forward pass, a gradient taken or not


def test_splash_keeps_the_dtype_of_the_query(interpreted):
    ids = rows_of([128], length=128)
    compute = functools.partial(row_attention, sequence_ids=ids, kernel="splash")
    for dtype in (jnp.bfloat16, jnp.float32):
        assert jax.eval_shape(compute, *arrays(1, 128, width=8, dtype=dtype)[:3]).dtype == dtype


def test_splash_in_the_layers_of_a_sharded_model(interpreted):
    """Made while tracing, in a rematerialised scan, over batch and heads of a mesh."""
    ids = rows_of([70, 50], [128], [90], [3, 4, 5], length=128)
    query, key, value, seed = arrays(4, 128, width=8)

    def loss(kernel, query, key, value):
        def layer(x, _):
            return row_attention(x, key, value, ids, kernel), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), query, length=2)
        return jnp.sum(x * seed)

    want = jax.jit(jax.grad(functools.partial(loss, "xla"), argnums=(0, 1, 2)))(query, key, value)
    mesh = make_mesh(2, 2, 2)
    queries, keys = (partition("batch", "length", name, "head_dim") for name in ("heads", "kv_heads"))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, s))
            for x, s in [(query, queries), (key, keys), (value, keys)]
        ]
        step = jax.jit(jax.grad(functools.partial(loss, "splash"), argnums=(0, 1, 2)))
        step = step.lower(*placed).compile()
        got = step(*placed)
    program = step.as_text()
    assert "all-gather" not in program
    assert "all-reduce" not in program
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_policy_can_save_what_the_kernel_leaves(interpreted):
    ids = rows_of([128], length=128)
    query, key, value, seed = arrays(1, 128, heads=2, width=8)

    def kernels(policy):
        compute = jax.checkpoint(lambda *x: row_attention(*x, ids, "splash"), policy=policy)
        gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(compute(*x)) * seed), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(query, key, value).compile().as_text().count(" while(")

    # An interpreted kernel is a loop. With the policy, the forward one is not run a second time.
    assert kernels(None) == 4
    assert kernels(jax.checkpoint_policies.save_only_these_names(splash.RESIDUALS)) == 3


@pytest.mark.parametrize(
    ("length", "size"),
    [(128, 128), (256, 256), (384, 384), (512, 512), (640, 128), (768, 384), (18_432, 512)],
)
def test_tiles_divide_the_row(length, size):
    assert splash.block_size(length) == size
    with pytest.raises(InputError, match=f"128 positions at a time: rows have {length + 1}; pad"):
        splash.block_size(length + 1)


@pytest.mark.slow
# A compiler without a device cannot read back what it put into the compile cache; it compiles again.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(512, 4, 2), (18_432, 16, 8)])
def test_splash_compiles_for_a_tpu(monkeypatch, length, heads, kv_heads):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.asarray(devices).reshape(2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)

    def abstract(axes, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition(*axes)))

    queries = ("batch", "length", "heads", "head_dim")
    keys = ("batch", "length", "kv_heads", "head_dim")
    key = abstract(keys, 2, length, kv_heads, 128)
    rows = (
        abstract(queries, 2, length, heads, 128),
        key,
        key,
        abstract(("batch", "length"), 2, length, dtype=jnp.int32),
    )

    def loss(query, key, value, ids):
        return jnp.sum(row_attention(query, key, value, ids, "splash").astype(jnp.float32))

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*rows).compile()
    program = compiled.as_text()
    calls = [line for line in program.splitlines() if "tpu_custom_call" in line]
    assert len(calls) == 3  # forward, keys and values, queries
    for call in calls:  # the one row of a shard, half of the heads
        assert f"bf16[{heads // 2},{length},128]" in call
        assert f"bf16[{kv_heads // 2},{length},128]" in call
    assert "all-gather" not in program
    # A head's scores alone would be 2 T^2 bytes.
    assert compiled.memory_analysis().temp_size_in_bytes < max(2 * length**2, 2**20)


def test_prompts_read_by_the_kernel_are_gone_on_from(interpreted, small):
    """Rollouts whose prompts the kernel read have the log-probs of whole rows, read without it."""
    config, params = small
    config = dataclasses.replace(config, attention="splash")
    sampler = make_sampler(
        config, slots=3, max_prompt=7, max_response=6, temperature=0.7, top_p=1.0, usable=config.vocab_size
    )
    prompts = [np.arange(1, 1 + length) for length in (7, 1, 4)]
    requests = [Request(ids, problem, 0) for problem, ids in enumerate(prompts)]
    drawn = list(sample(sampler, params, requests, jax.random.key(0)))
    rows = jax.tree.map(jnp.asarray, make_rows(prompts, [one.ids for one in drawn], 128))
    plain = dataclasses.replace(config, attention="xla")
    want = np.asarray(token_logprobs(params, rows, plain, temperature=0.7))
    for row, (prompt, one) in enumerate(zip(prompts, drawn, strict=True)):
        first = len(prompt) - 1
        np.testing.assert_allclose(one.logprobs, want[row, first : first + len(one.logprobs)], atol=1e-5)
