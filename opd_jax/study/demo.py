"""The demo: one base student, one seed, the same prompts and sampling noise, three ways to train."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from opd_jax.config import Config
from opd_jax.interrupt import Interrupted
from opd_jax.study.evaluation import Who
from opd_jax.study.report import write_report
from opd_jax.train.loop import export_student
from opd_jax.train.opening import open_run
from opd_jax.train.run import Run

# Arms differ from each other in the loss and in the gate's segments, and in nothing else that trains them.
ARM_SETTINGS = ("loss.kind", "gate.segments")


def arms(config: Config) -> dict[str, Config]:
    """The configs of the demo's arms by name: sampled-token OPD, with blocks, and teacher top-K.

    The costly readings are taken of the gated arm alone, whose gate they explain.
    """
    kinds: dict[str, tuple[Any, Any]] = {
        "opd": ("sampled_token", "none"),
        f"opd-block{config.gate.block}": ("sampled_token", "block"),
        "topk": ("teacher_topk", "none"),
    }
    return {
        name: dataclasses.replace(
            config,
            loss=dataclasses.replace(config.loss, kind=loss),
            gate=dataclasses.replace(config.gate, segments=segments),
            log=config.log if segments != "none" else dataclasses.replace(config.log, diagnose_every=0),
        )
        for name, (loss, segments) in kinds.items()
    }


def demo(
    folder: Path,
    config: Config,
    train: Callable[[Run, str], None],
    judge: Callable[[Run, Who, str], None],
) -> Path:
    """Train every arm, judge base and arms, and write the report; the arms at once.

    Args:
      folder: gets a run folder per arm, ``report.html`` and ``report.json``.
      config: shared by all arms.
      train: does the rounds of a run that are still to be done.
      judge: evaluates one model of a run, unless that was done before.

    Returns:
      The report.
    """
    runs = {name: open_run(folder / name, arm) for name, arm in arms(config).items()}
    first = next(iter(runs.values()))
    judge(first, "base", "base")

    def arm(name: str) -> None:
        train(runs[name], name)
        export_student(runs[name])
        judge(runs[name], "student", name)

    _at_once(arm, list(runs))
    return write_report([run.folder for run in runs.values()], folder / "report.html")


def _at_once(act: Callable[[str], None], names: list[str]) -> None:
    """Do something for every arm at the same time: one arm of small models leaves a machine's cores idle.

    Many processes would have to agree on what comes first, and take one arm after another.
    """
    with ThreadPoolExecutor(len(names) if jax.process_count() == 1 else 1) as pool:
        done = [pool.submit(act, name) for name in names]
    failed = [error for future in done if (error := future.exception())]
    # An arm that failed may have made the others stop: it is the one to hear of.
    for error in sorted(failed, key=lambda error: isinstance(error, Interrupted)):
        raise error
