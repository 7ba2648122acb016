"""The road, round by round: sample, score, then passes x minibatches gated updates.

`distill` is the whole loop. Each part can be done alone on a run folder, because all that passes
between them lies on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import jax

from opd_jax.errors import InputError
from opd_jax.model import save_pretrained
from opd_jax.rollout.score import batch_of
from opd_jax.tasks import copy_tokenizer
from opd_jax.train.collect import minibatch_plan, sample_round, score_round
from opd_jax.train.interrupt import Interrupted, Stop
from opd_jax.train.metrics import append_line, append_timing, as_line, write_tokens
from opd_jax.train.run import Run

Report = Callable[[dict], None]  # called after every update with its line of metrics


def distill(run: Run, report: Report, stop: Stop) -> None:
    """Do all rounds that are still to be done."""
    while (part := next_part(run)) != "done":
        do_part(run, part, report, stop)


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
    due = next_part(run)
    if due == "done":
        raise InputError(
            f"a finished run is not continued: {run.folder} has done all "
            f"{run.config.schedule.rounds} rounds; evaluate it, or name a new folder"
        )
    if due != part:
        raise InputError(f"parts come in turn: {run.folder} is due for {due}, not {part}; {due} it")
    if stop():
        raise Interrupted
    with jax.set_mesh(run.mesh):
        if part == "sample":
            sample_round(run, stop)
        elif part == "score":
            score_round(run, stop)
        else:
            train_round(run, report, stop)


def train_round(run: Run, report: Report, stop: Stop) -> None:
    """Do the updates of the current round that are still to be done, and save the state.

    A stop between two updates saves the state there, inside the reuse cycle.
    """
    config, schedule = run.config, run.config.schedule
    began, first = time.monotonic(), int(run.state.update)
    round_ = first // schedule.updates_per_round
    rollouts = run.scored.read(round_)
    plan = minibatch_plan(config, round_)
    for update in range(first, (round_ + 1) * schedule.updates_per_round):
        if stop():
            run.checkpoints.save(run.state)
            raise Interrupted
        position = update % schedule.updates_per_round
        pass_, minibatch = divmod(position, schedule.minibatches)
        members = [rollouts[index] for index in plan[minibatch]]
        batch = batch_of(members, run.width, old_source=config.loss.old_source)
        run.state, readings = run.train_step(run.state, batch)
        line = {"update": update, "round": round_, "pass": pass_, "minibatch": minibatch}
        line |= as_line(readings)
        append_line(run.metrics_file, line)
        report(line)
    keep = config.log.rows
    if keep:
        path = run.folder / "tokens" / f"round-{round_:05d}.parquet"
        write_tokens(path, members[:keep], batch.rows.mask, readings)
    run.checkpoints.save(run.state)
    append_timing(run.timings_file, "train", round_, began)


def export_student(run: Run) -> Path:
    """Write the student as it is now, with its tokenizer, in Hugging Face format."""
    folder = run.folder / "student"
    save_pretrained(folder, run.model, run.state.params)
    copy_tokenizer(run.student_folder, folder)
    return folder
