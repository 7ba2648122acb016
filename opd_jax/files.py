"""Writing files whole, and naming them by content."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from opd_jax.errors import InputError

_UMASK = os.umask(0)
os.umask(_UMASK)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write ``path`` so that readers see the old file or the whole new one, never a part.

    Yields a temporary path in the same folder; on a clean exit it is synced to disk and moved into
    place, on an exception it is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)  # some writers create files that only their owner can read
        os.replace(temporary, path)
        sync(path.parent)  # the move itself must survive a power cut
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of a file that is there for nothing else; it is free when the process ends, however.

    The file goes with it, unless the process was killed.

    Raises:
      InputError: another holds it; ``refusal`` says so.
    """
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(refusal) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            # Whoever held it removed it in between: a lock that nobody else will find.
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing_folder(folder: Path, ours: Sequence[str]) -> Iterator[Path]:
    """Write a folder so that readers see the old one or the whole new one, never a mixture.

    Yields a folder beside it, ``.NAME.part``, with copies of those old files whose names match none of the
    patterns ``ours``. On a clean exit it is synced to disk and put in place by two renames: the old
    folder becomes ``.NAME.old``, the new one ``NAME``. A process killed between the two leaves the old
    one whole under ``.NAME.old``, and `restore_folder` puts it back. ``.NAME.part`` is never read; the
    next writer removes what a killed one left there. ``.NAME.lock`` lets one writer in at a time.

    Raises:
      InputError: the folder is none that can be replaced, or another process is writing it; nothing is
        written then.
    """
    folder = folder.resolve()
    part, old = _beside(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    others = f"a folder is written by one process at a time: another is writing {folder}; wait for it to end"
    with locked(_lock_of(folder), others):
        _restore(folder)
        theirs = _theirs(folder, ours)
        _discard(folder)
        part.mkdir()
        try:
            for file in theirs:
                shutil.copyfile(file, part / file.name)
            yield part
            for path in (*part.rglob("*"), part):
                sync(path)
            if folder.exists():
                os.rename(folder, old)
            os.rename(part, folder)
            sync(folder.parent)
        except BaseException:
            _restore(folder)
            _discard(folder)
            raise
        _discard(folder)


def _theirs(folder: Path, ours: Sequence[str]) -> list[Path]:
    """The files of a folder that are to stay in it."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise InputError(f"a folder cannot take the place of a file: {folder} is one; choose another name")
    if folder.is_mount() or Path.cwd().is_relative_to(folder):
        raise InputError(
            "a folder that is replaced whole can be neither a mount point nor around the working folder: "
            f"{folder} is; name a new folder inside it"
        )
    entries = sorted(folder.iterdir())
    for entry in entries:
        if entry.is_dir():
            raise InputError(
                f"a folder that is replaced whole can hold files only: {folder} holds the folder "
                f"{entry.name}; move that elsewhere, or name a new folder"
            )
    return [entry for entry in entries if not any(entry.match(pattern) for pattern in ours)]


def restore_folder(folder: Path) -> None:
    """Put the old folder back if `replacing_folder` was killed between its two renames."""
    folder = folder.resolve()
    if not folder.exists() and _beside(folder)[1].is_dir():
        # A writer that is between them now ends what it began; a folder that cannot be written is read as is.
        with contextlib.suppress(InputError, OSError), locked(_lock_of(folder), "it is being written"):
            _restore(folder)


def _restore(folder: Path) -> None:
    _, old = _beside(folder)
    if old.is_dir() and not folder.exists():
        os.rename(old, folder)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")


def _discard(folder: Path) -> None:
    """Remove what writers left beside a folder; the half-removed never bears the name of the whole."""
    part, old = _beside(folder)
    shutil.rmtree(part, ignore_errors=True)
    if old.exists() and folder.exists():
        os.rename(old, part)
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one piece."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """Text of a file.

    Raises:
      InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"a file must be readable UTF-8 text: {path} is not ({error}); restore it") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
