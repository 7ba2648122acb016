"""Judging the models of a run on its held-out problems."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from opd_jax.evaluate import Answer, answers, write_answers
from opd_jax.files import write_text
from opd_jax.interrupt import Interrupted, Stop
from opd_jax.keys import stream
from opd_jax.processes import agreed, first_alone
from opd_jax.tasks import prompting_digest
from opd_jax.train.engines import Who, engine_of
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


def evaluate_run(run: Run, who: Who, report: Callable[[Answer], None], stop: Stop) -> Path:
    """Answer the held-out problems with one of a run's models, and keep every graded answer.

    The draws depend on ``evaluation.seed`` and the problem alone, so all models, arms and seeds are
    compared on the same ones.

    Args:
      run: the run.
      who: the ``student`` as it is now, the ``base`` it began as, or the ``teacher``.
      report: called with every answer.
      stop: asked between answers.

    Returns:
      The file that holds the answers.
    """
    file = answers_file(run, who)
    run.make_room("policy" if who == "student" else who)
    evaluation = run.config.evaluation
    engine = engine_of(run, who, evaluation, stream(evaluation.seed, "evaluate"))
    records = []
    stop = agreed(stop)
    with jax.set_mesh(run.mesh):
        drawn = answers(
            engine, run.tokenizer, run.heldout, samples=evaluation.samples, prompting=run.config.problems
        )
        for answer in drawn:
            if stop():
                raise Interrupted
            records.append(answer)
            report(answer)

    def write() -> None:
        write_answers(file, records)
        write_text(file.with_suffix(".json"), json.dumps(conditions(run), indent=1) + "\n")

    first_alone(write)
    return file
