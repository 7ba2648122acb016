"""The demo: one base student, one seed, the same prompts and sampling noise, four ways to train."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_jax.config import Config
from opd_jax.study.evaluation import Who
from opd_jax.study.report import write_report
from opd_jax.train.loop import export_student
from opd_jax.train.run import Run, open_run

# Arms differ from each other in the loss and in the gate's segments, and in nothing else.
ARMS: dict[str, tuple[Any, Any]] = {
    "opd": ("sampled_token", "none"),
    "opd-block64": ("sampled_token", "block"),
    "topk": ("teacher_topk", "none"),
    "topk-block64": ("teacher_topk", "block"),
}


def arm_config(config: Config, loss: Any, segments: Any) -> Config:
    """The demo's config with one arm's loss and gate."""
    return dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, kind=loss),
        gate=dataclasses.replace(config.gate, segments=segments),
    )


def demo(
    folder: Path,
    config: Config,
    train: Callable[[Run, str], None],
    judge: Callable[[Run, Who, str], None],
) -> Path:
    """Train every arm, judge base, teacher and arms, and write the report.

    Args:
      folder: gets a run folder per arm, ``report.html`` and ``report.json``.
      config: shared by all arms.
      train: does the rounds of a run that are still to be done.
      judge: evaluates one model of a run, unless that was done before.

    Returns:
      The report.
    """
    runs = {name: open_run(folder / name, arm_config(config, *arm)) for name, arm in ARMS.items()}
    first = next(iter(runs.values()))
    judge(first, "base", "base")
    judge(first, "teacher", "teacher")
    for name, run in runs.items():
        train(run, name)
        export_student(run)
        judge(run, "student", name)
    return write_report([run.folder for run in runs.values()], folder / "report.html")
