"""Where a store's files lie: a local folder, or an object store by URL.

Files are small in number, written once and whole, and named relative to the place. What a place promises:

    create    the file is there whole, and synced, or not at all; one that is there already stays
    update    the file is replaced whole, and only if it is still the version that was read
    lock      one writer at a time
    publish   the files of a folder that tools pass by are where tools find them

Object stores are reached by `obstore`, which ``pip install 'opd_jax[objects]'`` brings; credentials and
endpoints come from the environment, as its documentation says.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import secrets
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from opd_jax.errors import InputError
from opd_jax.files import replacing, sync

LOCK = ".lock"


class Place(Protocol):
    """A folder of files, wherever it is. Names are relative, parted by slashes."""

    @property
    def path(self) -> Path | str:
        """The folder, or the URL."""

    def read(self, name: str) -> tuple[bytes, Any]:
        """A file's content, and its version; FileNotFoundError where there is none."""

    def create(self, name: str, data: bytes) -> None:
        """Write a new file whole; FileExistsError where there is one."""

    def update(self, name: str, data: bytes, version: Any) -> None:
        """Replace a file that is still of a version, or create it where the version is None."""

    def names(self, folder: str) -> list[str]:
        """Names of the whole files in a folder, in order; none where there is no folder."""

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""

    def staged(self, folder: str) -> str:
        """Where the files of a folder lie until they are published."""

    def publish(self, folder: str) -> None:
        """Make the staged files of a folder visible to tools that read all there is."""

    def lock(self) -> None:
        """Be the only writer, or raise InputError that names the other."""

    def unlock(self) -> None:
        """Let others write."""


def open_place(path: str | Path) -> Place:
    """The place that a path or URL names.

    Raises:
      InputError: an object store is named, and what reads it is not installed.
    """
    if "://" in str(path):
        return ObjectPlace(str(path))
    return LocalPlace(Path(path))


def digest_of(data: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()


def part_name(stem: str, data: bytes, suffix: str) -> str:
    """A name that vouches for what the file holds: one step makes the file and its digest durable."""
    return f"{stem}-{digest_of(data)[:16]}{suffix}"


def is_whole(name: str, data: bytes) -> bool:
    """Whether a file named by `part_name` holds what was written."""
    return Path(name).stem.rpartition("-")[2] == digest_of(data)[:16]


class LocalPlace:
    """A folder of a file system. It is locked by the kernel, which frees what a dead process held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: weakref.finalize | None = None

    def read(self, name: str) -> tuple[bytes, Any]:
        data = (self.path / name).read_bytes()
        return data, data

    def create(self, name: str, data: bytes) -> None:
        if (self.path / name).exists():
            raise FileExistsError(self.path / name)
        self._write(self.path / name, data)

    def update(self, name: str, data: bytes, version: Any) -> None:
        file = self.path / name
        if (file.read_bytes() if file.exists() else None) != version:
            raise _changed(file)
        self._write(file, data)

    def _write(self, file: Path, data: bytes) -> None:
        with _said(file):
            _make_folder(file.parent)
            with replacing(file) as temporary:
                temporary.write_bytes(data)

    def names(self, folder: str) -> list[str]:
        if not (self.path / folder).is_dir():
            return []
        files = (file for file in (self.path / folder).iterdir() if not file.name.startswith("."))
        return sorted(f"{folder}/{file.name}" for file in files)

    def remove(self, name: str) -> None:
        with _said(self.path / name):
            (self.path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still in it
                (self.path / name).parent.rmdir()

    def staged(self, folder: str) -> str:
        return f".{folder}"

    def publish(self, folder: str) -> None:
        staged, final = self.path / self.staged(folder), self.path / folder
        if not staged.exists():  # it was published by a process that was killed before it said so
            return
        with _said(final):
            if not final.exists():
                os.rename(staged, final)
            else:
                for file in staged.iterdir():
                    os.rename(file, final / file.name)
                staged.rmdir()
                sync(final)
            sync(self.path)

    def lock(self) -> None:
        with _said(self.path):
            _make_folder(self.path)
            held = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise InputError(
                f"one writer at a time works on a store: {self.path} is in use; wait, or name another folder"
            ) from None
        self._lock = weakref.finalize(self, os.close, held)  # which frees the lock
        for left in (
            *self.path.glob(".*.part"),
            *self.path.glob(".*/.*.part"),
        ):  # by a writer that was killed
            left.unlink(missing_ok=True)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock()
            self._lock = None


class ObjectPlace:
    """A prefix of an object store. It is locked by an object that only one writer can create.

    An object is put whole or not at all, so nothing is staged: a reader that goes by the manifest sees
    sealed rounds alone. A lock whose process is gone from this machine is taken over; one of another
    machine stays until `break_lock` is told to break it.
    """

    def __init__(self, url: str) -> None:
        self.path, self._mine = url.rstrip("/"), ""
        scheme, _, rest = self.path.partition("://")
        bucket, _, prefix = rest.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._bucket = _bucket(f"{scheme}://{bucket}")

    def read(self, name: str) -> tuple[bytes, Any]:
        import obstore

        with self._said(name):
            found = obstore.get(self._bucket, self._prefix + name)
            version = {name: found.meta.get(name) for name in ("e_tag", "version")}
            return bytes(found.bytes()), {name: value for name, value in version.items() if value}

    def create(self, name: str, data: bytes) -> None:
        with self._said(name):
            self._put(name, data, "create")

    def update(self, name: str, data: bytes, version: Any) -> None:
        from obstore.exceptions import PreconditionError

        try:
            with self._said(name):
                self._put(name, data, "create" if version is None else version)
        except (FileExistsError, PreconditionError):
            if self.read(name)[0] != data:  # or else it was we, and the answer was lost on the way
                raise _changed(f"{self.path}/{name}") from None

    def _put(self, name: str, data: bytes, mode: Any) -> None:
        import obstore

        try:
            obstore.put(self._bucket, self._prefix + name, data, mode=mode, use_multipart=False)
        except FileNotFoundError:
            raise InputError(
                f"the bucket of an object store must be there: {self.path} has none; create it, or "
                "check the URL"
            ) from None

    def names(self, folder: str) -> list[str]:
        import obstore

        with self._said(folder):
            pages = obstore.list(self._bucket, f"{self._prefix}{folder}/")
            paths = [entry["path"] for page in pages for entry in page]
        return sorted(path.removeprefix(self._prefix) for path in paths)

    def remove(self, name: str) -> None:
        import obstore

        with self._said(name), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._bucket, self._prefix + name)

    def staged(self, folder: str) -> str:
        return folder

    def publish(self, folder: str) -> None:
        pass

    def lock(self) -> None:
        mine = _owner()
        try:
            self.create(LOCK, mine.encode())
        except FileExistsError:
            held, version = self.read(LOCK)
            owner = json.loads(held)
            here = owner["host"] == socket.gethostname()
            if held.decode() != mine and not (here and not _is_alive(owner["process"])):
                raise InputError(
                    f"one writer at a time works on a store: {self.path} is held by process "
                    f"{owner['process']} on {owner['host']} since {owner['since']}; wait, or, if it is gone, "
                    f"break_lock({self.path!r}, {owner['token']!r}) of opd_jax.rollout"
                ) from None
            self.update(LOCK, mine.encode(), version)
        self._mine = mine

    def unlock(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._mine and self.read(LOCK)[0].decode() == self._mine:
                self.remove(LOCK)
        self._mine = ""

    @contextlib.contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """The errors of an object store as those of a folder, or in one line."""
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            yield
        except AlreadyExistsError:
            raise FileExistsError(f"{self.path}/{name}") from None
        except PreconditionError:
            raise
        except (BaseError, PermissionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"an object store must answer and let us in: {self.path}/{name} gives {reason}; check the "
                "URL and the credentials, and go on: what was finished is kept"
            ) from None


def break_lock(url: str, token: str) -> None:
    """Break the lock of an object store whose owner is gone.

    Args:
      url: the store.
      token: of the lock to break, as the refusal names it, so that no newer lock is broken.

    Raises:
      InputError: the store is not locked, or by another.
    """
    place = ObjectPlace(url)
    try:
        held = json.loads(place.read(LOCK)[0])
    except FileNotFoundError:
        raise InputError(f"a lock must be there to be broken: {url} has none; go on") from None
    if held["token"] != token:
        raise InputError(
            f"a lock is broken by its name: {url} is held by {held['token']}, not {token}; see that its "
            "process is gone"
        )
    place.remove(LOCK)


@functools.cache  # what is in memory is there once
def _bucket(url: str) -> Any:
    try:
        from obstore.store import MemoryStore, from_url
    except ImportError:
        raise InputError(
            f"object stores need obstore: it is not installed, and {url} is one; "
            "pip install 'opd_jax[objects]'"
        ) from None
    return MemoryStore() if url.startswith("memory://") else from_url(url)


def _owner() -> str:
    return json.dumps(
        {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "token": secrets.token_hex(8),
        }
    )


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, and another user's
        pass
    return True


def _changed(what: object) -> InputError:
    return InputError(
        f"one writer at a time works on a store: {what} has changed since it was read; see who else writes "
        "there, and go on after that"
    )


def _make_folder(folder: Path) -> None:
    """A folder, and those around it, on disk by name."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextlib.contextmanager
def _said(file: Path) -> Iterator[None]:
    """What a full disk or a read-only folder says, in one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"a store must have room, and leave to write: {file} could not be written "
            f"({error.strerror or error}); make room, or give leave, and go on: what was finished is kept"
        ) from None
