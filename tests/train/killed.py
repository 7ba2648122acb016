"""Kill -9 at random moments of ``opd sample`` and ``opd score``, and what comes of it.

A program, because it starts, kills and restarts others: ``python -m tests.train.killed FOLDER KILLS SEED``.
Every command runs in a process of its own, forked from one that has done the imports but never used JAX.
Prints as JSON how many were killed, at what stage, and how many laps ended in the uninterrupted store.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

from opd_jax import commands  # noqa: F401  loads all that a command needs, so that a fork has it
from opd_jax.cli import main
from opd_jax.rollout import RolloutStore
from opd_jax.settings import config_file
from opd_jax.train import collect

SHAPE = (
    "--sampling.slots=4",
    "--schedule.microbatches=2",
    "--loss.terms=[reference_kl]",
    "--loss.kl_weight=1",
)
collect.SECONDS = -1.0  # every rollout is kept as soon as it is drawn
STORES = {"sample": "rollouts", "score": "scored"}


def start(argv: list[str]) -> int:
    """Fork a process that runs one command."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on forking beside threads, of which there are none yet
        process = os.fork()
    if process == 0:
        os._exit(main(argv))
    return process


def ended(process: int) -> int | None:
    """The exit status of a process, None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def holds(process: int, lock: Path) -> bool:
    """Whether a process has a file open."""
    try:
        return any(os.readlink(link) == str(lock) for link in Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return False


def content(run: Path) -> list[str]:
    """All rollouts of a run, to the bit."""
    told = []
    for name in STORES.values():
        store = RolloutStore(run / name)
        store.verify()
        told += [
            repr([(k, v.tobytes().hex() if hasattr(v, "tobytes") else v) for k, v in values.items()])
            for rollout in store.read(0)
            for values in (dict(vars(rollout), score=None), vars(rollout.score) if rollout.score else {})
        ]
    return told


def sealing(store: Path) -> bool:
    """Whether a round is about to be sealed: its rollouts, or their scores, are written."""
    return bool(list((store / ".round-00000").glob("part-*"))) or (store / "round-00000").exists()


def do(run: Path, part: str, chance: random.Random, lasts: dict[str, float]) -> str:
    """Run one part, and perhaps kill it; says where that was, or nothing where it came to its end."""
    store = (run / STORES[part]).resolve()
    process, began = start([part, str(run)]), None
    at_seal, delay = chance.random() < 0.3, chance.uniform(0, lasts[part])
    if at_seal:
        delay = chance.uniform(0, 0.03)
    while (status := ended(process)) is None:
        if began is None and (sealing(store) if at_seal else holds(process, store / ".lock")):
            began = time.monotonic()
        if began is not None and time.monotonic() - began >= delay:
            os.kill(process, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            break
        time.sleep(0.001)
    if status == -signal.SIGKILL:
        pieces = len(list(store.glob(".round-00000/part-*"))) + len(list(store.glob(".work-00000/*.npz")))
        sealed = " sealed" if (store / "round-00000").exists() else ""
        return f"{part}, {pieces} pieces{sealed}"
    assert status == 0, f"{part} ended with {status}"
    return ""


def laps(folder: Path, kills: int, seed: int) -> dict[str, object]:
    chance, where = random.Random(seed), collections.Counter[str]()
    words = os.environ["TINY"].split()
    fresh = ["--config", str(config_file("lab.yaml")), *words, *SHAPE]
    lasts = {}
    for part in STORES:  # the uninterrupted run; the second time over, nothing is compiled any more
        for name in ("warm", "whole"):
            process = start([part, str(folder / name), *(fresh if part == "sample" else [])])
            began = None
            while (status := ended(process)) is None:
                if began is None and holds(process, (folder / name).resolve() / STORES[part] / ".lock"):
                    began = time.monotonic()
                time.sleep(0.001)
            assert status == 0, f"{part} ended with {status}"
            lasts[part] = time.monotonic() - (began or time.monotonic())
    want, done, same = content(folder / "whole"), 0, 0
    assert len(want) == 64
    while where.total() < kills:
        run = folder / f"lap-{done}"
        shutil.copytree(folder / "whole", run, ignore=shutil.ignore_patterns("rollouts", "scored"))
        for part in STORES:
            while killed := do(run, part, chance, lasts):
                where[killed] += 1
                if (run / STORES[part] / ".manifest.json").exists() and RolloutStore(
                    run / STORES[part]
                ).rounds:
                    break  # it was killed when all was done
        done, same = done + 1, same + (content(run) == want)
        shutil.rmtree(run)
    return {"kills": where.total(), "laps": done, "same": same, "where": dict(sorted(where.items()))}


if __name__ == "__main__":
    print(json.dumps(laps(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
