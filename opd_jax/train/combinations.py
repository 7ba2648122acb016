"""Which losses, gates, weights and engines go together."""

from __future__ import annotations

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.method import needs
from opd_jax.rollout.server_post import address
from opd_jax.train.choices import bound_members, needs_groups


def check_choices(config: Config) -> None:
    """Refuse combinations of losses, gates and weights that make no sense together.

    Raises:
      InputError: two choices contradict each other, or a constant that has no default is not set.
    """
    bound_members(config)
    for setting, names in (("loss.terms", config.loss.terms), ("weights.members", config.weights.members)):
        if len(set(names)) < len(names):
            raise InputError(
                f"a member counts once: {setting} is [{', '.join(names)}]; name each of them once"
            )
    if config.loss.special_ids and config.loss.special_tokens == "keep":
        raise InputError(
            f"tokens that are kept need no list: loss.special_ids is {list(config.loss.special_ids)}; "
            "set loss.special_tokens=first_out or all_out"
        )
    _check_gate(config)
    _check_engine(config)
    loss, members = config.loss, config.weights.members
    holds_ratio = loss.kind in ("sampled_token", "student_topk", "sign_gated", "scope") and (
        loss.surrogate != "reinforce" or loss.kind == "scope"
    )
    if "token_is" in members and holds_ratio and not config.weights.ratio_twice:
        raise InputError(
            f"an importance ratio counts once: token_is is one, and loss.kind={loss.kind} holds one; use "
            "sampled_token with loss.surrogate=reinforce or a teacher_topk loss, or set weights.ratio_twice"
        )
    for kind, name in (("teacher_topk", "top_k"), ("student_topk", "student_k")):
        if loss.kind == kind and getattr(loss, name) < 2:
            raise InputError(
                f"a renormalised support of one id is no signal: loss.{name} is {getattr(loss, name)} and "
                "the loss 0 everywhere; use 2 or more"
            )
    if "prune" in members and loss.top_k < loss.student_k:
        raise InputError(
            f"prune compares as many ids of the teacher as of the student: loss.top_k is {loss.top_k}, "
            f"loss.student_k {loss.student_k}; raise the one or lower the other"
        )
    prompts, minibatches = config.sampling.prompts, config.schedule.minibatches
    if needs_groups(config) and prompts % minibatches:
        raise InputError(
            f"scope_opd weighs the rollouts of a problem against each other: {prompts} prompts do not divide "
            f"by {minibatches} minibatches; set schedule.minibatches to a divisor of {prompts}"
        )


def _check_engine(config: Config) -> None:
    """Refuse addresses that are none, and what servers cannot give: some of the teacher's numbers, say."""
    engine, temperature = config.engine, config.sampling.temperature
    for url in (*engine.urls, *engine.teacher_urls):
        address(url)
    if engine.kind == "server" and temperature != 1 and config.loss.old_source == "sampler":
        raise InputError(
            f"a server's log-probs are those of temperature 1: with sampling.temperature={temperature:g} "
            "they are no `old`; use loss.old_source=trainer"
        )
    if engine.kind == "server" and config.sampling.stop:
        raise InputError(
            "servers are asked to stop at ids alone: sampling.stop names strings; use sampling.stop_ids"
        )
    if not engine.teacher_urls:
        return
    if config.store.teacher_hidden:
        raise InputError(
            "a server does not tell the teacher's hidden states: drop store.teacher_hidden, or "
            "engine.teacher_urls"
        )
    if config.schedule.rows == "packed":
        raise InputError(
            "a server scores rows of one rollout: schedule.rows is packed; use padded, or drop "
            "engine.teacher_urls"
        )
    if temperature != 1:
        raise InputError(
            f"a server scores at temperature 1: sampling.temperature is {temperature:g}; drop "
            "engine.teacher_urls, and the teacher is scored here"
        )
    untold = {
        "the entropy of the teacher": ("teacher_entropy",),
        "the teacher's log-probs of the student's ids": ("tea_on_support",),
    }
    for who, member in bound_members(config).items():
        for what, names in untold.items():
            if set(needs(member)) & set(names):
                raise InputError(
                    f"a server does not tell {what}, which {who} needs; drop engine.teacher_urls, and the "
                    "teacher is scored here"
                )


def _check_gate(config: Config) -> None:
    """Refuse gates that could not act, or whose parts do not go together."""
    gate = config.gate
    if gate.segments == "none" and gate.control != "none":
        raise InputError(
            f"a control arm redistributes a gate: gate.control is {gate.control!r} but gate.segments is "
            "none; name segments"
        )
    if gate.target_ratio is not None:
        if gate.segments == "none" or gate.control == "constant":
            raise InputError(
                f"gate.target_ratio sharpens a gate until it acts: with gate.segments={gate.segments} and "
                f"gate.control={gate.control} there is none; drop gate.target_ratio, or the other"
            )
        if (gate.map, gate.scope) != ("exp", "minibatch"):
            raise InputError(
                f"gate.target_ratio needs gate.map=exp and gate.scope=minibatch: got {gate.map} and "
                f"{gate.scope}; drop one of the three"
            )
        moved = {
            "gate.clip": gate.clip is not None,
            "gate.residual": gate.residual != 1,
            "gate.control=inverse": gate.control == "inverse",
        }
        if any(moved.values()):
            names = " and ".join(name for name in moved if moved[name])
            raise InputError(
                f"gate.target_ratio is reached by the gate as it comes: {names} would move it away again; "
                "drop the one or the other"
            )
    if (gate.control, gate.scope) == ("inverse", "none"):
        raise InputError(
            "1 / g has no bound: with gate.control=inverse and gate.scope=none weights have no scale; use "
            "another scope"
        )
    if (gate.segments, gate.scope) == ("sequence", "sequence"):
        raise InputError(
            "a gate of one number a sequence has mean one over more than a sequence: gate.segments and "
            "gate.scope are both sequence and every weight 1; set gate.scope=minibatch"
        )
    if (gate.control, gate.statistic) == ("oracle", "negative"):
        raise InputError(
            "the oracle's divergence is never below 0: with gate.statistic=negative every score is 0; use "
            "signed_mean"
        )
    if gate.scope == "microbatch" and needs_groups(config):
        raise InputError(
            "scope_opd weighs the rollouts of a problem against each other: gate.scope=microbatch would part "
            "them; use gate.scope=minibatch"
        )
