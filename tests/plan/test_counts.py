"""Operations and traffic of programs, against programs whose loops are written out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax.model import hidden_states, init_params, make_mesh, token_logprobs
from opd_jax.model.attention import attention, causal_mask, cudnn_attention
from opd_jax.model.moe import experts
from opd_jax.model.splash import splash_attention
from opd_jax.plan.collectives import collective_bytes
from opd_jax.plan.flops import program_flops
from opd_jax.types import Rows
from tests.model.test_sharding import DENSE, MIXTURE


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_product_by_hand():
    # [3, 4] x [4, 5]: 60 multiplies and 60 adds; batched twice as many.
    assert program_flops(lambda a, b: a @ b, abstract(3, 4), abstract(4, 5)) == 120
    assert program_flops(jnp.matmul, abstract(2, 3, 4), abstract(2, 4, 5)) == 240


def test_a_scan_counts_as_often_as_it_runs_and_remat_counts_again():
    def scanned(x, w):
        body = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None))
        return jnp.sum(jax.lax.scan(body, x, w)[0])

    def unrolled(x, w):
        for layer in w:
            x = jnp.sin(x @ layer)
        return jnp.sum(x)

    x, w = abstract(2, 8), abstract(5, 8, 8)
    assert program_flops(scanned, x, w) == program_flops(unrolled, x, w) == 5 * 2 * 2 * 8 * 8
    # Forward, forward again, and two products backward in each of five layers.
    assert program_flops(jax.grad(scanned, (0, 1)), x, w) == 4 * 5 * 256


def test_a_sharded_program_counts_all_its_devices():
    mesh = make_mesh(2, 2, 2)

    def on_device(x, w):
        return jax.lax.psum(x @ w, "tensor")

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            on_device, in_specs=(P(("data", "fsdp"), "tensor"), P("tensor")), out_specs=P(("data", "fsdp"))
        )
        assert program_flops(mapped, abstract(8, 6), abstract(6, 4)) == 2 * 8 * 6 * 4


def test_products_of_the_layers_are_those_that_the_compiler_counts():
    """Of one layer, which the compiler counts whole; it also counts what is no product."""
    config = dataclasses.replace(DENSE, num_hidden_layers=1, remat="none", hidden_size=96)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tokens = abstract(2, 32, dtype=jnp.int32)

    def loss(params, tokens):
        return jnp.sum(jnp.sin(hidden_states(params, tokens, config)[0]))

    step = jax.jit(jax.grad(loss))
    ours = program_flops(step, params, tokens)
    theirs = step.lower(params, tokens).compile().cost_analysis()["flops"]
    assert 0.85 * theirs < ours < theirs


@pytest.mark.parametrize("rows", [1, 2])
def test_products_of_an_attention_kernel_by_its_formula(rows):
    """Causal, so half of the scores: two products forward, three and four backward."""
    query, key = abstract(rows, 256, 4, 128), abstract(rows, 256, 2, 128)

    def loss(query, key, value, ids):
        return jnp.sum(splash_attention(query, key, value, ids))

    got = program_flops(jax.grad(loss, (0, 1, 2)), query, key, key, abstract(rows, 256, dtype=jnp.int32))
    kernels = (2 + 3 + 4) * 2 * rows * 4 * (256 * 256 // 2) * 128
    assert got == kernels + 2 * rows * 4 * 256 * 128  # and output times its gradient, outside of them


@pytest.fixture
def cudnn(monkeypatch):
    """JAX's cuDNN attention, traced without the GPU that it asks for before it is."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)


@pytest.mark.parametrize("rows", [1, 2])
def test_products_of_cudnn_attention_by_its_formula(cudnn, rows):
    """Causal, so half of the scores: two products forward, and five backward."""
    query, key = (abstract(rows, 256, heads, 128, dtype=jnp.bfloat16) for heads in (4, 2))
    args = query, key, key, abstract(rows, 256, dtype=jnp.int32)
    product = 2 * rows * 4 * (256 * 256 // 2) * 128
    assert program_flops(cudnn_attention, *args) == 2 * product
    whole = program_flops(lambda q, k, v, i: attention(q, k, v, causal_mask(i)), *args)
    assert whole == 2 * 2 * product  # without a kernel, what lies above the diagonal is computed too

    def loss(query, key, value, ids):
        return jnp.sum(cudnn_attention(query, key, value, ids).astype(jnp.float32))

    assert program_flops(jax.grad(loss, (0, 1, 2)), *args) == (2 + 5) * product


def test_products_of_cudnn_attention_without_a_mask_are_whole(cudnn):
    def attended(query, key, value, **more):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **more)

    query, key = (abstract(2, length, 4, 64, dtype=jnp.bfloat16) for length in (128, 256))
    assert program_flops(attended, query, key, key) == 2 * 2 * 2 * 4 * 128 * 256 * 64
    with pytest.raises(NotImplementedError, match="window"):
        program_flops(lambda q: attended(q, q, q, is_causal=True, local_window_size=(8, 0)), query)


def test_operations_of_an_unknown_kernel_are_not_taken_for_none():
    def called(x):
        return jax.ffi.ffi_call("products", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    with pytest.raises(NotImplementedError, match=r"ffi_call \(products\)"):
        program_flops(jax.jit(called), abstract(8, 8))

    def convolved(x, w):
        return jax.lax.conv_general_dilated(x, w, (1,), "SAME")

    with pytest.raises(NotImplementedError, match="conv_general_dilated"):
        program_flops(convolved, abstract(1, 2, 8), abstract(3, 2, 3))


def test_products_of_the_head_by_hand():
    """One product forward, one again and two for gradients backward, over padded chunks."""
    ids = abstract(2, 32, dtype=jnp.int32)
    rows = Rows(ids, ids, abstract(2, 32, dtype=jnp.bool_), ids, ids)

    def products(head_chunk, vocab):
        config = dataclasses.replace(DENSE, head_chunk=head_chunk, vocab_size=vocab)
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

        def loss(params, rows):
            return jnp.sum(jnp.sin(token_logprobs(params, rows, config)))

        return program_flops(jax.grad(loss), params, rows)

    # 64 positions of width 24, 40 more ids; in chunks of 16 as in one.
    for chunk in (64, 16):
        assert products(chunk, 80) - products(chunk, 40) == 4 * 2 * 64 * 24 * 40


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", 4),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['data'=1,'fsdp'=4,'tensor'=2] {'fsdp'}", 4),
        ("mesh['data'=2,'fsdp'=4,'tensor'=2], device_ids=[0,1] {'data','fsdp':(2)2}", 4),
        ("mesh['data'=1,'fsdp'=4,'tensor'=2] {'data'}", 1),
    ],
)
def test_devices_of_a_collective_in_every_form_that_xla_writes(groups, size):
    line = f"  %g = f32[8,8]{{1,0}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    text = "ENTRY %main (p: f32[2,8]) -> f32[8,8] {\n" + line + "\n}\n"
    assert collective_bytes(text).get("all-gather", 0) == 8 * 8 * 4 * (size - 1) // size


F1000, F250 = "f32[1000]{0:T(1024)S(1)}", "f32[250]{0:T(256)}"


@pytest.mark.parametrize(
    ("result", "call", "want"),
    [
        # Of four devices; sums go there and back.
        ("f32[1000]{0}", "all-reduce-start(%a)", 2 * 4000 * 3 // 4),
        (f"({F1000}, {F250}, {F1000})", "all-reduce-start(%a, %b, %c)", 2 * 9000 * 3 // 4),
        (f"({F250}, {F1000})", "all-gather-start(%a)", 4000 * 3 // 4),
        (f"(({F250}, {F250}), ({F1000}, {F1000}))", "all-gather-start(%a, %b)", 8000 * 3 // 4),
        (f"(({F1000}, {F1000}), ({F250}, {F250}))", "reduce-scatter-start(%a, %b)", 2000 * 3),
        (f"(({F1000}), {F250}, u32[]{{:S(2)}})", "reduce-scatter-start(%a)", 1000 * 3),
        (
            f"(({F1000}, /*index=1*/{F1000}), ({F1000}, {F1000}), u32[])",
            "all-to-all-start(%a, %b)",
            8000 * 3 // 4,
        ),
        (f"({F1000}, {F1000}, u32[]{{:S(2)}}, u32[])", "collective-permute-start(%a)", 4000),
        (f"(({F1000}, {F250}), ({F1000}, {F250}), u32[])", "collective-permute-start(%a, %b)", 5000),
    ],
)
def test_an_asynchronous_start_receives_all_of_its_results(result, call, want):
    line = f"  %s = {result} {call}, channel_id=1, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}"
    kind = call.partition("-start")[0]
    assert collective_bytes("ENTRY %m (p: f32[2]) -> f32[8] {\n" + line + "\n}\n") == {kind: want}


def test_devices_in_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="form not known"):
        collective_bytes("ENTRY %m (p: f32[2]) -> f32[8] {\n  %g = f32[8]{0} all-gather(%p), groups=x\n}\n")


@pytest.mark.parametrize("layers", [1, 4])
def test_traffic_of_a_loop_is_that_of_the_loop_written_out(layers):
    mesh = make_mesh(1, 4, 2)

    def body(x, w):
        w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        return jax.lax.psum(jnp.sin(x @ w), "tensor"), None

    def scanned(x, w):
        return jax.lax.scan(body, x, w)[0]

    def unrolled(x, w):
        for layer in range(layers):
            x, _ = body(x, w[layer])
        return x

    counts = []
    with jax.set_mesh(mesh):
        for function in (scanned, unrolled):
            mapped = jax.jit(
                jax.shard_map(
                    function, in_specs=(P("fsdp"), P(None, "fsdp")), out_specs=P("fsdp"), check_vma=False
                )
            )
            x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
            w = jax.ShapeDtypeStruct(
                (layers, 8, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))
            )
            counts.append(collective_bytes(mapped.lower(x, w).compile().as_text()))
    # Of 8 x 8 floats each of four devices lacks three quarters; of a sum over two, each half goes twice.
    want = {"all-gather": layers * 8 * 8 * 4 * 3 // 4, "all-reduce": layers * 2 * (2 * 8 * 4) // 2}
    assert counts == [want, want]


def test_one_collective_in_several_fusions_is_one_and_comes_with_every_trip():
    """As a TPU's compiler writes one that runs beside other work, in a loop of five."""

    def gather(channel, shape="f32[8,8]"):
        groups = f"channel_id={channel}, replica_groups=[1,4]<=[4], dimensions={{0}}"
        return f"  %g = {shape}{{1,0}} all-gather(%p), {groups}"

    fused = [f"%{name} (p: f32[2,8]) -> f32[8,8] {{\n{gather(7)}\n}}\n" for name in ("start", "step", "done")]
    body = "%body (p: f32[2,8]) -> f32[2,8] {\n" + "".join(
        f"  %{name} = f32[8,8] fusion(%p), kind=kCustom, calls=%{name}\n"
        for name in ("start", "step", "done")
    )
    ends = "%ends (p: s32[]) -> pred[] {\n  %c = s32[] constant(5)\n}\n"
    entry = (
        "ENTRY %main (p: f32[2,8]) -> f32[8,8] {\n"
        "  %w = f32[2,8] while(%p), condition=%ends, body=%body\n"
        + gather(8, "f32[4,8]")
        + "\n"
        + gather(8, "f32[4,8]").replace("%g", "%h")  # of one channel, as those of shard_map are, and another
        + "\n  %a = f32[8,8] fusion(%p), kind=kCustom, calls=%start\n"
        + "  %b = f32[8,8] call(%p), to_apply=%done\n}\n"
    )
    text = "".join(fused) + body + gather(9, "f32[16,8]") + "\n}\n" + ends + entry
    once = 8 * 8 * 4 * 3 // 4
    # Five trips of the split one and of one twice its size; in main two of half, one fused, one called.
    assert collective_bytes(text) == {"all-gather": 5 * (once + 2 * once) + 2 * (once // 2) + once + once}


@pytest.mark.parametrize("ways", [1, 2, 8])
def test_products_of_experts_are_those_of_the_rows_that_a_device_serves(ways):
    mesh = make_mesh(1, 8 // ways, 1, expert=ways)
    config = dataclasses.replace(MIXTURE, remat="none")
    layer = {
        "router": abstract(config.hidden_size, 8),
        "expert_gate": abstract(8, config.hidden_size, config.moe_intermediate_size),
        "expert_up": abstract(8, config.hidden_size, config.moe_intermediate_size),
        "expert_down": abstract(8, config.moe_intermediate_size, config.hidden_size),
    }
    x, valid = abstract(8, 16, config.hidden_size), abstract(8, 16, dtype=jnp.bool_)
    with jax.set_mesh(mesh):
        got = program_flops(lambda *a: experts(*a, config)[0], x, layer, valid)
    each = 2 * config.hidden_size * config.moe_intermediate_size
    assert got == 8 * 16 * (3 * config.num_experts_per_tok * each + 2 * config.hidden_size * 8)
