"""Rules: where things lie, what cannot be split, and that splitting changes no number."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from opd_jax.errors import InputError
from opd_jax.model import Qwen3Config, init_params, make_mesh, param_shardings, token_logprobs
from opd_jax.model.moe import routing_readings
from opd_jax.model.sharding import RULES, SPREAD, batch_sharding, partition
from opd_jax.model.vocab import readout
from opd_jax.rollout import make_rows


def test_the_rules_place_every_parameter(small):
    placed = param_shardings(small[0], make_mesh(2, 2, 2))
    assert placed["embed"].spec == P("tensor", "fsdp")
    assert placed["layers"]["query"].spec == P(None, "fsdp", "tensor", None)
    assert placed["layers"]["output"].spec == P(None, "tensor", None, "fsdp")
    assert placed["layers"]["down"].spec == P(None, "tensor", "fsdp")
    assert placed["norm"].spec == P(None)


def test_what_cannot_be_split_is_refused(small):
    with pytest.raises(InputError, match=r"kv_heads = 2, mesh tensor = 4"):
        param_shardings(small[0], make_mesh(1, 1, 4))
    with pytest.raises(InputError, match="needs 64"):
        make_mesh(4, 4, 4)
    with pytest.raises(InputError, match="an axis of a mesh must have a device: got -1 x 2 x 1 x 1"):
        make_mesh(-1, 2)


def test_a_mesh_without_devices_of_every_process_is_refused(monkeypatch):
    cluster = [SimpleNamespace(process_index=i // 4) for i in range(8)]
    with pytest.raises(InputError, match="has those of 1 of 2; let .* multiply to 8,"):
        make_mesh(2, 2, devices=cluster)  # of another cluster, to plan for
    monkeypatch.setattr(jax, "devices", lambda: cluster)
    with pytest.raises(InputError, match="has those of 1 of 2; let .* multiply to 8,"):
        make_mesh(2, 2)
    with pytest.raises(ValueError, match="one mesh axis"):
        partition("heads", "mlp")


# Every dimension divides by four; experts by their own axis.
DENSE = Qwen3Config(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=6,
    eos_token_id=0,
)
MIXTURE = dataclasses.replace(
    DENSE, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True
)
TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)


QUICK = [(DENSE, (2, 2, 2)), (MIXTURE, (2, 2, 2)), (MIXTURE, (1, 2, 2, 2)), (TIED, (1, 2, 4))]
REST = [
    *itertools.product((DENSE, MIXTURE), [(8, 1, 1), (2, 4, 1), (1, 2, 4)]),
    (MIXTURE, (1, 1, 1, 8)),
    (DENSE, (1, 1, 2, 2)),
]


@pytest.mark.parametrize(
    ("config", "shape"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else "mixture" if x.num_experts else "dense",
)
def test_sharded_equals_unsharded(config, shape):
    params = init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    rows = make_rows([rng.integers(40, size=3)] * 8, [rng.integers(40, size=n) for n in range(2, 10)], 12)

    def loss(params, rows):
        return jnp.sum(jnp.sin(token_logprobs(params, rows, config)) * rows.mask)

    want, want_gradient = jax.jit(jax.value_and_grad(loss))(params, rows)
    mesh = make_mesh(*shape)
    placed = param_shardings(config, mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(loss),
            in_shardings=(placed, batch_sharding(mesh)),
            out_shardings=(None, placed),
        )
        got, got_gradient = step(jax.device_put(params, placed), rows)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(want_gradient), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=1e-5)
    assert jax.tree.map(lambda x: x.sharding.spec, got_gradient) == jax.tree.map(lambda x: x.spec, placed)


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_a_model_that_is_only_read_may_be_spread_over_data_too(config):
    """The same log-probs, a share of the weights a device, and never all layers gathered at once."""
    config, mesh = dataclasses.replace(config, num_hidden_layers=32), make_mesh(4, 1, 2)
    params = init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    rows = make_rows([rng.integers(40, size=3)] * 8, [rng.integers(40, size=n) for n in range(2, 10)], 12)
    read = jax.jit(lambda params, rows: token_logprobs(params, rows, config))
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    told, share = {}, {}
    for name, rules in (("own", RULES), ("spread", SPREAD)):
        placed = jax.device_put(params, param_shardings(config, mesh, rules))
        share[name] = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed)) / whole
        with jax.set_mesh(mesh):
            split = jax.device_put(rows, batch_sharding(mesh))
            told[name] = np.asarray(read(placed, split))
            memory = read.lower(placed, split).compile().memory_analysis()
    np.testing.assert_allclose(told["spread"], told["own"], atol=1e-5)
    assert share["own"] > 0.5
    assert share["spread"] < 0.3 * share["own"]
    assert memory.temp_size_in_bytes < 0.2 * whole


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 2, 2), (1, 1, 1, 8)], ids=str)
def test_a_router_says_the_same_on_a_mesh_and_whatever_the_padding(shape):
    params = init_params(MIXTURE, jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts, responses = [rng.integers(40, size=3)] * 8, [rng.integers(40, size=n) for n in range(2, 10)]

    def told(mesh, width):
        rows = make_rows(prompts, responses, width)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, param_shardings(MIXTURE, mesh))
            split = jax.device_put(rows, batch_sharding(mesh))
            read = jax.jit(
                lambda params, rows: readout(params, rows, rows.targets[..., None], MIXTURE).routing
            )
            return jax.device_get(routing_readings(read(placed, split)))

    want = told(make_mesh(), 12)
    assert want["router_imbalance"][0] > 0
    assert int(want["router_entropy"][1]) == sum(3 + len(response) - 1 for response in responses)
    for got in (told(make_mesh(*shape), 12), told(make_mesh(*shape), 19)):
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
