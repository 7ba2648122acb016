"""What a run folder says, as plain numbers: the content of ``report.json`` and the source of every plot."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.config import Config, flatten
from opd_jax.errors import InputError
from opd_jax.evaluate import Answer, by_problem, read_answers
from opd_jax.method import DRIFT_EDGES, SCORE_EDGES, WEIGHT_EDGES, percentiles
from opd_jax.rollout import RolloutStore
from opd_jax.settings import load_config
from opd_jax.study.evaluation import read_conditions
from opd_jax.study.statistics import Interval, paired_difference, share_interval
from opd_jax.train.metrics import read_lines
from opd_jax.train.opening import FREE
from opd_jax.train.run import store_path

Numbers = dict[str, Any]
PERCENTILES = (5, 25, 50, 75, 95)
INERT = tuple(name for name in FREE if name != "schedule.rounds")


@dataclasses.dataclass(frozen=True)
class Summary:
    """Numbers of several runs and of what they have in common."""

    runs: list[Numbers]
    judged: list[Numbers]  # one entry per model: base, arms, teacher
    judged_as: Numbers  # the conditions that they all were judged under
    compared: list[Numbers]  # paired differences over problems


def summarise(folders: Sequence[Path]) -> Summary:
    """Read run folders.

    Raises:
      InputError: a folder is no run, has not been trained yet, or was judged in another way than the
        others.
    """
    names = _names(folders)
    runs = [_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    graded, judged_as = _graded(folders, names)
    updates = {run["name"]: len(run["updates"]["update"]) for run in runs}
    return Summary(
        runs=runs,
        judged=[
            _judged(kind, name, records, after, updates.get(name))
            for (kind, name), (after, records) in graded.items()
        ],
        judged_as={name: judged_as[name] for name in judged_as if name not in ("base", "teacher")},
        compared=_compared(runs, graded),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart.

    Raises:
      InputError: a folder is named twice.
    """
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise InputError("a run is reported once: a folder is named twice; drop one")
    deepest = max(len(path.parts) for path in paths)
    for length in range(1, deepest + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _config(folder: Path) -> Config:
    if not (folder / "config.yaml").exists():
        raise InputError(f"a report is written over run folders: {folder} has no config.yaml; check the path")
    return load_config(folder / "config.yaml")


def _run(folder: Path, name: str) -> Numbers:
    config, lines = _config(folder), read_lines(folder / "metrics.jsonl")
    if not lines:
        raise InputError(f"a report needs a trained run: {folder} has no updates yet; distill it first")
    if [line["update"] for line in lines] != list(range(len(lines))):
        raise InputError(
            f"metrics must have one line an update: {folder / 'metrics.jsonl'} has not; restore the file"
        )
    per_round: dict[int, list[Numbers]] = defaultdict(list)
    per_position: dict[int, list[Numbers]] = defaultdict(list)
    for line in lines:
        per_round[line["round"]].append(line)
        per_position[line["update"] % config.schedule.updates_per_round].append(line)
    rollouts = RolloutStore(store_path(folder, config, "rollouts"))
    scored = RolloutStore(store_path(folder, config, "scored"))
    told = {round_: scored.shard(round_) for round_ in per_round}
    seconds: dict[str, float] = defaultdict(float)
    for timing in read_lines(folder / "timings.jsonl"):
        seconds[str(timing.get("part"))] += float(timing.get("seconds", 0))
    return {
        "name": name,
        # How it is judged may have changed since: that is with the answers.
        "settings": {
            key: value for key, value in flatten(config).items() if not key.startswith("evaluation.")
        },
        "seconds": dict(seconds),
        "sampler_mismatch": _worst([told[round_]["mismatch"] for round_ in told]),
        "null_drift": _worst([told[round_].get("null_drift") for round_ in told]),
        "tokens_trained": sum(line["tokens"] for line in lines),
        "rounds": [
            {
                "round": round_,
                "reward": rollouts.shard(round_)["reward"],
                "truncated": rollouts.shard(round_)["truncated"],
                "sampler_mismatch": told[round_]["mismatch"],
                "null_drift": told[round_].get("null_drift"),
                **{
                    name: float(np.mean([line[name] for line in updates]))
                    for name in ("loss", "kl_teacher_k1", "entropy", "gradient_norm", "response_length")
                    if all(name in line for line in updates)  # metrics of before it was taken lack the last
                },
            }
            for round_, updates in sorted(per_round.items())
        ],
        "updates": {
            name: [line[name] for line in lines]
            for name in ("update", "drift_abs", "effective_token_ratio", "clip_fraction")
        },
        "gradient_norm_percentiles": np.percentile(
            [line["gradient_norm"] for line in lines], PERCENTILES
        ).tolist(),
        "within_round": [
            {
                "update": position + 1,
                "drift_abs": float(np.mean([line["drift_abs"] for line in updates])),
                "drift_max": max(line["drift_max"] for line in updates),
                "weight_min": min(line["weight_min"] for line in updates),
                "weight_max": max(line["weight_max"] for line in updates),
                "clip_fraction": float(np.mean([line["clip_fraction"] for line in updates])),
                "effective_token_ratio": float(np.mean([line["effective_token_ratio"] for line in updates])),
                "drift_percentiles": _percentiles(updates, "drift_histogram", DRIFT_EDGES, *_drifts(updates)),
                "weight_percentiles": _percentiles(
                    updates, "weight_histogram", WEIGHT_EDGES, *_weights(updates)
                ),
                **(
                    {
                        "score_percentiles": _percentiles(
                            updates, "score_histogram", SCORE_EDGES, 0.0, _drifts(updates)[1]
                        )
                    }
                    if "score_histogram" in updates[0]  # of gates alone
                    else {}
                ),
            }
            for position, updates in sorted(per_position.items())
        ],
        "diagnosis": _diagnosis([line for line in lines if "diagnosis" in line]),
    }


def _worst(distances: Sequence[Numbers | None]) -> Numbers:
    """The largest differences of all rounds, and the least correlation; None where no round has one."""
    worst: Numbers = {}
    for name, of in (("mean", max), ("p99", max), ("max", max), ("pearson", min)):
        found = [distance[name] for distance in distances if distance and distance.get(name) is not None]
        worst[name] = of(found) if found else None
    return worst


def _diagnosis(lines: Sequence[Numbers]) -> Numbers | None:
    """Means of the costly readings over the updates that have them; None if none has.

    Readings of the drift's structure are missing where nothing drifts, as with one update a round.
    """
    if not lines:
        return None
    told = [line["diagnosis"] for line in lines]
    means: Numbers = {
        "updates": len(lines),
        "gradient_norm": float(np.mean([line["gradient_norm"] for line in lines])),
        "gradient_norm_max": max(line["gradient_norm"] for line in lines),
        "ungated_gradient_norm_max": max(one["ungated_gradient_norm"] for one in told),
    }
    for name in dict.fromkeys(name for one in told for name in one):
        values = [one[name] for one in told if name in one]
        if isinstance(values[0], dict):
            keys = dict.fromkeys(key for value in values for key in value)
            means[name] = {
                key: float(np.mean([value[key] for value in values if key in value])) for key in keys
            }
        elif name.endswith("_max"):
            means[name] = max(values)
        elif name.endswith("_min"):
            means[name] = min(values)
        else:
            means[name] = float(np.mean(values))
    return means


def _drifts(lines: Sequence[Numbers]) -> tuple[float, float]:
    most = max(line["drift_max"] for line in lines)
    return -most, most


def _weights(lines: Sequence[Numbers]) -> tuple[float, float]:
    return min(line["weight_min"] for line in lines), max(line["weight_max"] for line in lines)


def _percentiles(
    lines: Sequence[Numbers], name: str, edges: Sequence[float], low: float, high: float
) -> list[float]:
    """Percentiles of all tokens of several updates, none beyond the least and the largest of them."""
    found = percentiles(np.sum([line[name] for line in lines], axis=0).tolist(), edges, PERCENTILES)
    return np.clip(found, low, high).tolist()


Graded = dict[tuple[str, str], tuple[int, list[Answer]]]  # (kind, name) -> updates done, answers


def _graded(folders: Sequence[Path], names: Sequence[str]) -> tuple[Graded, dict[str, Any]]:
    """Every model's answers, the base first, the teacher last, an arm's latest; and how all were judged."""
    found: Graded = {}
    judged_as: dict[str, Any] = {}
    for kind in ("base", "arm", "teacher"):
        for folder, name in zip(folders, names, strict=True):
            pattern = re.compile(r"update-(\d+)\.jsonl" if kind == "arm" else rf"{kind}()\.jsonl")
            files = {int(told[1] or 0): file for file, told in _matching(folder / "evaluation", pattern)}
            if not files:
                continue
            after = max(files)
            told = read_conditions(files[after])
            if kind != "arm":  # whose base or teacher it is must be the same for all
                scored = RolloutStore(store_path(folder, _config(folder), "scored"))
                told[kind] = scored.about_store.get("student" if kind == "base" else kind)
            judged_as = {**told, **judged_as}
            for setting, value in told.items():
                if judged_as[setting] != value:
                    raise InputError(
                        f"models are compared on the same terms: {files[after]} has {setting} = {value!r}, "
                        f"another {judged_as[setting]!r}; evaluate them alike, or report them apart"
                    )
            found.setdefault((kind, name if kind == "arm" else kind), (after, read_answers(files[after])))
    return found, judged_as


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    named = [(file, pattern.fullmatch(file.name)) for file in sorted(folder.glob("*"))]
    return [(file, match) for file, match in named if match]


def _judged(kind: str, name: str, records: Sequence[Answer], after: int, updates: int | None) -> Numbers:
    samples = max(record.sample for record in records) + 1
    return {
        "kind": kind,
        "name": name,
        "after": after if kind == "arm" else None,
        "of_updates": updates if kind == "arm" else None,
        "problems": len({record.problem for record in records}),
        "samples": samples,
        "tokens": float(np.mean([record.tokens for record in records])),
        "truncated": float(np.mean([record.truncated for record in records])),
        **{
            f"pass@{k}": dataclasses.asdict(share_interval(list(by_problem(records, k).values())))
            for k in sorted({1, samples})
        },
    }


def _compared(runs: Sequence[Numbers], graded: Graded) -> list[Numbers]:
    """Paired differences: every arm against the base, and a gate against none where only it differs.

    Settings of a gate that is none, and of where a run is computed or what it logs, are no difference.
    """
    settings = {run["name"]: run["settings"] for run in runs}
    pairs = [(("arm", name), ("base", "base")) for name in settings]
    for new in settings:
        for old in settings:
            differing = {
                key
                for key in settings[new]
                if settings[new][key] != settings[old][key] and not key.startswith(("gate.", *INERT))
            }
            gated, ungated = (settings[name]["gate.segments"] != "none" for name in (new, old))
            if gated and not ungated and not differing and not settings[old]["weights.members"]:
                pairs.append((("arm", new), ("arm", old)))
    compared = []
    for new_arm, old_arm in pairs:
        if new_arm not in graded or old_arm not in graded:
            continue
        (_, new_answers), (_, old_answers) = graded[new_arm], graded[old_arm]
        samples = max(record.sample for record in new_answers) + 1
        row: Numbers = {"new": new_arm[1], "old": old_arm[1]}
        for k in sorted({1, samples}):
            sides = by_problem(new_answers, k), by_problem(old_answers, k)
            row[f"pass@{k}"] = dataclasses.asdict(paired_difference(*sides))
        compared.append(row)
    return compared


def as_json(summary: Summary) -> str:
    """The summary as JSON text."""
    return json.dumps(dataclasses.asdict(summary), indent=1) + "\n"


def interval(fields: Numbers) -> Interval:
    """An interval from its JSON form."""
    return Interval(**fields)
