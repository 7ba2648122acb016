"""One interface: by name, composed by multiplication, refused by name."""

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
    combine,
    cross_entropy,
    fixed_blocks,
    iw_opd,
    needs,
    normalise,
    prune,
    relative_gate,
    sampled_token_loss,
    tip,
    token_is,
    topk_loss,
    trust_region_loss,
)
from tests.method.batches import SHAPE, close, fields
from tests.oracle import gates
from tests.oracle import weights as oracle

LOSSES = [
    function for name, function in vars(method).items() if name.endswith("_loss") and name != "weighted_loss"
]


def test_needs_are_the_parameters_without_a_default():
    assert needs(cross_entropy) == ("cur",)
    assert needs(sampled_token_loss) == ("cur", "old", "tea")
    assert needs(tip) == ("entropy", "kl", "mask")
    assert needs(trust_region_loss)[-1] == "noise"


def test_every_member_needs_fields_that_the_interface_names():
    named = {word.strip(",.`") for word in inspect.getdoc(inspect.getmodule(call)).split()}
    open_constants = {"kl_weight", "gold_weight", "tau", "start", "growth", "every", "rate", "threshold"}
    computed = {"base", "a", "gold", "kl_to_reference", "student_logits", "teacher_logits"}
    for member in (*LOSSES, *WEIGHTS.values()):
        assert set(needs(member)) <= named | open_constants | computed, member.__name__


def test_call_takes_the_fields_it_knows_and_keeps_its_options():
    batch = fields()
    args = batch["cur"], batch["old"], batch["tea"]
    got = call(functools.partial(sampled_token_loss, surrogate="is"), batch)
    np.testing.assert_array_equal(got, sampled_token_loss(*args, surrogate="is", mask=batch["mask"]))
    # Options stand above fields of the same name, bound or not.
    bound = call(functools.partial(sampled_token_loss, tea=batch["old"]), batch)
    np.testing.assert_array_equal(bound, sampled_token_loss(*args[:2], batch["old"], mask=batch["mask"]))
    assert "base" in batch
    ids = [batch[f"{side}_ids"] for side in ("student", "teacher")]
    np.testing.assert_array_equal(call(prune, batch), prune(*ids, batch["mask"], base=0.5))


def test_a_missing_field_is_refused_by_name():
    batch = fields()
    del batch["teacher_logprobs_on_support"], batch["tea"]
    with pytest.raises(ValueError, match="topk_loss needs teacher_logprobs_on_support: not among mask, cur"):
        call(topk_loss, batch)
    with pytest.raises(ValueError, match="iw_opd needs tea"):
        combine([prune, functools.partial(iw_opd, largest=2.0)], batch, jnp.ones(SHAPE), batch["mask"])


def test_weights_multiply_and_are_normalised_once():
    batch = fields(1)
    mask = batch["mask"]
    segments = np.asarray(fixed_blocks(mask, 4))
    g = relative_gate(batch["cur"], batch["old"], mask, segments)
    members = [functools.partial(prune, drop=0.3), functools.partial(token_is, high=1.5)]
    product = gates.gate(batch["cur"], batch["old"], mask, segments)
    product *= oracle.prune(batch["student_ids"], batch["teacher_ids"], mask, 0.7, 0.3, 0.5)
    product *= oracle.token_is(batch["cur"], batch["old"], mask, 0.0, 1.5)
    got = normalise(combine(members, batch, g, mask), mask)
    close(got, gates.normalise(product, mask))
    np.testing.assert_allclose(got.sum(), mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        combine(members[::-1], batch, g, mask), combine(members, batch, g, mask), rtol=1e-6
    )
    # No member leaves the gate, no gate the members.
    np.testing.assert_array_equal(combine([], batch, g, mask), g)
    alone = combine(members[:1], batch, mask.astype(jnp.float32), mask)
    np.testing.assert_array_equal(alone, call(members[0], batch))


def test_a_combination_is_detached_and_zero_behind_the_mask():
    batch = fields(2)

    def total(cur, g):
        return jnp.sum(jnp.arange(12) * combine([token_is], batch | {"cur": cur}, g, batch["mask"]))

    g = jnp.where(batch["mask"], 0.5, jnp.nan)
    value, slopes = jax.value_and_grad(total, (0, 1))(batch["cur"], g)
    assert np.isfinite(value)
    assert value > 0
    for slope in slopes:
        np.testing.assert_array_equal(slope, 0)
