"""The vocabulary head on meshes: the same numbers, and no more communication than it says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from opd_jax.errors import InputError
from opd_jax.model import Qwen3Config, init_params, make_mesh, param_shardings, readout
from opd_jax.model.forward import logits
from opd_jax.model.head import read_head
from opd_jax.model.sharding import batch_sharding, partition
from opd_jax.rollout import Request, make_rows, make_sampler, sample

# No two alike, nor their parts on any mesh, so that a shape says what it is of.
B, T, D, V, K = 8, 7, 20, 88, 3
MESHES = [(8, 1, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2)]


def arrays():
    """Equal logits at 7 and 7 + 22 i, in the different slices of four, which are the likeliest."""
    rng = np.random.default_rng(0)
    hidden, matrix = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    matrix[:, 7::22] = 3 * matrix[:, 7:8]
    ids = rng.integers(V, size=(B, T, K))
    ids[..., 2] = ids[..., 0]
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(matrix, jnp.float32), jnp.asarray(ids, jnp.int32)


def outcome(hidden, matrix, ids, k=6, usable=70):
    """A loss of every output, the outputs, and both gradients."""

    def loss(hidden, matrix):
        got, all_ids = read_head(hidden, matrix, ids, chunk=4, temperature=0.7, k=k, usable=usable)
        value = jnp.sum(jnp.sin(got.logits)) + jnp.sum(jnp.cos(got.logsumexp)) + jnp.sum(got.entropy)
        return value, (got, all_ids)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, matrix)


def close(got, want, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(np.asarray(a), b, rtol=rtol, atol=rtol * max(1e-6, np.abs(b).max()))


@pytest.fixture(scope="module", params=MESHES, ids=str)
def program(request):
    """The head and its gradient compiled for a mesh, and its inputs in their places."""
    mesh = make_mesh(*request.param)
    names = ("batch", "length", "width"), ("embed", "vocab"), ("batch", "length", "support")
    places = tuple(jax.NamedSharding(mesh, partition(*axes)) for axes in names)
    with jax.set_mesh(mesh):
        given = jax.device_put(arrays(), places)
        compiled = jax.jit(outcome).lower(*given).compile()
    return mesh, compiled, given


def test_every_mesh_says_the_same(program):
    _, compiled, given = program
    got, want = compiled(*given), jax.jit(outcome)(*(np.asarray(x) for x in arrays()))
    np.testing.assert_array_equal(got[0][1][1], want[0][1][1])  # the ids, those of equal logits too
    close(got, want)


def computations(text):
    """The lines of every computation of a compiled program, by name; the entry is ENTRY."""
    found, name = {}, ""
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = "ENTRY" if match[1] else match[2]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def lines_within(found, name):
    """Lines of a computation and of all that it calls."""
    lines = list(found[name])
    for line in found[name]:
        for called in re.findall(r"(?:calls|to_apply|body|condition|true_computation)=%?([\w.-]+)", line):
            lines += lines_within(found, called)
    return lines


COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


def collectives(lines):
    """What is communicated, as (operation, shape of one result), pairs of arrays taken apart."""
    return [
        (match[2], tuple(int(n) for n in shape.split(",") if n))
        for line in lines
        if (match := COLLECTIVE.search(line))
        for shape in re.findall(r"\w+\[([\d,]*)\]", match[1])
    ]


def test_the_head_is_gathered_once_and_loops_are_silent(program):
    mesh, compiled, _ = program
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    found = computations(compiled.as_text())
    loops = [
        body for lines in found.values() for line in lines for body in re.findall(r"body=%?([\w.-]+)", line)
    ]
    assert len(loops) >= 2 or mesh.shape["data"] == 8
    for body in loops:
        assert collectives(lines_within(found, body)) == []
    told = collectives(found["ENTRY"])
    wide = [(name, shape) for name, shape in told if set(shape) & {V, V // 2, V // 4}]
    gathered = [(name, shape) for name, shape in wide if name == "all-gather"]
    # Once for the forward and the backward pass together, the vocabulary still split.
    assert gathered == ([("all-gather", (D, V // tensor))] if fsdp > 1 else [])
    # Beside it only the matrix's gradient has a dimension of the vocabulary, without one of positions.
    summed = [(name, shape) for name, shape in wide if name != "all-gather"]
    assert {shape for _, shape in summed} <= {(D, V // tensor), (D // fsdp, V // tensor)}
    assert sum(name == "reduce-scatter" for name, _ in summed) == (fsdp > 1)


def test_gradients_lie_where_their_arrays_do(program):
    mesh, compiled, given = program
    _, (_, of_matrix) = compiled(*given)
    assert of_matrix.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("fsdp", "tensor")), 2)


@pytest.mark.parametrize("usable", [66, 30, 22, 10])
def test_padding_may_begin_anywhere(usable):
    """On a border of two of the four slices, within one, and where most slices have nothing usable."""
    hidden, matrix, ids = arrays()
    read = lambda *x: read_head(*x, chunk=16, k=9, usable=usable)[1]  # noqa: E731
    want = jax.jit(read)(hidden, matrix, ids)
    assert int(want[..., K:].max()) < usable
    with jax.set_mesh(make_mesh(1, 2, 4)):
        np.testing.assert_array_equal(jax.jit(read)(hidden, matrix, ids), want)


def test_more_candidates_than_a_slice_has():
    hidden, matrix, ids = arrays()
    read = lambda *x: read_head(*x, chunk=16, k=60)  # noqa: E731
    (want, want_ids), mesh = jax.jit(read)(hidden, matrix, ids), make_mesh(1, 2, 4)
    with jax.set_mesh(mesh):
        got, got_ids = jax.jit(read)(hidden, matrix, ids)
    np.testing.assert_array_equal(got_ids, want_ids)
    close(got, want)


def test_an_id_outside_every_slice_is_no_number():
    hidden, matrix, ids = arrays()
    ids = ids.at[0, 0, 1].set(V).at[5, 3, 2].set(-1)
    with jax.set_mesh(make_mesh(1, 2, 4)):
        got = jax.jit(lambda *x: read_head(*x, chunk=16)[0].logits)(hidden, matrix, ids)
    np.testing.assert_array_equal(np.isnan(got), (np.asarray(ids) < 0) | (np.asarray(ids) >= V))


def test_a_mesh_of_one_changes_no_bit():
    given = arrays()
    want = jax.jit(outcome)(*given)
    with jax.set_mesh(make_mesh(1, 1, 1)):
        got = jax.jit(outcome)(*given)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_rows_that_do_not_split_are_refused():
    hidden, matrix, ids = arrays()
    with jax.set_mesh(make_mesh(2, 2, 2)), pytest.raises(InputError, match="batch is 6, mesh dataxfsdp = 4"):
        read_head(hidden[:6], matrix, ids[:6], chunk=16)


@pytest.mark.parametrize("mapped", ["shard_map", "shard_map unchecked", "pmap"])
def test_within_a_map_over_rows_it_is_each_devices_own(mapped):
    """Rows are split, the matrix is not, and its gradient is the mean over the devices."""
    hidden, matrix, ids = arrays()

    def part(matrix, hidden, ids):
        def loss(matrix):
            return jnp.sum(read_head(hidden, matrix, ids, chunk=4)[0].logprobs ** 2)

        value, gradient = jax.value_and_grad(lambda m: jax.lax.pmean(loss(m), "rows"))(matrix)
        return value, jax.lax.pmean(gradient, "rows")

    def whole(matrix):
        return jnp.sum(read_head(hidden, matrix, ids, chunk=4)[0].logprobs ** 2) / 4

    if mapped == "pmap":
        halves = [x.reshape(4, 2, *x.shape[1:]) for x in (hidden, ids)]
        step = jax.pmap(part, axis_name="rows", in_axes=(None, 0, 0), devices=jax.devices()[:4])
        got = jax.tree.map(lambda x: x[0], step(matrix, *halves))
    else:
        mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
        step = jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(P(), P("rows"), P("rows")),
            out_specs=P(),
            check_vma=mapped == "shard_map",
        )
        got = jax.jit(step)(matrix, hidden, ids)
    close(got, jax.jit(jax.value_and_grad(whole))(matrix))


@pytest.fixture(scope="module")
def model():
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=36,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=6,
        tie_word_embeddings=True,
        eos_token_id=0,
        head_chunk=16,
    )
    return config, jax.jit(lambda key: init_params(config, key))(jax.random.key(1))


def test_a_whole_tied_model_on_a_mesh(model):
    """Value and every gradient; and no gather of a vocabulary with rows or positions in it."""
    config, params = model
    rng = np.random.default_rng(0)
    rows = make_rows([rng.integers(V, size=3)] * B, [rng.integers(V, size=n) for n in range(1, 9)], 11)
    ids = np.concatenate([rows.targets[..., None], rng.integers(V, size=(*rows.targets.shape, 2))], -1)

    def loss(params, rows, ids):
        told = readout(params, rows, ids, config, temperature=1.2)
        return jnp.sum(jnp.sin(told.logprobs) * rows.mask[..., None]), told

    step = jax.value_and_grad(loss, has_aux=True)
    want, want_gradient = jax.jit(step)(params, rows, ids)
    mesh = make_mesh(1, 2, 4)
    placed, batch = param_shardings(config, mesh), batch_sharding(mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, in_shardings=(placed, batch, batch), out_shardings=(None, placed))
        given = jax.device_put(params, placed), *jax.device_put((rows, ids), batch)
        compiled = jitted.lower(*given).compile()
        got, got_gradient = compiled(*given)
    close(got, want)
    close(got_gradient, want_gradient)
    vocabulary, width = {V, V // 2, V // 4}, {D, D // 2}
    for name, shape in collectives(compiled.as_text().splitlines()):
        if name == "all-gather" and set(shape) & vocabulary:
            assert set(shape) <= vocabulary | width, shape


def test_logits_of_single_positions_on_a_mesh(model):
    """As the sampler reads them."""
    config, params = model
    hidden = np.random.default_rng(2).normal(size=(B, 1, D)).astype(np.float32)
    mesh, read = make_mesh(1, 2, 4), lambda p, h: logits(h, p, config)
    placed = jax.device_put(params, param_shardings(config, mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(read)(placed, hidden)
    close(got, jax.jit(read)(params, hidden))


@pytest.mark.slow
def test_the_sampler_draws_the_same_on_a_mesh(model):
    config, params = model
    sampler = make_sampler(
        config, slots=B, max_prompt=3, max_response=5, temperature=1.0, top_p=0.9, usable=80
    )
    wanted = [Request([1 + i, 2 + i], i, 0) for i in range(B)]

    def drawn(params):
        found = sample(sampler, params, wanted, jax.random.key(3))
        return [(list(one.ids), one.logprobs) for one in found]

    want, mesh = drawn(params), make_mesh(1, 2, 4)
    placed = jax.device_put(params, param_shardings(config, mesh))
    with jax.set_mesh(mesh):
        got = drawn(placed)
    assert [ids for ids, _ in got] == [ids for ids, _ in want]
    close([x for _, x in got], [x for _, x in want])
