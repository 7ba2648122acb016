"""One run by many processes: joining them, agreeing, and who writes.

Every process runs the same program over the same global arrays; files are written by the first alone, on
a file system that all of them see.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from opd_jax.errors import InputError

# Environment: how many processes a run is made of, which of them this one is, and where they meet.
ASKED, NUMBER, PLACE = "OPD_PROCESSES", "OPD_PROCESS", "OPD_COORDINATOR"
PATIENCE = 300  # seconds that a process waits for the others to join
GRACE = 20  # seconds that a process which failed waits for the others to end with it
TOLD = 4096  # bytes that the first process tells the others at once

Value = TypeVar("Value")  # as JSON has it


def join(asked: bool) -> None:
    """Join the other processes of this run, if it was asked to be many.

    The flag ``--distributed`` asks for as many as the cluster says there are (TPU pods, Slurm, Open MPI,
    Kubernetes). The environment says it where no cluster does: ``OPD_PROCESSES`` processes, of which this
    one is ``OPD_PROCESS`` (from 0), meet at ``OPD_COORDINATOR`` (host:port of the first).

    Raises:
      InputError: the others cannot be found, or the environment says it in part. A run that was asked to
        be many never goes on alone.
    """
    count, number = _told(asked)
    if not asked and count < 2:
        return
    import jax

    # JAX would abort at its own end of patience, with a stack.
    given: dict[str, Any] = {"initialization_timeout": 2 * PATIENCE}
    if count:
        given |= {"coordinator_address": os.environ[PLACE], "num_processes": count, "process_id": number}
    try:
        with _patience():
            jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        raise InputError(_alone(" ".join(str(error).split())[:200])) from None
    if jax.process_count() == 1 or (count and jax.process_count() != count):
        raise InputError(
            f"a run that was asked to be many does not go on alone: {count or 'several'} processes were "
            f"asked for, {jax.process_count()} found; start the others, or ask for one process"
        )


def _alone(reason: str) -> str:
    return (
        f"a run of many processes needs them all: {reason}; start the others, or where no cluster says it "
        f"set {ASKED}, {NUMBER} and {PLACE} for each"
    )


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """End this process where the others do not come, and at the first Ctrl-C or SIGTERM until they do.

    They are waited for outside Python, where neither a handler of a signal nor an exception can act.
    """

    def leave() -> None:
        print(f"opd: {_alone(f'not all had come after {PATIENCE} seconds')}", file=sys.stderr, flush=True)
        os._exit(2)

    here = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if here else ()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    timer = threading.Timer(PATIENCE, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(asked: bool) -> tuple[int, int]:
    """How many processes the environment asks for, 0 if it does not, and which of them this one is."""
    told = {name: value for name in (ASKED, NUMBER, PLACE) if (value := os.environ.get(name))}
    if not told:
        return 0, 0
    if ASKED not in told:
        raise InputError(f"{min(told)} needs {ASKED} beside it: it is not set; set it, or unset {min(told)}")
    count = _whole(ASKED, 1, None)
    if count == 1:
        if asked:
            raise InputError(
                f"a run is many processes or one: --distributed and {ASKED}=1 were given; drop one of them"
            )
        return 1, 0
    for name in (PLACE, NUMBER):
        if name not in told:
            raise InputError(f"{ASKED} needs {name} beside it: it is not set; set it")
    place = re.fullmatch(r"(?:[^\s/:]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", told[PLACE])
    if not place or not 0 < int(place[1]) < 2**16:
        raise InputError(f"{PLACE} must be host:port of the first process: got {told[PLACE]!r}; correct it")
    return count, _whole(NUMBER, 0, count - 1)


def _whole(name: str, least: int, most: int | None) -> int:
    value = os.environ[name]
    if not value.isdecimal() or int(value) < least or (most is not None and int(value) > most):
        bounds = f"from {least}" + ("" if most is None else f" to {most}")
        raise InputError(f"{name} must be a whole number {bounds}: got {value!r}; set it to one")
    return int(value)


def is_first() -> bool:
    """Whether this process writes the files."""
    import jax

    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Go on once every process is here, so that what the first wrote is there for all."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def first_alone(act: Callable[[], Value]) -> Value:
    """Let the first process act, and tell all of them what came of it.

    Every process calls it at the same place of the program.

    Args:
      act: what the first process does; the others do not call it. It returns a JSON value.

    Raises:
      InputError: it did in the first process, or the disk failed there; in all of them alike.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return act()
    told = np.zeros(TOLD, np.uint8)
    if is_first():
        try:
            said = json.dumps({"value": act()})
        except InputError as error:
            said = json.dumps({"error": str(error)[: TOLD // 8]})
        except OSError as error:
            rule = f"files must be there to use: {error}; make room, or name others"
            said = json.dumps({"error": rule[: TOLD // 8]})
        told[: len(said)] = np.frombuffer(said.encode(), np.uint8)
    heard = json.loads(multihost_utils.broadcast_one_to_all(told).tobytes().rstrip(b"\0"))
    if "error" in heard:
        raise InputError(heard["error"])
    return heard["value"]


def end_soon(status: int) -> None:
    """Make sure that this process, which failed, ends: with the others, or soon after without them.

    A process that ends as it should waits for the others to do so too, which they never do where they wait
    for this one. Once it is gone their runtimes notice, and end them.
    """
    if "jax" not in sys.modules:
        return
    import jax

    if not jax.distributed.is_initialized():
        return

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    timer = threading.Timer(GRACE, leave)
    timer.daemon = True
    timer.start()


def agreed(stop: Callable[[], bool]) -> Callable[[], bool]:
    """``stop``, true for all processes at once as soon as it is true for one.

    It must be asked at the same places of the program in every process.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return stop
    return lambda: bool(np.any(multihost_utils.process_allgather(np.array(stop()))))
