"""Stores in object stores: ``gs://``, ``s3://``, ``memory://``.

They are reached by `obstore`, which ``pip install 'opd_jax[objects]'`` brings; credentials and endpoints
come from the environment, as its documentation says.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import socket
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from opd_jax.errors import InputError
from opd_jax.rollout.locks import is_alive, owned, owner_in, token_of
from opd_jax.rollout.storage import LOCK, changed

# Those that replace an object on the condition that it is still what was read.
SCHEMES = ("gs", "s3", "memory")


class ObjectPlace:
    """A prefix of an object store. It is locked by an object that only one writer can create.

    An object is put whole or not at all, so nothing is staged: a reader that goes by the manifest sees
    sealed rounds alone. A lock whose process is gone from this machine is taken over; one of another
    machine stays until `break_lock` is told to break it.
    """

    def __init__(self, url: str) -> None:
        self.path, self._mine = url.rstrip("/"), b""
        scheme, _, rest = self.path.partition("://")
        bucket, _, prefix = rest.partition("/")
        if scheme not in SCHEMES or not bucket:
            raise InputError(
                f"a store is a folder by its path, or gs://, s3:// or memory:// with a bucket: got {url!r}; "
                "name one of these"
            )
        self._prefix = f"{prefix}/" if prefix else ""
        self._bucket = _bucket(f"{scheme}://{bucket}")

    def read(self, name: str) -> tuple[bytes, Any]:
        import obstore

        with self._said(name):
            found = obstore.get(self._bucket, self._prefix + name)
            return bytes(found.bytes()), _version(found.meta)

    def version(self, name: str) -> Any:
        import obstore

        try:
            with self._said(name):
                return _version(obstore.head(self._bucket, self._prefix + name))
        except FileNotFoundError:
            return None

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Object(self, name), buffer_size=1 << 20))

    def size(self, name: str) -> int:
        """Bytes of an object; FileNotFoundError where there is none."""
        import obstore

        with self._said(name):
            return int(obstore.head(self._bucket, self._prefix + name)["size"])

    def part(self, name: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` of an object, some at least."""
        import obstore

        with self._said(name):
            return bytes(obstore.get_range(self._bucket, self._prefix + name, start=start, end=end))

    def create(self, name: str, data: bytes) -> None:
        with self._said(name):
            self._put(name, data, "create")

    def update(self, name: str, data: bytes, version: Any) -> Any:
        from obstore.exceptions import PreconditionError

        try:
            with self._said(name):
                return self._put(name, data, "create" if version is None else version)
        except (FileExistsError, PreconditionError):
            there, version = self.read(name)
            if there != data:  # or else it was we, and the answer was lost on the way
                raise changed(f"{self.path}/{name}") from None
            return version

    def _put(self, name: str, data: bytes, mode: Any) -> Any:
        import obstore

        try:
            put = obstore.put(self._bucket, self._prefix + name, data, mode=mode, use_multipart=False)
        except FileNotFoundError:
            raise _no_bucket(self.path) from None
        except NotImplementedError as error:
            raise InputError(
                "an object store must put on a condition, so that no writer undoes another's work: "
                f"{self.path} does not ({_one_line(error)}); allow it, or name another"
            ) from None
        return _version(put)

    def names(self, folder: str) -> list[str]:
        return self._names(f"{folder}/")

    def all_names(self) -> list[str]:
        return self._names("")

    def _names(self, prefix: str) -> list[str]:
        import obstore

        with self._said(prefix):
            pages = obstore.list(self._bucket, f"{self._prefix}{prefix}")
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
        mine = owned()
        try:
            self.create(LOCK, mine)
        except FileExistsError:
            held, version = self.read(LOCK)
            owner = owner_in(held)
            if owner is None:
                raise InputError(
                    f"a lock must say who holds it: {self.path}/{LOCK} holds {held[:60]!r}; see that nobody "
                    f"writes there, and break_lock({self.path!r}, {token_of(held)!r}) of opd_jax.rollout"
                ) from None
            here = owner["host"] == socket.gethostname()
            if held != mine and not (here and not is_alive(owner["process"])):
                raise InputError(
                    f"one writer at a time works on a store: {self.path} is held by process "
                    f"{owner['process']} on {owner['host']} since {owner['since']}; wait, or, if it is gone, "
                    f"break_lock({self.path!r}, {owner['token']!r}) of opd_jax.rollout"
                ) from None
            self.update(LOCK, mine, version)
        self._mine = mine

    def unlock(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._mine and self.read(LOCK)[0] == self._mine:
                self.remove(LOCK)
        self._mine = b""

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
            if "NoSuchBucket" in str(error):  # as a list is answered
                raise _no_bucket(self.path) from None
            raise _silent(f"{self.path}/{name}", error) from None


class _Object(io.RawIOBase):
    """An object as a file of which only what is asked for is fetched."""

    def __init__(self, place: ObjectPlace, name: str) -> None:
        self._place, self._name, self._at = place, name, 0
        self._size = place.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._place.part(self._name, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


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
        held = token_of(place.read(LOCK)[0])
    except FileNotFoundError:
        raise InputError(f"a lock must be there to be broken: {url} has none; go on") from None
    if held != token:
        raise InputError(
            f"a lock is broken by its name: {url} is held by {held}, not {token}; see that its "
            "process is gone"
        )
    place.remove(LOCK)


@functools.cache  # what is in memory is there once
def _bucket(url: str) -> Any:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import MemoryStore, from_url
    except ImportError:
        raise InputError(
            f"object stores need obstore: it is not installed, and {url} is one; "
            "pip install 'opd_jax[objects]'"
        ) from None
    try:
        return MemoryStore() if url.startswith("memory://") else from_url(url)
    except (BaseError, ValueError) as error:  # of the URL, or of credentials that are files
        raise _silent(url, error) from None


def _no_bucket(path: str) -> InputError:
    return InputError(
        f"the bucket of an object store must be there: {path} has none; create it, or check the URL"
    )


def _silent(what: str, error: Exception) -> InputError:
    """What is said of an object store that gives an error."""
    return InputError(
        f"an object store must answer and let us in: {what} gives {_one_line(error)}; check the "
        "URL and the credentials, and go on: what was finished is kept"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _version(told: Any) -> dict[str, Any]:
    """What the store tells of an object, as what a put asks for."""
    return {name: told.get(name) for name in ("e_tag", "version") if told.get(name)}
