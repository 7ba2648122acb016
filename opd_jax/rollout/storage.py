"""Where a store's files lie: a local folder, or an object store by URL.

Files are small in number, written once and whole, and named relative to the place. What a place promises:

    create    the file is there whole, and synced, or not at all; one that is there already stays
    update    the file is replaced whole, and only if it is still the version that was read
    lock      one writer at a time
    publish   the files of a folder that tools pass by are where tools find them
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

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

    def version(self, name: str) -> Any:
        """The version that `read` would tell, without the content; None where there is no file."""

    def open(self, name: str) -> BinaryIO:
        """A file to read some of at a time; FileNotFoundError where there is none."""

    def create(self, name: str, data: bytes) -> None:
        """Write a new file whole; FileExistsError where there is one."""

    def update(self, name: str, data: bytes, version: Any) -> Any:
        """Replace a file that is still of a version, or create it where that is None; its new version."""

    def names(self, folder: str) -> list[str]:
        """Names of the whole files in a folder, in order; none where there is no folder."""

    def all_names(self) -> list[str]:
        """Names of all files, those that tools pass by included, in order."""

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
      InputError: a URL is none of an object store, or what reads object stores is not installed.
    """
    if str(path).partition("/")[0].endswith(":"):  # a URL, even one that lost a slash
        from opd_jax.rollout.objects import ObjectPlace  # which is a place itself

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
        with self.open(name) as file:
            return file.read(), _version(os.fstat(file.fileno()))

    def version(self, name: str) -> Any:
        try:
            return _version((self.path / name).stat())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> BinaryIO:
        try:
            return (self.path / name).open("rb")
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise InputError(
                f"a store's files must be there to be read: {self.path / name} is not ({error.strerror}); "
                "restore it from a copy, or give leave"
            ) from None

    def create(self, name: str, data: bytes) -> None:
        if (self.path / name).exists():
            raise FileExistsError(self.path / name)
        self._write(self.path / name, data)

    def update(self, name: str, data: bytes, version: Any) -> Any:
        file = self.path / name
        if self.version(name) != version:
            raise changed(file)
        self._write(file, data)
        return self.version(name)

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

    def all_names(self) -> list[str]:
        found = (Path(folder, file) for folder, _, files in os.walk(self.path) for file in files)
        return sorted(file.relative_to(self.path).as_posix() for file in found)

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


def changed(what: object) -> InputError:
    """What a writer is told whose file another has written since."""
    return InputError(
        f"one writer at a time works on a store: {what} has changed since it was read; see who else writes "
        "there, and go on after that"
    )


def _version(told: os.stat_result) -> tuple[int, ...]:
    """Of a file: one that is replaced has another inode, and nearly always another time and size."""
    return told.st_ino, told.st_mtime_ns, told.st_size


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
