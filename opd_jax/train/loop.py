"""The road, round by round: sample, score, then passes x minibatches gated updates.

`distill` is the whole loop. Each part can be done alone on a run folder, because all that passes
between them lies on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted, Stop
from opd_jax.method import special_tokens_out
from opd_jax.model.lora import save_adapter
from opd_jax.model.sharding import on_mesh
from opd_jax.processes import agreed, first_alone, is_first
from opd_jax.rollout.manifest import is_named, short
from opd_jax.rollout.score import batch_of
from opd_jax.tasks import vocabulary
from opd_jax.train.choices import wanted_extras
from opd_jax.train.collect import check_shape, minibatch_plan, sample_round
from opd_jax.train.diagnose import diagnosis
from opd_jax.train.export import write_policy
from opd_jax.train.identity import had_policy, note_policy, params_digest
from opd_jax.train.layout import layout
from opd_jax.train.metrics import append_line, append_timing, as_line, write_tokens
from opd_jax.train.opening import exclusive
from opd_jax.train.run import Run
from opd_jax.train.scoring import score_round
from opd_jax.types import Rows

Report = Callable[[dict], None]  # called after every update with its line of metrics


def distill(run: Run, report: Report, stop: Stop) -> None:
    """Do all rounds that are still to be done."""
    with exclusive(run):
        while (part := next_part(run)) != "done":
            _do(run, part, report, stop)


def next_part(run: Run) -> str:
    """Which part of the road comes next: ``sample``, ``score``, ``train`` or ``done``.

    Round t trains on the rollouts of round t, drawn ``staleness`` rounds of training earlier; so that
    many rounds of rollouts are drawn ahead.
    """
    schedule = run.config.schedule
    sampled, scored = len(run.rollouts.rounds), len(run.scored.rounds)
    trained = int(run.state.update) // schedule.updates_per_round
    if scored < sampled:
        return "score"
    if sampled < min(schedule.rounds, trained + 1 + schedule.staleness):
        return "sample"
    return "train" if trained < schedule.rounds else "done"


def do_part(run: Run, part: str, report: Report, stop: Stop) -> None:
    """Do one part of a round.

    Raises:
      InputError: another part is due.
      Interrupted: ``stop()`` said so, and what was done is on disk.
    """
    with exclusive(run):
        due = next_part(run)
        if due == "done":
            raise InputError(
                f"a finished run is not continued: {run.folder} has done all "
                f"{run.config.schedule.rounds} rounds; evaluate it, or raise schedule.rounds"
            )
        if due != part:
            raise InputError(f"parts come in turn: {run.folder} is due for {due}, not {part}; {due} it")
        _do(run, part, report, stop)


def _do(run: Run, part: str, report: Report, stop: Stop) -> None:
    stop = agreed(stop)
    if stop():
        raise Interrupted
    began, round_ = time.monotonic(), _round_of(run, part)
    try:
        with jax.set_mesh(run.mesh):
            if part == "sample":
                sample_round(run, stop)
            elif part == "score":
                score_round(run, stop)
            else:
                train_round(run, report, stop)
    except BaseException:
        if is_first():
            with contextlib.suppress(OSError):  # a disk that is full says so once
                append_timing(run.timings_file, part, round_, began)
        raise
    first_alone(lambda: append_timing(run.timings_file, part, round_, began))


def _round_of(run: Run, part: str) -> int:
    done = {"sample": len(run.rollouts.rounds), "score": len(run.scored.rounds)}
    return done.get(part, int(run.state.update) // run.config.schedule.updates_per_round)


def train_round(run: Run, report: Report, stop: Stop) -> None:
    """Do the updates of the current round that are still to be done, and save the state.

    A stop between two updates saves the state there, inside the reuse cycle.
    """
    config, schedule = run.config, run.config.schedule
    first = int(run.state.update)
    round_ = first // schedule.updates_per_round
    check_extras(run, round_)
    run.make_room("state")
    if first % schedule.updates_per_round == 0:
        check_policy(run, round_)
    rollouts = run.scored.read(round_)
    check_shape(run.scored, round_, rollouts, config)
    drawn_at = run.rollouts.shard(round_)["update"]
    staleness = round_ - drawn_at // schedule.updates_per_round
    plan = minibatch_plan(config, round_)
    for update in range(first, (round_ + 1) * schedule.updates_per_round):
        if stop():
            run.checkpoints.save(run.state)
            raise Interrupted
        position = update % schedule.updates_per_round
        pass_, minibatch = divmod(position, schedule.minibatches)
        order, counts = layout(config, plan[minibatch], rollouts, run.width)
        batch = batch_of(
            [rollouts[index] for index in order],
            run.width,
            counts=counts,
            staleness=staleness,
            old_source=config.loss.old_source,
        )
        counted = dataclasses.replace(batch, rows=counted_rows(run, batch.rows))
        placed = on_mesh(counted, run.mesh)
        line: dict[str, Any] = {"update": update, "round": round_, "pass": pass_, "minibatch": minibatch}
        if is_diagnosed(config, update):
            told = run.diagnose(run.state.params, placed, run.state.update, run.frozen)
            line["diagnosis"] = diagnosis(told)
        run.state, readings = run.train_step(run.state, placed, run.frozen)
        line |= as_line(readings)
        _check_finite(run, line)
        first_alone(functools.partial(append_line, run.metrics_file, line))
        report(line)
    keep = config.log.rows
    if keep:
        path = run.folder / "tokens" / f"round-{round_:05d}.parquet"
        kept = {int(np.flatnonzero(order == index)[0]): rollouts[index] for index in plan[minibatch][:keep]}
        first_alone(lambda: write_tokens(path, kept, batch.rows, readings))
    run.checkpoints.save(run.state)


def is_diagnosed(config: Config, update: int) -> bool:
    """True at every ``log.diagnose_every``-th update.

    Multiples of a round's updates fall on the last of a round, where drift is largest; at a round's first
    there is none to diagnose.
    """
    every = config.log.diagnose_every
    return every > 0 and (update + 1) % every == 0


def counted_rows(run: Run, rows: Rows) -> Rows:
    """Rows whose mask holds what is trained on: with ``loss.special_tokens``, not all of the response."""
    special = run.config.loss.special_tokens
    if special == "keep":
        return rows
    mask = special_tokens_out(
        rows.targets,
        rows.mask,
        special_ids(run),
        first_only=special == "first_out",
        sequence_ids=rows.sequence_ids,
    )
    return dataclasses.replace(rows, mask=np.asarray(mask))


def special_ids(run: Run) -> tuple[int, ...]:
    """Ids that ``loss.special_tokens`` is about, but for those that end a response: stopping is trained."""
    ends = {run.tokenizer.eos_token_id, *run.stop_ids}
    listed = run.config.loss.special_ids
    return tuple(sorted(set(listed) - ends)) if listed else vocabulary.special_ids(run.tokenizer, ends)


def check_policy(run: Run, round_: int) -> None:
    """Refuse rollouts that were drawn by another student than this run had at that update.

    Runs that share a store (``store.at``) may go on with it, each with settings of its own.

    Raises:
      InputError: they were drawn by another, which is not accepted by name.
    """
    had = {"policy": params_digest(run.state.params), "update": int(run.state.update)}
    first_alone(lambda: note_policy(run.policies_file, had))
    told, accept = run.rollouts.shard(round_), run.config.store.accept
    if not had_policy(run.policies_file, told) and not is_named(accept, "policy", told["policy"]):
        named = ",".join([*accept, f"policy={short(told['policy'])}"])
        raise InputError(
            f"a run trains on what its own student drew: round {round_} of {run.rollouts.path} was drawn by "
            f"another, at update {told['update']} of its run; train in that run, or accept it by name with "
            f"--store.accept='[{named}]'"
        )


def check_extras(run: Run, round_: int) -> None:
    """Refuse to train on a round that lacks what the config's loss, weights or gate ask for.

    Raises:
      InputError: the store does not hold it; the message names what, and who asks.
    """
    samplers = run.scored.about_store["behaviour_logprob_temperature"]
    if run.config.loss.old_source == "sampler" and samplers != run.config.sampling.temperature:
        raise InputError(
            f"drift is measured at one temperature: the sampler's log-probs in {run.scored.path} are of "
            f"temperature {samplers}, the trainer's of {run.config.sampling.temperature}; use "
            "loss.old_source=trainer"
        )
    held = run.scored.shard(round_).get("extras", [])
    for extra, who in wanted_extras(run.config).items():
        if extra not in held:
            raise InputError(
                f"a store must hold what training asks for: {who} needs {extra}, round {round_} in "
                f"{run.scored.path} has {', '.join(held) or 'none such'}; score the rollouts again"
            )


def _check_finite(run: Run, line: dict[str, Any]) -> None:
    """Stop before a broken update is saved; the last saved state stays as it is."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(line[name]):
            raise InputError(
                f"training must stay finite: in {run.folder} update {line['update']} has {name} "
                f"{line[name]}; what was saved before is kept: lower optimizer.learning_rate, or check the "
                "models"
            )


def export_student(run: Run) -> Path:
    """Write the student as it is now, with its tokenizer, in Hugging Face format."""
    folder = run.folder / "student"
    write_policy(run, folder)
    if run.lora:
        base = str(run.student_folder)
        save_adapter(run.folder / "adapter", run.model, run.state.params, run.lora, base=base)
    return folder
