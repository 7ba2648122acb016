"""Stored rollouts: parquet shards that any tool opens, and a manifest that vouches for them.

A store is a folder. Rows are appended, then sealed into a shard; a shard exists for readers only once
the manifest, written last, names it with its SHA-256. Shards never change. The manifest also says
what the whole store belongs to (student, tokenizer, sampling, ...), and a reader that expects
something else is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opd_jax.errors import InputError
from opd_jax.files import replacing, sha256, write_text

SCHEMA_VERSION = 2
# A dot file, so that tools which read the whole folder as parquet pass it by.
MANIFEST = ".manifest.json"


@dataclasses.dataclass(frozen=True)
class Score:
    """What scoring attaches to a rollout of R tokens; nats, at the sampling temperature.

    Columns that only some losses and weights ask for are None where they were not scored.
    """

    old_logprobs: np.ndarray  # [R] by the trainer's own computation
    teacher_logprobs: np.ndarray  # [R] of the sampled tokens
    teacher_topk_ids: np.ndarray  # [R, K] best first
    teacher_topk_logprobs: np.ndarray  # [R, K] raw, not renormalised
    teacher_outside_mass: np.ndarray  # [R] probability the K leave out
    teacher_entropy: np.ndarray | None = None  # [R] of its whole distribution; no server tells it
    again_logprobs: np.ndarray | None = None  # [R] `old`, read a second time by another batching
    reference_logprobs: np.ndarray | None = None  # [R] under the student before training
    student_topk_ids: np.ndarray | None = None  # [R, K] of the behaviour policy, best first
    student_topk_logprobs: np.ndarray | None = None  # [R, K] under it
    student_topk_teacher_logprobs: np.ndarray | None = None  # [R, K] under the teacher


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One response to one prompt, with the log-probs it was sampled at."""

    round: int
    problem: str  # id of the problem; rollouts of one problem in one round are a group
    sample: int  # which rollout of that problem, over the whole run
    prompt_ids: np.ndarray  # [P] int32
    response_ids: np.ndarray  # [R] int32, the end-of-text token included
    behaviour_logprobs: np.ndarray  # [R] float32, raw, by the engine that sampled
    truncated: bool
    reward: float
    score: Score | None = None


_TOKENS, _NATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_ROLLOUT = {
    "round": pa.int32(),
    "problem": pa.string(),
    "sample": pa.int32(),
    "prompt_ids": _TOKENS,
    "response_ids": _TOKENS,
    "behaviour_logprobs": _NATS,
    "truncated": pa.bool_(),
    "reward": pa.float32(),
}
_SCORE = {
    "old_logprobs": _NATS,
    "teacher_logprobs": _NATS,
    "teacher_entropy": _NATS,
    "teacher_topk_ids": pa.list_(_TOKENS),
    "teacher_topk_logprobs": pa.list_(_NATS),
    "teacher_outside_mass": _NATS,
    "again_logprobs": _NATS,
    "reference_logprobs": _NATS,
    "student_topk_ids": pa.list_(_TOKENS),
    "student_topk_logprobs": pa.list_(_NATS),
    "student_topk_teacher_logprobs": pa.list_(_NATS),
}


class RolloutStore:
    """An append-only folder of rollouts.

    Args:
      path: the folder; created by the first `seal`.
      about: what the store belongs to, as JSON values. A store that says otherwise is refused.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.about = dict(about or {})
        self._open: list[Rollout] = []
        written_for = self._manifest()["about"]
        for name, expected in self.about.items():
            if written_for.get(name) != expected:
                raise InputError(
                    f"a store belongs to one {name}: {self.path} was written for "
                    f"{written_for.get(name)!r}, this run has {expected!r}; use the run folder it was made "
                    "for, or a new one"
                )

    def _manifest(self) -> dict[str, Any]:
        file = self.path / MANIFEST
        if not file.exists():
            return {"schema": SCHEMA_VERSION, "about": self.about, "shards": []}
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            version = manifest["schema"]
            if version == SCHEMA_VERSION:
                _ = manifest["about"].keys(), [shard["round"] for shard in manifest["shards"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"a store's manifest must be whole JSON: {file} is not ({error}); restore it"
            ) from None
        if version != SCHEMA_VERSION:
            raise InputError(
                f"a store must have schema {SCHEMA_VERSION}: {file} has {version}; "
                "read it with the version that wrote it"
            )
        return manifest

    @property
    def about_store(self) -> dict[str, Any]:
        """What the store says it belongs to."""
        return dict(self._manifest()["about"])

    @property
    def rounds(self) -> list[int]:
        """The rounds sealed so far, in order."""
        return [shard["round"] for shard in self._manifest()["shards"]]

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Add rollouts to the open shard, in memory until it is sealed.

        Raises:
          InputError: a response is empty, or a per-token column is not as long as its response.
        """
        for rollout in rollouts:
            _check(rollout, f"a rollout of problem {rollout.problem!r}")
        self._open.extend(rollouts)

    def seal(self, round_: int, **about: Any) -> Path:
        """Write the open shard as the rollouts of a round and make it visible.

        Args:
          round_: which round; each is sealed once.
          about: recorded with the shard, as JSON values.

        Raises:
          InputError: the round is there already, or there is nothing to seal.
        """
        manifest = self._manifest()
        if round_ in [shard["round"] for shard in manifest["shards"]]:
            raise InputError(
                f"a round is written once: {self.path} has round {round_} already; read it instead"
            )
        if not self._open:
            raise InputError(f"a shard must have rows: round {round_} has none; append rollouts first")
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / f"round-{round_:05d}.parquet"
        with replacing(file) as temporary:
            pq.write_table(_to_table(self._open), temporary)
        manifest["shards"].append(
            {
                "file": file.name,
                "round": round_,
                "rows": len(self._open),
                "tokens": sum(len(rollout.response_ids) for rollout in self._open),
                "sha256": sha256(file),
                **about,
            }
        )
        write_text(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        self._open = []
        return file

    def shard(self, round_: int) -> dict[str, Any]:
        """What the manifest says of a round.

        Raises:
          InputError: the round is not in the store.
        """
        for shard in self._manifest()["shards"]:
            if shard["round"] == round_:
                return shard
        raise InputError(
            f"a round must be in the store to be read: {self.path} has rounds {self.rounds}, "
            f"not {round_}; sample and score it first"
        )

    def verify(self) -> None:
        """Compare every shard with its SHA-256.

        Raises:
          InputError: a shard is missing or changed; the message names the file.
        """
        for shard in self._manifest()["shards"]:
            self._verify(shard)

    def _verify(self, shard: Mapping[str, Any]) -> Path:
        file = self.path / shard["file"]
        if not file.is_file():
            raise InputError(f"every shard must be there: {file} is missing; restore it from a copy")
        if sha256(file) != shard["sha256"]:
            raise InputError(
                f"a shard must be as it was written: {file} has another SHA-256 than the manifest; "
                "restore it from a copy"
            )
        return file

    def read(self, round_: int) -> list[Rollout]:
        """The rollouts of a round in the order they were appended, verified first."""
        file = self._verify(self.shard(round_))
        try:
            rows = pq.read_table(file).to_pylist()
            rollouts = [_from_row(row, scored="old_logprobs" in row) for row in rows]
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"a shard must be a parquet file of rollouts: {file} is not ({error}); restore it"
            ) from None
        for index, rollout in enumerate(rollouts):
            _check(rollout, f"row {index} of {file}")
        return rollouts


def _check(rollout: Rollout, where: str) -> None:
    length = len(rollout.response_ids)
    if not length or not len(rollout.prompt_ids):
        raise InputError(
            f"a prompt and a response must have at least one token: {where} has "
            f"{len(rollout.prompt_ids)} and {length}; drop that row"
        )
    columns = {"behaviour_logprobs": rollout.behaviour_logprobs}
    if rollout.score:
        columns.update({name: column for name, column in vars(rollout.score).items() if column is not None})
    for name, column in columns.items():
        if len(column) != length:
            raise InputError(
                f"a per-token column must be as long as its response: {where} has {length} tokens "
                f"and {len(column)} {name}; drop that row"
            )
        if not np.all(np.isfinite(column)):
            raise InputError(
                f"stored numbers must be finite: {where} has NaN or infinity in {name}; score it again"
            )


def _to_table(rollouts: Sequence[Rollout]) -> pa.Table:
    score = rollouts[0].score
    columns: dict[str, Any] = {}
    for name, kind in _ROLLOUT.items():
        columns[name] = pa.array([_plain(getattr(r, name)) for r in rollouts], kind)
    for name, kind in _SCORE.items():
        if score is not None and getattr(score, name) is not None:
            columns[name] = pa.array([_plain(getattr(r.score, name)) for r in rollouts], kind)
    return pa.table(columns)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _from_row(row: Mapping[str, Any], scored: bool) -> Rollout:
    def array(name: str) -> np.ndarray:
        return np.asarray(row[name], np.int32 if name.endswith("_ids") else np.float32)

    return Rollout(
        round=row["round"],
        problem=row["problem"],
        sample=row["sample"],
        prompt_ids=array("prompt_ids"),
        response_ids=array("response_ids"),
        behaviour_logprobs=array("behaviour_logprobs"),
        truncated=row["truncated"],
        reward=row["reward"],
        score=Score(**{name: array(name) for name in _SCORE if name in row}) if scored else None,
    )
