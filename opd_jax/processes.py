"""One run by many processes: joining them, agreeing, and who writes.

Every process runs the same program over the same global arrays; files are written by the first alone, on
a file system that all of them see.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from opd_jax.errors import InputError

ASKED = "OPD_PROCESSES"  # environment: how many processes a run is made of


def join(asked: bool) -> None:
    """Join the other processes of this run, if it was asked to be many.

    The flag ``--distributed`` asks for as many as the cluster says there are (TPU pods, Slurm, Open MPI,
    Kubernetes). The environment says it where no cluster does: ``OPD_PROCESSES`` processes, of which this
    one is ``OPD_PROCESS`` (from 0), meet at ``OPD_COORDINATOR`` (host:port of the first).

    Raises:
      InputError: the others cannot be found. A run that was asked to be many never goes on alone.
    """
    wanted = os.environ.get(ASKED, "")
    if not wanted and not asked:
        return
    import jax

    if not wanted.isdigit() and wanted:
        raise InputError(f"{ASKED} must be a whole number: got {wanted!r}; set how many processes there are")
    count = int(wanted or 0)
    if count == 1:
        if asked:
            raise InputError(
                f"a run is many processes or one: --distributed and {ASKED}=1 were given; drop one of them"
            )
        return
    try:
        if count == 0:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(
                coordinator_address=_told("OPD_COORDINATOR"),
                num_processes=count,
                process_id=int(_told("OPD_PROCESS")),
            )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"a run of many processes needs them all: {reason}; start the others, or ask for one process"
        ) from None
    if jax.process_count() == 1 or (count and jax.process_count() != count):
        raise InputError(
            f"a run that was asked to be many does not go on alone: {count or 'several'} processes were "
            f"asked for, {jax.process_count()} found; start the others, or ask for one process"
        )


def _told(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InputError(f"{ASKED} needs {name} beside it: it is not set; set it")
    return value


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
