"""What the names in a config stand for, what each needs, and what the store must hold for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import method
from opd_jax.config import Config, GateConfig
from opd_jax.errors import InputError
from opd_jax.method import call, needs
from opd_jax.types import Rows

Array = jax.Array
Fields = Mapping[str, Any]  # arrays by the names of `opd_jax.method.family`

LOSSES: dict[str, Callable[..., Array]] = {
    "sampled_token": method.sampled_token_loss,
    "teacher_topk": method.topk_loss,
    "teacher_topk_unrenormalised": method.topk_unrenormalised_loss,
    "teacher_topk_tail": method.topk_tail_loss,
    "teacher_topk_generalised": method.topk_generalised_loss,
    "student_topk": method.student_topk_loss,
    "sign_gated": method.sign_gated_loss,
    "scope": method.scope_loss,
}


def _with_reference_kl(
    base: Array, cur: Array, ref: Array, *, kl_weight: float, mask: Array | None = None
) -> Array:
    return base + kl_weight * method.reference_kl(cur, ref, mask=mask)


# Each takes the loss so far as `base` and returns another.
TERMS: dict[str, Callable[..., Array]] = {
    "entropy_aware": method.entropy_aware_loss,
    "trust_region": method.trust_region_loss,
    "reference_kl": _with_reference_kl,
}

# Which tokens share a gate; `newline` is the table of ids that end a line, `d` the drift.
SEGMENTS: dict[str, Callable[[Rows, GateConfig, Array, Array], Array]] = {
    "token": lambda rows, gate, newline, d: method.every_token(rows.mask),
    "block": lambda rows, gate, newline, d: method.fixed_blocks(
        rows.mask, gate.block, sequence_ids=rows.sequence_ids
    ),
    "newline": lambda rows, gate, newline, d: method.newline_spans(
        newline[rows.targets],
        rows.mask,
        minimum=gate.span_minimum,
        maximum=gate.span_maximum,
        chunk=gate.span_chunk,
        sequence_ids=rows.sequence_ids,
    ),
    "sequence": lambda rows, gate, newline, d: method.whole_sequence(
        rows.mask, sequence_ids=rows.sequence_ids
    ),
    "cusum": lambda rows, gate, newline, d: method.cusum_spans(
        d,
        rows.mask,
        slack=gate.cusum_slack,
        limit=gate.cusum_limit,
        minimum=gate.span_minimum,
        maximum=gate.span_maximum,
        sequence_ids=rows.sequence_ids,
    ),
}


def _disagreement(
    g: Array, mask: Array, segments: Array, cur: Array, tea: Array, *, axis_name: str | None = None
) -> Array:
    return method.disagreement(g, mask, segments, jnp.abs(tea - cur), axis_name=axis_name)


def _noise(again: Array, old: Array, regate: Callable[[Array, Array], Array]) -> Array:
    """The gate of a drift that is nothing but rounding: `old`, read a second time."""
    return regate(again, old)


def _oracle(cur_on_support: Array, old_on_support: Array, regate: Callable[[Array, Array], Array]) -> Array:
    """The gate of the divergence itself: KL(old || cur) on the policy's top ids and a bucket for the rest."""
    divergence = method.topk_tail_loss(old_on_support, cur_on_support)
    return regate(divergence, jnp.zeros_like(divergence))


# Another gate in the place of the drift gate `g`; `regate` makes one from another drift.
CONTROLS: dict[str, Callable[..., Array]] = {
    "constant": method.constant,
    "inverse": method.inverse,
    "position_mean": method.position_mean,
    "shuffled": method.shuffled,
    "random": method.random,
    "disagreement": _disagreement,
    "noise": _noise,
    "oracle": _oracle,
}

# What a store holds only if asked, and which names stand for it.
EXTRAS = {
    "again": ("again",),
    "reference": ("ref",),
    "student_topk": ("student_ids", "cur_on_support", "old_on_support", "tea_on_support"),
}


def options(member: Callable[..., Array], settings: Any, where: str) -> dict[str, Any]:
    """The keyword parameters of a member that the settings have a value for, by name.

    Args:
      member: a loss, a term or a weight.
      settings: the branch of the config that has them.
      where: how the names of the member's settings begin: ``loss.``, ``weights.popd_``.

    Raises:
      InputError: a parameter without a default is not set.
    """
    found = {}
    prefix = where.partition(".")[2]
    for name, parameter in inspect.signature(member).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or not hasattr(settings, prefix + name):
            continue
        found[name] = getattr(settings, prefix + name)
        if found[name] is None and parameter.default is inspect.Parameter.empty:
            raise InputError(
                f"a constant that its paper does not print must be set: {where + name} is empty; "
                "give a number"
            )
    return found


def bound_members(config: Config) -> dict[str, Callable[..., Array]]:
    """Every loss, term, weight and control that a config names, with its options filled in."""
    members = {f"loss.kind={config.loss.kind}": _bind(LOSSES[config.loss.kind], config.loss, "loss.")}
    members |= {f"loss.terms={name}": _bind(TERMS[name], config.loss, "loss.") for name in config.loss.terms}
    for name in config.weights.members:
        members[f"weights.members={name}"] = _bind(method.WEIGHTS[name], config.weights, f"weights.{name}_")
    if config.gate.control != "none":
        members[f"gate.control={config.gate.control}"] = CONTROLS[config.gate.control]
    return members


def _bind(member: Callable[..., Array], settings: Any, where: str) -> Callable[..., Array]:
    return functools.partial(member, **options(member, settings, where))


def wanted_extras(config: Config) -> dict[str, str]:
    """What the store must hold beyond the usual columns, and who asks for it."""
    wanted: dict[str, str] = {}
    for who, member in bound_members(config).items():
        for extra, names in EXTRAS.items():
            if set(needs(member)) & set(names):
                wanted.setdefault(extra, who)
    return wanted


def stored_extras(config: Config) -> set[str]:
    """What scoring adds to the usual columns of a store: for losses and weights, for readings, for later."""
    extras = set(wanted_extras(config))
    if config.log.diagnose_every:
        extras.add("again")  # for the null reading, which is left out where a round lacks it
    if config.store.teacher_hidden:
        extras.add("teacher_hidden")
    return extras


def base_loss(config: Config, fields: Fields) -> Array:
    """The unreduced loss ``[B, T]`` that the config names, its terms included."""
    members = bound_members(config)
    base = call(members[f"loss.kind={config.loss.kind}"], fields)
    for name in config.loss.terms:
        base = call(members[f"loss.terms={name}"], {**fields, "base": base})
    return base


def gate_options(config: Config, fields: Fields, axis_name: str | None = None) -> dict[str, Any]:
    """The keyword arguments of `opd_jax.method.objective` that make the weights a config asks for."""
    gate, members = config.gate, bound_members(config)
    mask, segments = fields["mask"], fields["segments"]
    over: dict[str, Any] = {"sequence_ids": fields["sequence_ids"], "axis_name": axis_name}
    # Of a micro-batch what is at hand is all there is.
    available = {**fields, "axis_name": None if gate.scope == "microbatch" else axis_name}
    others = None
    if config.weights.members:
        chosen = [members[f"weights.members={name}"] for name in config.weights.members]
        others = method.combine(chosen, available, mask.astype(jnp.float32), mask)

    def tau(cur: Array, old: Array) -> float | Array:
        if gate.target_ratio is None or segments is None:
            return gate.tau
        target, statistic = gate.target_ratio, gate.statistic
        return method.tau_for_ratio(
            cur, old, mask, segments, target, statistic=statistic, axis_name=axis_name
        )

    shape: dict[str, Any] = {
        "statistic": gate.statistic,
        "map": gate.map,
        "floor": gate.floor,
        "scope": gate.scope,
        **over,
    }

    def regate(cur: Array, old: Array) -> Array:
        return method.relative_gate(cur, old, mask, segments, others=others, tau=tau(cur, old), **shape)

    def control(g: Array) -> Array:
        return call(members[f"gate.control={gate.control}"], {**available, "g": g, "regate": regate})

    def bound(w: Array) -> Array:
        if gate.clip is not None:
            w = method.clip_weights(w, mask, *gate.clip, scope=gate.scope, **over)
        return method.residual(w, mask, gate.residual) if gate.residual != 1 else w

    controlled = gate.control != "none" and segments is not None
    return {
        **shape,
        "tau": tau(fields["cur"], fields["old"]),
        "eps": gate.eps,
        "reweigh": control if controlled else None,
        "others": others,
        "bound": bound,
    }


def is_linear(config: Config) -> bool:
    """True if the weights are the drift gate itself, which micro-batches can add up in one sweep."""
    gate = config.gate
    plain = gate.control == "none" and gate.clip is None and gate.residual == 1 and gate.target_ratio is None
    return (
        plain
        and not config.weights.members
        and (gate.map, gate.scope) == ("exp", "minibatch")
        and config.loss.reduction == "token_mean"
    )


def needs_groups(config: Config) -> bool:
    """True if something asked for compares the rollouts of a problem, which then share a minibatch."""
    return any("group" in needs(member) for member in bound_members(config).values())
