"""What the names in a config stand for: every setting changes something, or its use is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import flatten
from opd_jax.errors import InputError
from opd_jax.method import drift, drift_weights, effective_token_ratio, objective
from opd_jax.settings import load_config
from opd_jax.train.choices import LOSSES, SEGMENTS, base_loss, gate_options
from opd_jax.train.combinations import check_choices
from opd_jax.types import Rows
from tests.conftest import tiny_config
from tests.method.batches import fields

SHAPE = 8, 40
TOPK, TIP, PRUNE = "--loss.kind=teacher_topk", "--weights.members=[tip]", "--weights.members=[prune]"
IS = ("--weights.members=[token_is]", "--loss.surrogate=reinforce")
FIRE, SHARP, SIGNS = "--weights.members=[fire_opd]", "--gate.tau=5", "--loss.kind=sign_gated"
LINES, CUSUM = "--gate.segments=newline", ("--gate.segments=cusum", "--gate.span_minimum=1")
POPD = ("--weights.members=[popd]", "--weights.popd_start=3", "--weights.popd_growth=1")
POPD += ("--weights.popd_every=1",)
F_OPD = ("--weights.members=[f_opd]", "--weights.f_opd_rate=1", "--weights.f_opd_threshold=0.01")

# What else must be set for a setting to matter, and two values that differ in what they do.
EFFECTS = {
    "loss.kind": ((), "sampled_token", "teacher_topk"),
    "loss.terms": ((), "[]", "[entropy_aware]"),
    "loss.surrogate": ((), "ppo", "is"),
    "loss.advantage": ((), "old", "cur"),
    "loss.clip_low": ((), "0.2", "0.01"),
    "loss.clip_high": ((), "0.2", "0.01"),
    "loss.dual_clip": ((), "3", "1.1"),
    "loss.reduction": ((), "token_mean", "seq_mean_token_mean"),
    "loss.extrapolation": ((SIGNS,), "1.8", "1.2"),
    "loss.conflict": ((SIGNS,), "1", "0.5"),
    "loss.alpha": (("--loss.terms=[entropy_aware]",), "1", "2"),
    "loss.entropy_threshold": (("--loss.terms=[entropy_aware]",), "0.8", "1.6"),
    "loss.kl_weight": (("--loss.terms=[reference_kl]",), "0.1", "0.5"),
    "gate.segments": ((), "block", "token"),
    "gate.block": ((), "4", "8"),
    "gate.span_minimum": ((LINES,), "2", "6"),
    "gate.span_maximum": ((LINES, "--gate.span_minimum=1"), "3", "9"),
    "gate.span_chunk": ((LINES, "--gate.span_minimum=2"), "3", "9"),
    "gate.cusum_slack": ((*CUSUM, "--gate.cusum_limit=1"), "0.5", "0.1"),
    "gate.cusum_limit": (CUSUM, "1", "3"),
    "gate.tau": ((), "1", "2"),
    "gate.target_ratio": ((), "0.9", "0.5"),
    "gate.statistic": ((), "signed_mean", "rms"),
    "gate.map": ((SHARP,), "exp", "clipped_exp"),
    "gate.floor": ((SHARP, "--gate.map=clipped_exp"), "0.1", "0.5"),
    "gate.scope": ((), "minibatch", "sequence"),
    "gate.eps": ((), "0", "0.1"),
    "gate.clip": ((SHARP,), "[0.9,1.1]", "[0.5,2]"),
    "gate.residual": ((), "1", "0.5"),
    "gate.control": ((), "none", "inverse"),
    "weights.members": ((), "[]", "[iw_opd]"),
    "weights.ratio_twice": (IS[:1], "false", "true"),
    "weights.token_is_low": (IS, "0", "0.9"),
    "weights.token_is_high": (IS, "2", "1.1"),
    "weights.tip_keep": ((TIP,), "0.5", "0.2"),
    "weights.tip_clip_quantile": ((TIP,), "0.98", "0.3"),
    "weights.prune_overlap": ((PRUNE,), "0.7", "0.2"),
    "weights.prune_drop": ((PRUNE,), "0.01", "0.2"),
    "weights.prune_base": ((PRUNE,), "0.5", "0.1"),
    "weights.iw_opd_largest": (("--weights.members=[iw_opd]",), "1.5", "3"),
    "weights.sg_opd_tau": (("--weights.members=[sg_opd]",), "0.5", "1"),
    "weights.popd_start": (POPD, "3", "9"),
    "weights.popd_growth": (POPD, "1", "2"),
    "weights.popd_every": (POPD, "1", "3"),
    "weights.fire_opd_drop": ((FIRE,), "0.2", "0.6"),
    "weights.fire_opd_teacher_share": ((FIRE,), "1", "2"),
    "weights.fire_opd_student_share": ((FIRE,), "1", "2"),
    "weights.scope_opd_temperature": (("--weights.members=[scope_opd]",), "1", "0.5"),
    "weights.f_opd_rate": (F_OPD, "1", "2"),
    "weights.f_opd_threshold": (F_OPD, "0.01", "0.2"),
}
# Of what is scored and what the mask holds: tests.train.test_wiring, test_loop.
ELSEWHERE = {"loss.top_k", "loss.student_k", "loss.old_source", "loss.special_tokens", "loss.special_ids"}


@functools.cache
def batch():
    rng = np.random.default_rng(3)
    arrays = fields(4, SHAPE)
    ids = np.ones(SHAPE, np.int32)
    targets = rng.integers(1, 5, SHAPE)
    targets[0] = 4  # no line ends in the first row
    rows = Rows(targets, targets, arrays["mask"], ids, ids)
    return arrays | {"sequence_ids": ids, "key": jax.random.key(0)}, rows, jnp.arange(5) == 1


def told(overrides):
    """Loss, losses and weights of a config, or why it is refused."""
    arrays, rows, newline = batch()
    try:
        config = tiny_config("--gate.block=4", "--loss.top_k=16", "--schedule.minibatches=1", *overrides)
        check_choices(config)
    except InputError as error:
        return str(error)
    d = drift(arrays["cur"], arrays["old"], arrays["mask"])
    kind = config.gate.segments
    arrays = arrays | {"segments": None if kind == "none" else SEGMENTS[kind](rows, config.gate, newline, d)}
    base = base_loss(config, arrays)
    result = objective(
        arrays["cur"],
        arrays["old"],
        arrays["mask"],
        base,
        arrays["segments"],
        reduction=config.loss.reduction,
        **gate_options(config, arrays),
    )
    return np.concatenate([[result.loss], np.ravel(base), np.ravel(result.weights)])


@pytest.mark.parametrize("name", EFFECTS)
def test_a_setting_changes_something(name):
    context, *values = EFFECTS[name]
    one, other = (told([*context, f"--{name}={value}"]) for value in values)
    if name == "weights.ratio_twice":
        assert "set weights.ratio_twice" in one
        assert np.isfinite(other).all()
        return
    assert np.isfinite([one, other]).all()
    assert np.abs(one - other).max() > 1e-3


def test_no_setting_of_loss_gate_or_weights_is_left_out():
    names = {n for n in flatten(tiny_config()) if n.startswith(("loss.", "gate.", "weights."))}
    assert names == set(EFFECTS) | ELSEWHERE


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((TOPK, "--loss.top_k=1"), "loss.top_k is 1 and the loss 0"),
        (("--loss.kind=student_topk", "--loss.student_k=1"), "loss.student_k is 1 and the loss 0"),
        ((PRUNE, "--loss.top_k=8"), "loss.top_k is 8, loss.student_k 16"),
        (("--gate.segments=none", "--gate.target_ratio=0.5"), "gate.segments=none and gate.control=none"),
        (("--gate.control=constant", "--gate.target_ratio=0.5"), "gate.control=constant there is none"),
        (("--gate.scope=sequence", "--gate.target_ratio=0.5"), "needs gate.map=exp and gate.scope=minibatch"),
        (("--gate.target_ratio=0.5", "--gate.clip=[0.9,1.1]"), "gate.clip would move it away"),
        (
            ("--gate.target_ratio=0.5", "--gate.residual=0.5", "--gate.control=inverse"),
            "gate.residual and gate.control=inverse would",
        ),
        (("--weights.members=[iw_opd,iw_opd]",), r"weights.members is \[iw_opd, iw_opd\]"),
        (("--loss.terms=[trust_region,trust_region]",), r"loss.terms is \[trust_region, trust_region\]"),
        (("--loss.special_ids=[3]",), r"loss.special_ids is \[3\]"),
        (("--loss.terms=[reference_kl]",), "loss.kl_weight is empty"),
        (("--weights.members=[token_is]", "--loss.kind=scope"), "loss.kind=scope holds one"),
        (("--gate.segments=sequence", "--gate.scope=sequence"), "every weight 1"),
        (("--gate.statistic=negative", "--gate.control=oracle"), "never below 0"),
        (("--gate.segments=none", "--gate.control=random"), "name segments"),
        (("--gate.scope=none", "--gate.control=inverse"), "has no bound"),
        (("--weights.members=[sg_opd]",), "weights.sg_opd_tau is empty"),
        (("--weights.members=[scope_opd]", "--schedule.minibatches=8"), "4 prompts do not divide by 8"),
        (("--weights.members=[scope_opd]", "--gate.scope=microbatch"), "would part them"),
    ],
)
def test_choices_that_do_nothing_or_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(InputError, match=message) as error:
        check_choices(tiny_config(*overrides))
    assert "\n" not in str(error.value)
    assert str(error.value).count(": ") == str(error.value).count("; ") == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--weights.iw_opd_largest=-1",), "0 or more"),
        (("--weights.fire_opd_teacher_share=-3",), "0 or more"),
        (("--weights.fire_opd_student_share=-3",), "0 or more"),
        (("--weights.tip_clip_quantile=-1",), r"\[0, 1\]"),
        (("--weights.token_is_low=3",), "at least weights.token_is_low: got 2.0 and 3.0"),
        (("--loss.entropy_threshold=-1",), "0 or more"),
        (("--weights.sg_opd_tau=0",), "above 0"),
    ],
)
def test_settings_that_would_turn_weights_negative_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize("control", ["none", "noise", "oracle", "shuffled", "random", "disagreement"])
def test_a_target_ratio_is_reached_by_every_gate_it_goes_with(control):
    """Also by those that are made from another drift, at a tau of their own."""
    arrays, rows, newline = batch()
    config = tiny_config("--gate.block=4", "--gate.target_ratio=0.6", f"--gate.control={control}")
    check_choices(config)
    d = drift(arrays["cur"], arrays["old"], arrays["mask"])
    again = arrays["old"] + np.random.default_rng(5).normal(0, 1e-4, SHAPE).astype(np.float32)
    segments = SEGMENTS["block"](rows, config.gate, newline, d)
    arrays = arrays | {"segments": segments, "again": again}
    _, w = drift_weights(
        arrays["cur"], arrays["old"], arrays["mask"], segments, **gate_options(config, arrays)
    )
    ratio = float(effective_token_ratio(w, arrays["mask"]))
    assert ratio == pytest.approx(0.6, rel=1e-3 if control in ("none", "noise", "oracle") else 0.2)


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("terms", ["[]", "[entropy_aware]", "[trust_region]", "[reference_kl]"])
def test_nothing_behind_the_mask_is_read_by_what_a_config_names(kind, terms):
    arrays, *_ = batch()
    config = tiny_config(f"--loss.kind={kind}", f"--loss.terms={terms}", "--loss.kl_weight=0.1")
    mask, cur = arrays["mask"], arrays["cur"]
    names = ("old", "tea", "ref", "again", "student_logprobs_on_support", "teacher_logprobs_on_support")
    dirty = {
        name: np.where(mask[(...,) + (None,) * (arrays[name].ndim - 2)], arrays[name], np.nan)
        for name in names
        if name in arrays
    }

    def total(cur):
        return jnp.sum(jnp.where(mask, base_loss(config, {**arrays, **dirty, "cur": cur}), 0.0))

    value, slope = jax.value_and_grad(total)(jnp.where(mask, cur, jnp.inf))
    assert np.isfinite(value)
    assert np.isfinite(np.asarray(slope)).all()
