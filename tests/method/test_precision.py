"""Arrays of a model that computes in bfloat16 are read in float32 before anything is done with them."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import method
from opd_jax.method import (
    WEIGHTS,
    call,
    clip_weights,
    drift,
    drift_diagnostics,
    drift_gate,
    effective_token_ratio,
    every_token,
    jsd_loss,
    masked_sum,
    needs,
    normalise,
    segment_score,
    segment_total,
    structure_sums,
    support_mass,
    token_mean,
    whole_sequence,
)
from tests.method.batches import fields

CONSTANTS = {"kl_weight": 0.1, "gold_weight": 0.2, "tau": 0.5, "rate": 0.5, "threshold": 0.1}
CONSTANTS |= {"start": 2, "growth": 1, "every": 2}
LOSSES = {
    name: function
    for name, function in vars(method).items()
    if (name.endswith("_loss") and name not in ("weighted_loss", "surrogate_loss")) or name == "reference_kl"
}


def bound(member):
    wanted = {name: x for name, x in CONSTANTS.items() if name in needs(member)}
    return functools.partial(call, functools.partial(member, **wanted))


FUNCTIONS = {name: bound(function) for name, function in (LOSSES | WEIGHTS).items()} | {
    "drift": lambda b: drift(b["cur"], b["old"], b["mask"]),
    "drift_gate": lambda b: drift_gate(b["cur"], b["old"], b["mask"], every_token(b["mask"])),
    "segment_score": lambda b: segment_score(b["base"], b["mask"], whole_sequence(b["mask"])),
    "segment_total": lambda b: segment_total(b["base"], whole_sequence(b["mask"])),
    "normalise": lambda b: normalise(b["noise"], b["mask"]),
    "clip_weights": lambda b: clip_weights(b["noise"], b["mask"], 0.5, 1.5),
    "effective_token_ratio": lambda b: effective_token_ratio(b["noise"], b["mask"]),
    "masked_sum": lambda b: masked_sum(b["base"], b["mask"]),
    "support_mass": lambda b: support_mass(b["cur_on_support"], b["mask"]),
    "structure_sums": lambda b: structure_sums(b["base"], b["mask"], lags=(1,), sizes=(4,)),
    "token_mean": lambda b: token_mean(b["base"], b["mask"]),
    "jsd_loss 0.3": lambda b: jsd_loss(b["student_logits"], b["teacher_logits"], beta=0.3),
    "drift_diagnostics": lambda b: drift_diagnostics(
        b["cur"], b["old"], b["tea"], b["base"], b["noise"], b["mask"], clip=(0.2, 0.2)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bfloat16_goes_in_and_float32_is_computed(name):
    def cast(x, dtype):
        return jnp.asarray(x, dtype) if x.dtype == np.float32 else x

    narrow = {n: cast(x, jnp.bfloat16) for n, x in fields(4).items()}
    same = {n: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for n, x in narrow.items()}
    got, want = FUNCTIONS[name](narrow), FUNCTIONS[name](same)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


def test_every_loss_and_weight_is_among_them():
    assert {"sampled_token_loss", "full_kl_loss", "stable_loss", "prune", "sg_opd"} <= set(FUNCTIONS)
    assert all("mask" in inspect.signature(f).parameters for f in LOSSES.values())


def test_a_long_drift_in_bfloat16_keeps_its_mean():
    rng = np.random.default_rng(0)
    old = jnp.full((1, 4096), -1.0, jnp.bfloat16)
    cur = jnp.asarray(-1 + rng.normal(0.01, 0.02, (1, 4096)), jnp.bfloat16)
    want = (np.asarray(cur, np.float64) - np.asarray(old, np.float64)).mean()
    mask = jnp.ones((1, 4096))
    got = segment_score(drift(cur, old, mask), mask, whole_sequence(mask))
    np.testing.assert_allclose(got, want, rtol=1e-4)
