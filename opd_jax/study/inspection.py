"""Drift and gates of stored rollouts, read without a model and without training.

A store holds what two computations said of the same tokens: the sampler that drew them, and the trainer.
The one takes the place of `old`, the other of `cur`, and the functions of `opd_jax.method` do the rest.
With the weights of one checkpoint on both sides this is the mismatch of two engines; with a newer one in
the trainer it is the drift of training on stale rollouts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.method import drift, drift_weights, effective_token_ratio, needs, segment_score
from opd_jax.rollout.import_dumps import old_store
from opd_jax.rollout.rows import make_rows, spread
from opd_jax.rollout.store import Rollout, RolloutStore
from opd_jax.train.choices import SEGMENTS, bound_members, gate_options
from opd_jax.train.fields import drawn_fields
from opd_jax.types import Rows

PERCENTS = (0, 1, 5, 25, 50, 75, 95, 99, 100)
LINES = 16  # of a table along the response; longer ones are merged


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one round says; nats a token where no unit is named."""

    round: int
    rollouts: int
    tokens: int
    drift: float  # mean of d = cur - old
    drift_abs: float  # mean of |d|
    drift_abs_percentiles: list[float]  # at `PERCENTS`
    weight_percentiles: list[float]
    effective_token_ratio: float
    segments: list[dict[str, float]]  # along the response: where, tokens, drift, |segment score|, weight


def inspect_store(
    path: Path, config: Config, *, newline: np.ndarray | None = None, rounds: Sequence[int] = ()
) -> list[Reading]:
    """Read drift and gate weights off every round of a store.

    Args:
      path: a scored store of a run, or an imported one with both columns of log-probs.
      config: its gate, and the weights that multiply it. A round is one minibatch.
      newline: ``[V]`` bool, which ids end a line, for ``gate.segments: newline``.
      rounds: those to read; all by default.

    Raises:
      InputError: there is no store, it has one column of log-probs only or two of different temperatures,
        the gate asks for what no store has, or, where all rounds are read, a file of it is missing, changed
        or a stranger's.
    """
    store, beside = RolloutStore(path), RolloutStore(old_store(path))
    _check_temperatures(store)
    if not store.rounds:
        raise InputError(f"inspect reads a store of rollouts: {path} has no rounds; name the folder of one")
    if config.gate.segments == "newline" and newline is None:
        raise InputError("gate.segments=newline needs texts: name the model's folder with --tokenizer")
    _check_needs(config)
    if not rounds:
        store.verify()
    return [_read(store, beside, round_, config, newline) for round_ in rounds or store.rounds]


def _check_temperatures(store: RolloutStore) -> None:
    """A server's log-probs are those of temperature 1, and scoring's those of the sampling temperature."""
    about = store.about_store
    trainers = about.get("temperature")
    samplers = about.get("behaviour_logprob_temperature", trainers)
    if samplers != trainers:
        raise InputError(
            f"drift is a difference of log-probs at one temperature: {store.path} has the sampler's at "
            f"{samplers} and the trainer's at {trainers}; sample at temperature {samplers} to read it"
        )


def _check_needs(config: Config) -> None:
    have = {"mask", "segments", "sequence_ids", "cur", "old", "step", "key", "noise", "g", "regate"}
    for name, member in bound_members(config).items():
        missing = set(needs(member)) - have
        if missing and not name.startswith("loss"):
            raise InputError(
                f"inspect has log-probs of sampled tokens alone: {name} needs {', '.join(sorted(missing))}; "
                "drop it"
            )


def _read(store: RolloutStore, beside: RolloutStore, round_: int, config: Config, newline: Any) -> Reading:
    rollouts = store.read(round_)
    old = [rollout.behaviour_logprobs for rollout in rollouts]
    cur = _second(store, beside, round_, rollouts)
    width = max(len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts)
    width = -(-width // 64) * 64  # few shapes, so that rounds share compiled programs
    rows = make_rows([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], width)
    mask = rows.mask
    made = _weights(config, rows, spread(cur, mask), spread(old, mask), newline)
    d, w, segments = np.asarray(made[0]), np.asarray(made[1]), made[2]
    score = np.zeros_like(d)
    if segments is not None:
        score = np.abs(segment_score(jnp.asarray(d), mask, segments, statistic=config.gate.statistic))
        segments = np.asarray(segments)
    return Reading(
        round=round_,
        rollouts=len(rollouts),
        tokens=int(mask.sum()),
        drift=float(d[mask].mean(dtype=np.float64)),
        drift_abs=float(np.abs(d[mask]).mean(dtype=np.float64)),
        drift_abs_percentiles=_percentiles(np.abs(d[mask])),
        weight_percentiles=_percentiles(w[mask]),
        effective_token_ratio=float(effective_token_ratio(jnp.asarray(w), mask)),
        segments=[] if segments is None else _along(segments, mask, d, score, w),
    )


def _second(
    store: RolloutStore, beside: RolloutStore, round_: int, rollouts: Sequence[Rollout]
) -> list[np.ndarray]:
    """The trainer's log-probs of a round's rollouts: scored, or imported beside them."""
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]
    if len(scores) == len(rollouts):
        return [score.old_logprobs for score in scores]
    if round_ not in beside.rounds:
        column = store.about_store.get("logprobs", "behaviour_logprobs")
        raise InputError(
            f"drift is a difference of two log-probs: round {round_} of {store.path} has {column} alone; "
            "score it, or import a dump that has the trainer's too"
        )
    others = beside.read(round_)
    same = [np.array_equal(a.response_ids, b.response_ids) for a, b in zip(rollouts, others, strict=False)]
    if len(others) != len(rollouts) or not all(same):
        raise InputError(
            f"both stores of an import have the same rollouts: round {round_} of {store.path} and "
            f"{beside.path} differ; import again into a new folder"
        )
    return [other.behaviour_logprobs for other in others]


@functools.partial(jax.jit, static_argnames="config")
def _weights(config: Config, rows: Rows, cur: Any, old: Any, newline: Any) -> tuple[Any, Any, Any]:
    """Drift and weights ``[B, T]`` of a minibatch, and its segments, as the gated step makes them."""
    fields: dict[str, Any] = {
        "mask": rows.mask,
        "sequence_ids": rows.sequence_ids,
        "cur": cur,
        "old": old,
        **drawn_fields(config, jnp.zeros((), jnp.int32), rows.mask.shape),
    }
    kind = config.gate.segments
    fields["segments"] = None
    if kind != "none":
        d = drift(fields["cur"], fields["old"], fields["mask"])
        fields["segments"] = SEGMENTS[kind](rows, config.gate, newline, d)
    d, w = drift_weights(
        fields["cur"], fields["old"], fields["mask"], fields["segments"], **gate_options(config, fields)
    )
    return d, w, fields["segments"]


def _percentiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values.astype(np.float64), PERCENTS)]


def _along(
    segments: np.ndarray, mask: np.ndarray, d: np.ndarray, score: np.ndarray, w: np.ndarray
) -> list[dict[str, float]]:
    """Means over the segments of one number, from a response's first on, neighbours merged to `LINES`."""
    number = segments[mask]
    each = -(-(int(number.max()) + 1) // LINES)
    found = []
    for first in range(0, int(number.max()) + 1, each):
        here = (number >= first) & (number < first + each)
        row: dict[str, float] = {"first": first, "last": first + each - 1, "tokens": int(here.sum())}
        for name, values in (("drift", d), ("score", score), ("weight", w)):
            row[name] = float(values[mask][here].mean(dtype=np.float64))
        found.append(row)
    return found


def as_text(path: Path, config: Config, readings: Sequence[Reading]) -> str:
    """Readings as a page of text."""
    gate = config.gate
    kind = f"{gate.segments} of {gate.block}" if gate.segments == "block" else gate.segments
    tau = f"tau {gate.tau:g}" if gate.target_ratio is None else f"tau for a ratio of {gate.target_ratio:g}"
    others = "".join(f", {name}" for name in (*config.weights.members, f"control {gate.control}"))
    lines = [
        f"{path}: drift is the trainer's log-prob minus the sampler's, nats a token",
        f"gate: {kind}, {gate.statistic}, {gate.map}, {tau}, scope {gate.scope}{others}",
    ]
    heads = " ".join(f"{name:>9}" for name in ("min", *(f"p{p}" for p in PERCENTS[1:-1]), "max"))
    for reading in readings:
        lines += [
            "",
            f"round {reading.round}: {reading.rollouts:,} rollouts, {reading.tokens:,} tokens, drift "
            f"{reading.drift:+.5f}, |drift| {reading.drift_abs:.5f}, effective token ratio "
            f"{reading.effective_token_ratio:.5f}",
            f"{'':9} {heads}",
            f"{'|drift|':9} " + " ".join(f"{value:9.5f}" for value in reading.drift_abs_percentiles),
            f"{'weight':9} " + " ".join(f"{value:9.5f}" for value in reading.weight_percentiles),
        ]
        if reading.segments:
            lines.append(f"{'segment':>9} {'tokens':>9} {'drift':>9} {'|score|':>9} {'weight':>9}")
        for row in reading.segments:
            where = f"{row['first']:g}" + (f"-{row['last']:g}" if row["last"] > row["first"] else "")
            lines.append(
                f"{where:>9} {row['tokens']:9,d} {row['drift']:+9.5f} {row['score']:9.5f} "
                f"{row['weight']:9.5f}"
            )
    return "\n".join(lines)
