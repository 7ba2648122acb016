"""Settings that are out of range or contradict each other, refused before anything is done."""

from __future__ import annotations

import math

from opd_jax.config import Config, flatten
from opd_jax.errors import InputError

# Numbers by the range they must lie in; a setting that is None is left alone.
POSITIVE = (
    "model.head_chunk sampling.prompts sampling.samples sampling.max_prompt sampling.max_response "
    "sampling.slots sampling.temperature loss.top_k loss.student_k loss.dual_clip weights.sg_opd_tau "
    "gate.block gate.span_minimum gate.span_chunk gate.cusum_limit optimizer.learning_rate "
    "optimizer.clip_norm optimizer.eps schedule.rounds schedule.passes schedule.minibatches "
    "schedule.microbatches mesh.data mesh.fsdp mesh.tensor mesh.expert evaluation.samples "
    "evaluation.temperature weights.popd_every weights.scope_opd_temperature weights.token_is_high "
    "engine.concurrency engine.timeout engine.attempts engine.tolerance"
).split()
NOT_NEGATIVE = (
    "seed evaluation.seed sampling.top_k evaluation.top_k gate.tau gate.eps gate.cusum_slack "
    "schedule.staleness log.rows log.diagnose_every optimizer.weight_decay loss.clip_low loss.clip_high "
    "loss.alpha loss.kl_weight loss.conflict loss.entropy_threshold weights.token_is_low weights.popd_start "
    "weights.popd_growth weights.prune_drop weights.prune_base weights.f_opd_rate weights.f_opd_threshold "
    "weights.iw_opd_largest weights.fire_opd_teacher_share weights.fire_opd_student_share"
).split()
# Above 0 and at most 1; from 0 to 1.
SHARES = "sampling.top_p evaluation.top_p gate.floor gate.target_ratio weights.tip_keep".split()
PARTS = (
    "optimizer.b1 optimizer.b2 gate.residual weights.fire_opd_drop weights.prune_overlap "
    "weights.tip_clip_quantile"
).split()


def check(config: Config) -> None:
    """Refuse settings that are out of range or contradict each other."""
    values = {name: value for name, value in flatten(config).items() if value is not None}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} must be a finite number: got {value}; give one")
    for names, holds, rule in (
        (POSITIVE, lambda x: x > 0, "above 0"),
        (NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
        (SHARES, lambda x: 0 < x <= 1, "in (0, 1]"),
        (PARTS, lambda x: 0 <= x <= 1, "in [0, 1]"),
    ):
        for name in names:
            if name in values and not holds(values[name]):
                raise InputError(f"{name} must be {rule}: got {values[name]}; correct it")
    problems = config.problems
    if problems.template == "plain" and (problems.system or not problems.thinking):
        raise InputError(
            "problems.system and problems.thinking are of chat templates: problems.template is plain; set it "
            "to chat, or drop them"
        )
    if not all(config.sampling.stop):
        raise InputError(
            f"a stop string must have a character: sampling.stop is {list(config.sampling.stop)}; drop the "
            "empty one"
        )
    for entry in config.store.accept:
        if not entry.partition("=")[2]:
            raise InputError(
                f"what a store may differ in is named with its value: store.accept has {entry!r}; write "
                f"{entry.rstrip('=')}=VALUE, as the refusal of the store says it"
            )
    gate = config.gate
    if gate.span_maximum < gate.span_minimum:
        raise InputError(
            f"gate.span_maximum must be at least gate.span_minimum: got {gate.span_maximum} "
            f"and {gate.span_minimum}; raise the one or lower the other"
        )
    if gate.clip is not None and not 0 <= gate.clip[0] <= 1 <= gate.clip[1]:
        raise InputError(
            f"gate.clip must enclose the mean of one: got {list(gate.clip)}; use [0.5, 2], for example"
        )
    _check_addresses(config)
    low, high = config.weights.token_is_low, config.weights.token_is_high
    if low > high:
        raise InputError(
            f"weights.token_is_high must be at least weights.token_is_low: got {high} and {low}; raise "
            "the one or lower the other"
        )
    rollouts = config.sampling.prompts * config.sampling.samples
    if rollouts % config.schedule.minibatches:
        raise InputError(
            f"a round's rollouts must split evenly into minibatches: {config.sampling.prompts} prompts "
            f"x {config.sampling.samples} samples = {rollouts} do not divide by "
            f"{config.schedule.minibatches}; set schedule.minibatches to a divisor of {rollouts}"
        )
    rows, parts = rollouts // config.schedule.minibatches, config.schedule.microbatches
    if rows % parts:
        raise InputError(
            f"a minibatch must split evenly into microbatches: {rows} rows do not divide by {parts}; set "
            f"schedule.microbatches to a divisor of {rows}"
        )
    ways = config.mesh.data * config.mesh.fsdp * config.mesh.expert
    for name, count in (("a microbatch", rows // parts), ("sampling.slots", config.sampling.slots)):
        if count % ways:
            raise InputError(
                f"rows must split evenly over the mesh: {name} has {count}, mesh.data x mesh.fsdp x "
                f"mesh.expert is {ways}; use {_what_splits(config, name, count, ways)}"
            )


def _check_addresses(config: Config) -> None:
    """Refuse addresses that are none, and a server engine without any."""
    engine = config.engine
    for name in ("urls", "teacher_urls"):
        addresses = getattr(engine, name)
        for url in addresses:
            if not url.startswith(("http://", "https://")) or addresses.count(url) > 1:
                raise InputError(
                    f"engine.{name} must be addresses, each named once: got {url!r} among {len(addresses)}; "
                    "write them as [http://host:8000, ...]"
                )
    if (engine.kind == "server") != bool(engine.urls):
        raise InputError(
            f"servers draw where they are asked to and have an address: engine.kind is {engine.kind} with "
            f"{len(engine.urls)} engine.urls; set both or neither"
        )


def _what_splits(config: Config, name: str, count: int, ways: int) -> str:
    """A mesh, and a round, that would do in the place of one whose rows do not split."""
    fewer = math.gcd(count, ways)
    mesh = f"a mesh that splits rows {fewer} ways, the rest on mesh.tensor if that divides key-value heads"
    if name != "a microbatch":
        return f"a multiple of {ways}, or {mesh}"
    parts = config.schedule.minibatches * config.schedule.microbatches
    each = math.lcm(ways * parts, config.sampling.samples) // config.sampling.samples
    each = math.lcm(each, config.schedule.minibatches)  # so that a prompt's rollouts may share a minibatch
    prompts = each * max(1, -(-config.sampling.prompts // each))
    return f"sampling.prompts {prompts}, or {mesh}"
