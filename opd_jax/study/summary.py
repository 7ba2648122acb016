"""What a run folder says, as plain numbers: the content of ``report.json`` and the source of every plot."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.config import Config, flatten
from opd_jax.errors import InputError
from opd_jax.evaluate import Answer, by_problem, read_answers
from opd_jax.method import DRIFT_EDGES, WEIGHT_EDGES
from opd_jax.rollout import RolloutStore
from opd_jax.settings import load_config
from opd_jax.study.statistics import Interval, mean_interval, paired_difference
from opd_jax.train.metrics import read_lines

Numbers = dict[str, Any]
PERCENTILES = (5, 25, 50, 75, 95)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Numbers of several runs and of what they have in common."""

    runs: list[Numbers]
    judged: list[Numbers]  # one entry per model: base, arms, teacher
    compared: list[Numbers]  # paired differences over problems


def summarise(folders: Sequence[Path]) -> Summary:
    """Read run folders.

    Raises:
      InputError: a folder is no run, or has not been trained yet.
    """
    runs = [_run(folder) for folder in folders]
    graded = _graded(folders)
    return Summary(
        runs=runs,
        judged=[_judged(name, records) for name, records in graded.items()],
        compared=_compared(folders, graded),
    )


def _config(folder: Path) -> Config:
    if not (folder / "config.yaml").exists():
        raise InputError(f"a report is written over run folders: {folder} has no config.yaml; check the path")
    return load_config(folder / "config.yaml")


def _run(folder: Path) -> Numbers:
    config, lines = _config(folder), read_lines(folder / "metrics.jsonl")
    if not lines:
        raise InputError(f"a report needs a trained run: {folder} has no updates yet; distill it first")
    per_round: dict[int, list[Numbers]] = defaultdict(list)
    per_position: dict[int, list[Numbers]] = defaultdict(list)
    for line in lines:
        per_round[line["round"]].append(line)
        per_position[line["update"] % config.schedule.updates_per_round].append(line)
    rollouts, scored = RolloutStore(folder / "rollouts"), RolloutStore(folder / "scored")
    seconds: dict[str, float] = defaultdict(float)
    for timing in read_lines(folder / "timings.jsonl"):
        seconds[timing["part"]] += timing["seconds"]
    return {
        "name": folder.name,
        "settings": flatten(config),
        "seconds": dict(seconds),
        "tokens_trained": sum(line["tokens"] for line in lines),
        "rounds": [
            {
                "round": round_,
                "reward": rollouts.shard(round_)["reward"],
                "truncated": rollouts.shard(round_)["truncated"],
                "sampler_mismatch": scored.shard(round_)["mismatch"],
                **{
                    name: float(np.mean([line[name] for line in updates]))
                    for name in ("loss", "kl_teacher_k1", "entropy", "gradient_norm")
                },
            }
            for round_, updates in sorted(per_round.items())
        ],
        "updates": {
            name: [line[name] for line in lines]
            for name in ("update", "drift_abs", "effective_token_ratio", "clip_fraction")
        },
        "within_round": [
            {
                "update": position + 1,
                "drift_abs": float(np.mean([line["drift_abs"] for line in updates])),
                "drift_max": max(line["drift_max"] for line in updates),
                "weight_min": min(line["weight_min"] for line in updates),
                "weight_max": max(line["weight_max"] for line in updates),
                "clip_fraction": float(np.mean([line["clip_fraction"] for line in updates])),
                "effective_token_ratio": float(np.mean([line["effective_token_ratio"] for line in updates])),
                "drift_percentiles": _percentiles(updates, "drift_histogram", DRIFT_EDGES),
                "weight_percentiles": _percentiles(updates, "weight_histogram", WEIGHT_EDGES),
            }
            for position, updates in sorted(per_position.items())
        ],
    }


def _percentiles(lines: Sequence[Numbers], name: str, edges: Sequence[float]) -> list[float]:
    """Percentiles of all tokens of several updates, linear within a bin; outer bins end at an edge."""
    counts = np.sum([line[name] for line in lines], axis=0)
    borders = np.array([edges[0], *edges, edges[-1]])
    below = np.concatenate([[0], np.cumsum(counts)])
    values = []
    for percent in PERCENTILES:
        wanted = below[-1] * percent / 100
        bin_ = int(np.searchsorted(below[1:], wanted))
        share = (wanted - below[bin_]) / counts[bin_]
        values.append(float(borders[bin_] + share * (borders[bin_ + 1] - borders[bin_])))
    return values


def _graded(folders: Sequence[Path]) -> dict[str, list[Answer]]:
    """Every model's answers, base first and teacher last; an arm's are its latest."""
    found: dict[str, list[Answer]] = {}
    for who in ("base", "arms", "teacher"):
        for folder in folders:
            files = sorted((folder / "evaluation").glob(f"{'update-*' if who == 'arms' else who}.jsonl"))
            if files:
                found.setdefault(folder.name if who == "arms" else who, read_answers(files[-1]))
    return found


def _judged(name: str, records: Sequence[Answer]) -> Numbers:
    samples = max(record.sample for record in records) + 1
    return {
        "name": name,
        "problems": len({record.problem for record in records}),
        "samples": samples,
        "tokens": float(np.mean([record.tokens for record in records])),
        "truncated": float(np.mean([record.truncated for record in records])),
        **{
            f"pass@{k}": dataclasses.asdict(mean_interval(list(by_problem(records, k).values())))
            for k in sorted({1, samples})
        },
    }


def _compared(folders: Sequence[Path], graded: dict[str, list[Answer]]) -> list[Numbers]:
    """Paired differences: every arm against the base, and a gate against none where only it differs."""
    pairs = [(folder.name, "base") for folder in folders]
    settings = {folder.name: flatten(_config(folder)) for folder in folders}
    for new in settings:
        for old in settings:
            differing = {key for key in settings[new] if settings[new][key] != settings[old][key]}
            if differing == {"gate.segments"} and settings[old]["gate.segments"] == "none":
                pairs.append((new, old))
    compared = []
    for new, old in pairs:
        if new not in graded or old not in graded:
            continue
        samples = max(record.sample for record in graded[new]) + 1
        row: Numbers = {"new": new, "old": old}
        for k in sorted({1, samples}):
            sides = by_problem(graded[new], k), by_problem(graded[old], k)
            if sides[0].keys() == sides[1].keys():
                row[f"pass@{k}"] = dataclasses.asdict(paired_difference(*sides))
        compared.append(row)
    return compared


def as_json(summary: Summary) -> str:
    """The summary as JSON text."""
    return json.dumps(dataclasses.asdict(summary), indent=1) + "\n"


def interval(fields: Numbers) -> Interval:
    """An interval from its JSON form."""
    return Interval(**fields)
