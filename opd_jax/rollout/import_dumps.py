"""Rollouts of other trainers as a store of ours, so that drift and gates can be read off them.

A `Rollout` has one log-prob column until a teacher has scored it. What a dump says twice of its tokens,
by the sampler and by the trainer, becomes two stores of the same rows: ``STORE`` holds the sampler's, and
``STORE-old`` beside it the trainer's. `opd_jax.study.inspection` reads one against the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.errors import InputError
from opd_jax.rollout.dumps import BEHAVIOUR, OLD, Dumped, Trainer, read_dump
from opd_jax.rollout.store import Rollout, RolloutStore
from opd_jax.tasks import tokenizer_digest


@dataclasses.dataclass(frozen=True)
class Imported:
    """What became of a dump."""

    rollouts: int
    rounds: list[int]  # that were written now
    skipped: list[int]  # that the store had already
    repeats: int  # rollouts that came again at the next step
    columns: list[str]  # of log-probs, as the dump names them


def old_store(store: str | Path) -> str | Path:
    """Where the trainer's log-probs of an imported store lie: a URL for a URL, or else a folder."""
    if "://" in str(store):
        return f"{str(store).rstrip('/')}-old"
    return Path(f"{os.path.abspath(store)}-old")  # so that "." has a name, too


def import_dump(
    dump: Path,
    trainer: Trainer,
    out: str | Path,
    tokenizer: Any,
    *,
    temperature: float = 1.0,
    reward: str = "",
) -> Imported:
    """Write the rollouts of a dump to a store, a round a step.

    Rounds that the store has already are left as they are, so an import that was stopped goes on; they
    must be of the same rollouts.

    Args:
      dump: what `opd_jax.rollout.dumps.read_dump` reads.
      trainer: ``verl`` or ``trl``.
      out: the store, a folder or the URL of an object store; where the dump has the trainer's log-probs
        too, they go to `old_store` of it.
      tokenizer: of the model that was trained.
      temperature: that the log-probs are of; the dump does not say.
      reward: the dump's column of rewards.

    Raises:
      InputError: the dump cannot be read, or the store was written from another trainer, tokenizer,
        temperature or dump.
    """
    if not 0 < temperature < math.inf:
        raise InputError(
            f"--temperature must be a finite number above 0: got {temperature}; give that of the log-probs"
        )
    rows = read_dump(dump, trainer, tokenizer, reward)
    first = next(rows, None)
    if first is None:
        raise InputError(f"a dump must have rollouts: {dump} has none; name the folder the trainer wrote")
    about = {"trainer": trainer, "tokenizer": tokenizer_digest(tokenizer), "temperature": temperature}
    names = _columns(first, trainer)
    stores = {
        name: _open(path, {**about, "logprobs": name})
        for name, path in zip(names, (out, old_store(out)), strict=False)
    }
    special = set(tokenizer.all_special_ids)
    samples: Counter[str] = Counter()
    before: set[tuple[bytes, ...]] = set()
    written: list[int] = []
    skipped: list[int] = []
    count = repeats = 0
    for step, drawn in _by_step(first, rows, trainer, names):
        # trl logs its newest completions at every step, those that reuse them included.
        fresh = [row for row in drawn if trainer == "verl" or _content(row) not in before]
        repeats, before = repeats + len(drawn) - len(fresh), {_content(row) for row in drawn}
        rollouts: dict[str, list[Rollout]] = {name: [] for name in names}
        for row in fresh:
            for name in names:
                rollouts[name].append(_rollout(row, _column(row, name, trainer), samples[row.group], special))
            samples[row.group] += 1
        if not fresh:
            continue
        digest = _digest(fresh)
        have = [store for store in stores.values() if step in store.rounds]
        for store in have:
            if store.shard(step).get("content", digest) != digest:
                raise InputError(
                    f"a step is imported once: {store.path} has step {step} of other rollouts, log-probs or "
                    f"rewards than {dump}; give --out a new folder"
                )
        done = len(have) == len(stores)
        (skipped if done else written).append(step)
        count += 0 if done else len(fresh)
        # The store that is asked first is sealed last: where it has a round, the other has it too.
        for name in reversed(names):
            if step not in stores[name].rounds:
                stores[name].discard(step)  # what an import that was killed had written of it
                stores[name].append(rollouts[name])
                stores[name].seal(step, source=str(dump), content=digest)
    return Imported(count, written, skipped, repeats, names)


def _open(path: str | Path, about: Mapping[str, Any]) -> RolloutStore:
    """A store that is new, or belongs to the same."""
    found = RolloutStore(path).about_store
    for name, value in about.items():
        if found and found.get(name) != value:
            raise InputError(
                f"a store belongs to one {name}: {path} was written for {found.get(name)!r}, this import has "
                f"{value!r}; give --out a new folder, or import with the {name} it was made with"
            )
    return RolloutStore(path, about)


def _columns(row: Dumped, trainer: Trainer) -> list[str]:
    """The log-prob columns of a row: the sampler's first, if it has it."""
    have = []
    if row.behaviour is not None:
        have.append(BEHAVIOUR[trainer][0])
    if row.old is not None:
        have.append(OLD[trainer][0])
    return have


def _column(row: Dumped, name: str, trainer: Trainer) -> np.ndarray:
    values = row.old if name in OLD[trainer] else row.behaviour
    assert values is not None  # _by_step refused it
    return values


def _by_step(
    first: Dumped, rest: Iterator[Dumped], trainer: Trainer, names: list[str]
) -> Iterator[tuple[int, list[Dumped]]]:
    """Rows of one step together, steps in order; one step in memory."""
    step, drawn = first.step, [first]
    for row in rest:
        if _columns(row, trainer) != names:
            raise InputError(
                f"all rollouts of a dump must have the same log-probs: {row.where} has "
                f"{' and '.join(_columns(row, trainer))}, {first.where} {' and '.join(names)}; part them"
            )
        if row.step < step:
            raise InputError(
                f"a dump goes from step to step: {row.where} is of step {row.step} after {step}; sort it"
            )
        if row.step > step:
            yield step, drawn
            step, drawn = row.step, []
        drawn.append(row)
    yield step, drawn


def _content(row: Dumped) -> tuple[bytes, ...]:
    parts = (row.prompt_ids, row.response_ids, row.behaviour, row.old)
    return tuple(b"" if part is None else part.tobytes() for part in parts)


def _digest(rows: Sequence[Dumped]) -> str:
    """SHA-256 of all that a step's rollouts say."""
    told = hashlib.sha256()
    for row in rows:
        for part in (*_content(row), repr((row.group, row.reward)).encode()):
            told.update(len(part).to_bytes(8, "little") + part)
    return told.hexdigest()


def _rollout(row: Dumped, logprobs: np.ndarray, sample: int, special: set[int]) -> Rollout:
    if not len(row.prompt_ids) or not len(row.response_ids):
        raise InputError(
            f"a prompt and a response must have at least one token: {row.where} has "
            f"{len(row.prompt_ids)} and {len(row.response_ids)}; drop that row"
        )
    return Rollout(
        round=row.step,
        problem=row.group,
        sample=sample,
        prompt_ids=row.prompt_ids,
        response_ids=row.response_ids,
        behaviour_logprobs=logprobs,
        truncated=int(row.response_ids[-1]) not in special,
        reward=row.reward,
    )
