"""The demo: one base student, one seed, the same prompts and sampling noise, three ways to train."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
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
    fail: Callable[[], None] = lambda: None,
) -> Path:
    """Train every arm, judge base and arms, and write the report; the arms at once.

    Args:
      folder: gets a run folder per arm, ``report.html`` and ``report.json``.
      config: shared by all arms.
      train: does the rounds of a run that are still to be done.
      judge: evaluates one model of a run, unless that was done before.
      fail: called when an arm has failed, so that the others may stop.

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

    if _may_share(first):
        _at_once(arm, list(runs), fail)
    else:
        for name in runs:
            arm(name)
    return write_report([run.folder for run in runs.values()], folder / "report.html")


def _may_share(run: Run) -> bool:
    """Whether arms may go on at once: small ones leave cores idle, and each has a store of its own.

    Many processes would have to agree on what comes first; an accelerator is full with one.
    """
    alone = jax.process_count() == 1 and run.mesh.devices.flat[0].platform == "cpu"
    return alone and run.config.model.residency == "together" and not run.config.store.at


def _at_once(act: Callable[[str], None], names: list[str], fail: Callable[[], None]) -> None:
    """Do something for every arm at the same time; what failed is raised when all have stopped."""
    failed: list[BaseException] = []

    def do(name: str) -> None:
        try:
            act(name)
        except BaseException as error:
            failed.append(error)
            fail()

    # Of threads that are daemons an impatient user is free at once.
    threads = [threading.Thread(target=do, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # An arm that failed may have made the others stop: it is the one to hear of.
    for error in sorted(failed, key=lambda error: isinstance(error, Interrupted)):
        raise error
