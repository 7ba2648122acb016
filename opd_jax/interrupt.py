"""Stopping a run at a place from which it can go on."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Asked wherever a run may stop without losing work; true once the user wants it to.
Stop = Callable[[], bool]


def never() -> bool:
    """A user who does not want to stop."""
    return False


class Interrupted(Exception):
    """The run stopped at the user's wish, with everything done so far on disk."""


@contextlib.contextmanager
def stop_on_signal(*, at_once: bool = False) -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; the second, or the first, acts at once."""
    requested = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if at_once or requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        print("\nopd: stopping at the next safe place; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
