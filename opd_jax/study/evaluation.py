"""Judging the models of a run on its held-out problems."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from opd_jax.errors import InputError
from opd_jax.evaluate import Answer, answers, write_answers
from opd_jax.files import locked, read_text, write_text
from opd_jax.interrupt import Interrupted, Stop
from opd_jax.keys import stream
from opd_jax.processes import agreed, first_alone
from opd_jax.tasks import prompting_digest
from opd_jax.train.collect import batches, found_by_all
from opd_jax.train.engines import Who, engine_of
from opd_jax.train.metrics import append_lines, read_lines
from opd_jax.train.run import Run


def answers_file(run: Run, who: Who) -> Path:
    """Where a model's answers lie: ``evaluation/base.jsonl``, ``teacher.jsonl``, ``update-00160.jsonl``."""
    name = f"update-{int(run.state.update):05d}" if who == "student" else who
    return run.folder / "evaluation" / f"{name}.jsonl"


def conditions(run: Run) -> dict[str, Any]:
    """What two evaluations must share to be compared problem by problem."""
    sampling = run.config.sampling
    return {
        **dataclasses.asdict(run.config.evaluation),
        "max_response": sampling.max_response,
        "stop": list(sampling.stop),
        "stop_ids": list(sampling.stop_ids),
        "ban_special": sampling.ban_special,
        "problems": run.identity["problems.heldout"],
        "prompting": prompting_digest(run.tokenizer, run.config.problems),
    }


def is_judged(run: Run, who: Who) -> bool:
    """True if a model's answers are there, under the conditions that the run asks for now."""
    file = answers_file(run, who)
    return file.exists() and read_conditions(file) == conditions(run)


def read_conditions(file: Path) -> dict[str, Any]:
    """The `conditions` that answers were given under.

    Raises:
      InputError: they are not beside the answers, or no JSON object.
    """
    beside = file.with_suffix(".json")
    try:
        told = json.loads(read_text(beside))
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise InputError(
            f"answers have their conditions beside them, a JSON object: {beside} is none; remove {file} and "
            "evaluate again"
        )
    return told


def evaluate_run(run: Run, who: Who, report: Callable[[Answer], None], stop: Stop) -> Path:
    """Answer the held-out problems with one of a run's models, and keep every graded answer.

    The draws depend on ``evaluation.seed`` and the problem alone, so all models, arms and seeds are
    compared on the same ones. Whenever ``sampling.slots`` answers are there they are put down, and found
    again when the same evaluation is begun again.

    Args:
      run: the run.
      who: the ``student`` as it is now, the ``base`` it began as, or the ``teacher``.
      report: called with every answer.
      stop: asked whenever answers have been put down.

    Returns:
      The file that holds the answers.
    """
    file = answers_file(run, who)
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            written = f"one process at a time evaluates a model: {file} is being written; wait for it"
            stack.enter_context(locked(file.with_name(f".{file.stem}.lock"), written))

        first_alone(lock)
        return _evaluate(run, who, file, report, agreed(stop))


def _evaluate(run: Run, who: Who, file: Path, report: Callable[[Answer], None], stop: Stop) -> Path:
    begun, asked = file.with_name(f".{file.name}"), conditions(run)
    draws = [(problem.id, n) for problem in run.heldout for n in range(run.config.evaluation.samples)]
    records = found_by_all(lambda: _begun(begun, asked, draws), f"answers of {file.stem}")
    kept = (asked, *map(dataclasses.asdict, records))
    first_alone(lambda: write_text(begun, "".join(json.dumps(line) + "\n" for line in kept)))
    for record in records:
        report(record)
    run.make_room("policy" if who == "student" else who)
    evaluation = run.config.evaluation
    engine = engine_of(run, who, evaluation, stream(evaluation.seed, "evaluate"))
    with jax.set_mesh(run.mesh):
        drawn = answers(
            engine,
            run.tokenizer,
            run.heldout,
            samples=evaluation.samples,
            prompting=run.config.problems,
            done=len(records),
        )
        for more in batches(drawn, run.config.sampling.slots, math.inf):
            first_alone(functools.partial(append_lines, begun, [*map(dataclasses.asdict, more)]))
            records += more
            for record in more:
                report(record)
            if stop():
                raise Interrupted

    def write() -> None:
        # Answers count where their conditions are: those come first, and others' answers go before.
        file.unlink(missing_ok=True)
        write_text(file.with_suffix(".json"), json.dumps(asked, indent=1) + "\n")
        write_answers(file, records)
        begun.unlink(missing_ok=True)

    first_alone(write)
    return file


def _begun(file: Path, asked: dict[str, Any], draws: Sequence[tuple[str, int]]) -> list[Answer]:
    """Answers to the first draws, of an evaluation that was broken off; none if it was another one."""
    lines = read_lines(file)
    if lines[:1] != [asked]:
        return []
    pairs = zip((Answer(**line) for line in lines[1:]), draws, strict=False)
    return [answer for answer, _ in itertools.takewhile(lambda p: (p[0].problem, p[0].sample) == p[1], pairs)]
