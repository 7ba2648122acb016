"""Saving and restoring the whole training state, through orbax."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from opd_jax.errors import InputError
from opd_jax.train.step import TrainState

# Orbax numbers its operations for the whole process: of runs that go on at once, one saves at a time.
_one_at_a_time = threading.RLock()

KEEP = 2  # checkpoints; a save that is cut short leaves the one before it whole


class Checkpoints:
    """Checkpoints of one run, named by the number of updates done."""

    def __init__(self, folder: Path, *, writing: bool) -> None:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"checkpoints must be a folder: {folder} is a file; restore the folder")
        self._folder = folder
        self._left_overs = writing  # of saves that were cut short; another process may be writing one
        self._checkpointer = self._open()

    def _open(self, *, clear: bool = False) -> ocp.training.Checkpointer:
        with _one_at_a_time:
            return ocp.training.Checkpointer(
                self._folder.absolute(),
                preservation_policy=ocp.training.preservation_policies.LatestN(KEEP),
                cleanup_tmp_directories=clear,
            )

    @property
    def latest(self) -> int | None:
        """Updates done at the newest committed checkpoint; None without one."""
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    def save(self, state: TrainState) -> None:
        """Commit a state to disk; returns when it is there. A step saved before is left alone.

        Raises:
          InputError: the disk is full, or the folder may not be written to.
        """
        update = int(state.update)
        if update != self.latest:
            with _one_at_a_time, _said(self._folder / str(update)):
                if self._left_overs:
                    # Cleared in a thread that saving waits for, and nothing else does: begun when opening, it
                    # would be cut off where a run is refused.
                    self._checkpointer.close()
                    self._checkpointer, self._left_overs = self._open(clear=True), False
                self._checkpointer.save(update, vars(state))

    def restore(self, like: Any) -> TrainState:
        """The newest state.

        Args:
          like: a `TrainState` of ``jax.ShapeDtypeStruct`` with shardings: what must come back.

        Raises:
          InputError: what is stored is not such a state.
        """
        try:
            with _one_at_a_time:
                restored = TrainState(**self._checkpointer.load(self.latest, vars(like)))
        except Exception as error:  # orbax and what it stands on raise many kinds
            reason = str(error).splitlines()[0][:200]
            raise InputError(
                f"a checkpoint must be whole and of this run: {self._folder / str(self.latest)} is not "
                f"({reason}); restore it, or remove it to go on from the one before"
            ) from None
        # Orbax casts silently when dtypes differ.
        for want, got in zip(jax.tree.leaves(like), jax.tree.leaves(restored), strict=True):
            if (want.shape, want.dtype) != (got.shape, got.dtype):
                raise InputError(
                    f"a checkpoint must be of this run's student: an array is {got.shape} {got.dtype}, "
                    f"not {want.shape} {want.dtype}; use the run folder it was made in"
                )
        return restored

    def close(self) -> None:
        with _one_at_a_time, _quiet(), contextlib.suppress(ValueError):  # of a save that failed, and said so
            self._checkpointer.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that orbax's threads log, each its own, of what is raised all the same."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _said(checkpoint: Path) -> Iterator[None]:
    """What a full disk or a read-only folder says, in one line."""
    try:
        with _quiet():
            yield
    except (OSError, ValueError) as error:
        # tensorstore raises ValueError, and says so where it was the system that refused.
        if not isinstance(error, OSError) and "os_error_code" not in str(error):
            raise
        reason = " ".join(str(error).rpartition('": ')[2].split())[:200]
        raise InputError(
            f"a checkpoint must have room, and leave to write: {checkpoint} could not be written ({reason}); "
            "make room, or give leave, and go on: what was finished is kept"
        ) from None
