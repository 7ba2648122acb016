"""What the lock of an object store says: who holds it."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from typing import Any

from opd_jax.rollout.storage import digest_of


def owned() -> bytes:
    """A lock that this process holds."""
    owner = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "token": secrets.token_hex(8),
    }
    return json.dumps(owner).encode()


def owner_in(held: bytes) -> dict[str, Any] | None:
    """Who holds a lock, as `owned` puts it; None where the lock does not say."""
    try:
        owner = json.loads(held)
        kinds = [type(owner[name]) for name in ("host", "process", "since", "token")]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return owner if kinds == [str, int, str, str] else None


def token_of(held: bytes) -> str:
    """What a lock is broken by: its token, or a digest of one that has none."""
    owner = owner_in(held)
    return owner["token"] if owner else digest_of(held)[:16]


def is_alive(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is there, and another user's
        pass
    return True
