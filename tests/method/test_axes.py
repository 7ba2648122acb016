"""What takes the name of a mapped axis is the same over its devices as without any."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from opd_jax.method import (
    clip_weights,
    disagreement,
    drift_gate,
    drift_weights,
    fire_opd,
    fixed_blocks,
    masked_quantile,
    normalise,
    position_mean,
    random,
    relative_gate,
    scope_count,
    scope_least,
    scope_opd,
    scope_total,
    shuffled,
    tau_for_ratio,
    tip,
    token_mean,
    weighted_loss,
)
from tests.method.batches import SPLIT, mesh, wide_batch


def gate_of(batch):
    return relative_gate(
        batch["cur"], batch["old"], batch["mask"], fixed_blocks(batch["mask"], 4), scope="none"
    )


def pair(batch):
    return batch["cur"], batch["old"], batch["mask"], fixed_blocks(batch["mask"], 4)


GLOBAL = {
    "relative_gate": lambda b, name: relative_gate(*pair(b), axis_name=name),
    "drift_gate": lambda b, name: drift_gate(*pair(b), axis_name=name),
    "drift_gate hard": lambda b, name: drift_gate(*pair(b), map="hard", tau=9.0, axis_name=name),
    "normalise": lambda b, name: normalise(b["noise"], b["mask"], axis_name=name),
    "scope_total": lambda b, name: scope_total(b["tea"], b["mask"], "minibatch", None, name),
    "scope_count": lambda b, name: scope_count(b["mask"], "minibatch", None, name),
    "scope_least": lambda b, name: scope_least(b["tea"], b["mask"], "minibatch", None, name),
    "position_mean": lambda b, name: position_mean(gate_of(b), b["mask"], pair(b)[3], axis_name=name),
    "shuffled": lambda b, name: shuffled(
        gate_of(b), b["mask"], pair(b)[3], jax.random.key(0), axis_name=name
    ),
    "random": lambda b, name: random(gate_of(b), b["mask"], pair(b)[3], jax.random.key(0), axis_name=name),
    "disagreement": lambda b, name: disagreement(
        gate_of(b), b["mask"], pair(b)[3], b["noise"], axis_name=name
    ),
    "clip_weights": lambda b, name: clip_weights(b["noise"], b["mask"], 0.5, 1.5, axis_name=name),
    "clip_weights sequence": lambda b, name: clip_weights(
        b["noise"], b["mask"], 0.5, 1.5, scope="sequence", axis_name=name
    ),
    "tau_for_ratio": lambda b, name: tau_for_ratio(*pair(b), 0.7, axis_name=name),
    "masked_quantile": lambda b, name: masked_quantile(b["tea"], b["mask"], 0.3, name),
    "tip": lambda b, name: tip(b["entropy"], b["kl"], b["mask"], axis_name=name),
    "fire_opd": lambda b, name: fire_opd(
        b["tea"], b["entropy"], b["teacher_entropy"], b["mask"], drop=0.4, axis_name=name
    ),
    "scope_opd": lambda b, name: scope_opd(
        b["cur"], b["tea"], b["reward"], b["group"], b["mask"], axis_name=name
    ),
    "drift_weights": lambda b, name: drift_weights(
        *pair(b), reweigh=lambda g: g * b["noise"], axis_name=name
    )[1],
    "weighted_loss": lambda b, name: weighted_loss(
        b["base"], b["noise"], b["mask"], reduction="seq_mean_token_mean", axis_name=name
    ),
    "token_mean": lambda b, name: token_mean(b["base"], b["mask"], name),
}


@pytest.fixture(scope="module")
def found():
    """All of them as one program a way: over the whole batch, over its halves, and mapped over rows."""

    def everywhere(batch, name=None):
        shape = batch["mask"].shape
        return {key: jnp.broadcast_to(function(batch, name), shape) for key, function in GLOBAL.items()}

    batch, mapped = wide_batch(), functools.partial(everywhere, name="rows")
    whole = jax.jit(everywhere)
    halves = [whole({n: x[rows] for n, x in batch.items()}) for rows in (np.s_[:4], np.s_[4:])]
    parts = {n: x.reshape(4, 2, *x.shape[1:]) for n, x in batch.items()}
    by_pmap = jax.pmap(mapped, axis_name="rows", devices=jax.devices()[:4])(parts)
    return {
        "whole": whole(batch),
        "halves": jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *halves),
        "shard_map": jax.jit(jax.shard_map(mapped, mesh=mesh(4), in_specs=SPLIT, out_specs=SPLIT))(batch),
        "pmap": jax.tree.map(lambda x: x.reshape(batch["mask"].shape), by_pmap),
        "sharded": whole(jax.device_put(batch, NamedSharding(mesh(4), SPLIT))),
    }


@pytest.mark.parametrize("name", GLOBAL)
def test_what_takes_an_axis_is_global_over_it(found, name):
    want = found["whole"][name]
    for way in ("shard_map", "pmap", "sharded"):
        np.testing.assert_allclose(found[way][name], want, rtol=1e-5, atol=1e-6, err_msg=way)
    if name != "clip_weights sequence":
        assert not np.allclose(found["halves"][name], want, rtol=1e-3)  # halves alone are another matter


def test_a_microbatch_is_what_one_device_holds():
    batch = wide_batch()
    parts = [{n: x[2 * i : 2 * i + 2] for n, x in batch.items()} for i in range(4)]
    for function in (
        lambda b, name: normalise(b["noise"], b["mask"], scope="microbatch", axis_name=name),
        lambda b, name: relative_gate(*pair(b), scope="microbatch", axis_name=name),
        lambda b, name: clip_weights(b["noise"], b["mask"], 0.5, 1.5, scope="microbatch", axis_name=name),
    ):
        split = jax.shard_map(
            functools.partial(function, name="rows"), mesh=mesh(4), in_specs=SPLIT, out_specs=SPLIT
        )
        want = jnp.concatenate([jax.jit(function, static_argnums=1)(part, None) for part in parts])
        np.testing.assert_allclose(jax.jit(split)(batch), want, rtol=1e-5, atol=1e-6)
        assert not np.allclose(want, function(batch, None), rtol=1e-3)
