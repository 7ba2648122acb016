"""Stored rollouts: parquet shards that any tool opens, and a manifest that vouches for them.

A store is a folder, or a prefix of an object store:

    .manifest.json           what the store belongs to; of each sealed round its shards with their SHA-256
    round-00000/part-*       the shards of a sealed round, in order
    .round-00000/part-*      parts of a round that is not sealed yet; other tools pass them by

`append` writes a part that is on disk when it returns and bears its digest in its name, so that a process
may be killed at any moment: whoever opens the store again finds the whole parts (`pending`) and goes on.
`seal` makes a round visible: its parts are moved into place together, and the manifest, written last, names
them. Shards never change. Every file says of itself which store, round and part it is.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from opd_jax.errors import InputError
from opd_jax.rollout.manifest import MANIFEST, ManifestFile, refuse_others
from opd_jax.rollout.schema import (
    SCHEMA_VERSION,
    Rollout,
    Score,
    check_alike,
    check_rollout,
    decode,
    encode,
    said_by,
)
from opd_jax.rollout.storage import digest_of, is_whole, open_place, part_name

__all__ = ["MANIFEST", "SCHEMA_VERSION", "Rollout", "RolloutStore", "Score"]

DAMAGED = ".damaged"  # folder of parts that were not whole, which tools pass by


class RolloutStore:
    """An append-only store of rollouts.

    It is locked by the first `append` until `seal` or `close`; as a context manager, for as long as that.
    Reading takes no lock.

    Args:
      path: a folder, or the URL of an object store (``gs://``, ``s3://``, ``memory://``).
      about: what the store belongs to, as JSON values. A store that says otherwise is refused.
      accept: what the store may say otherwise, each by name and value: ``"temperature=0.7"``. Of a digest
        the first 12 characters will do.

    Raises:
      InputError: the store was written for something else, or its manifest is damaged or lost.
    """

    def __init__(
        self, path: str | Path, about: Mapping[str, Any] | None = None, accept: Sequence[str] = ()
    ) -> None:
        self.place = open_place(path)
        self.path = self.place.path
        self.about = json.loads(json.dumps(dict(about or {})))
        self._locked = self._entered = False
        self._numbers: dict[int, set[int]] = {}  # of the parts of rounds that are not sealed
        self._manifest = ManifestFile(self.place, self.about)
        self._refuse_orphans()
        refuse_others(self.path, self.about_store, self.about, accept)

    # What is sealed

    @property
    def about_store(self) -> dict[str, Any]:
        """What the store says it belongs to."""
        return dict(self._manifest.about)

    @property
    def rounds(self) -> list[int]:
        """The rounds sealed so far, in order."""
        return [entry["round"] for entry in self._manifest.rounds]

    @property
    def shards(self) -> list[dict[str, Any]]:
        """What the manifest says of the shards of all sealed rounds, in order."""
        return [dict(shard) for entry in self._manifest.rounds for shard in entry["shards"]]

    def shard(self, round_: int) -> dict[str, Any]:
        """What the manifest says of a sealed round: ``rows``, ``tokens``, ``shards``, what `seal` was told.

        Raises:
          InputError: the round is not in the store.
        """
        for entry in self._manifest.rounds:
            if entry["round"] == round_:
                return copy.deepcopy(entry)
        raise InputError(
            f"a round must be in the store to be read: {self.path} has rounds {self.rounds}, "
            f"not {round_}; sample and score it first"
        )

    def read(self, round_: int) -> list[Rollout]:
        """The rollouts of a sealed round in the order they were appended, verified first.

        Raises:
          InputError: the round is not there, or a shard is missing, changed, or no parquet file of rollouts.
        """
        shards = self.shard(round_)["shards"]
        return [
            rollout for shard in shards for rollout in self._decoded(shard["file"], self._verified(shard))
        ]

    def verify(self) -> None:
        """Compare every shard with its SHA-256, and look for files that tools would read beside them.

        Raises:
          InputError: a shard is missing or changed, a file is no shard of this store, or there is no
            manifest; the message names the file.
        """
        self._refuse_orphans()
        shards, rounds = self.shards, self.rounds
        for shard in shards:
            self.check(shard)
        known = {shard["file"] for shard in shards}
        # Where nothing is staged, or a process was killed before the manifest, parts are visible.
        for round_ in set(self._all_parts().values()) - set(rounds):
            known.update(f"{_folder(round_)}/{Path(name).name}" for name, _ in self._parts(round_))
        for name in self.place.all_names():
            if name not in known and not any(part.startswith(".") for part in name.split("/")):
                raise InputError(
                    f"a store holds its own shards alone: {self.path}/{name} is not in the "
                    "manifest; take it away"
                )

    def check(self, shard: Mapping[str, Any]) -> None:
        """Compare a shard, as `shards` has it, with its SHA-256, some of it in memory at a time.

        Raises:
          InputError: it is missing or changed; the message names the file.
        """
        digest = hashlib.sha256()
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            self.place.open(shard["file"]) as file,
        ):
            while piece := file.read(1 << 22):
                digest.update(piece)
        if digest.hexdigest() != shard["sha256"]:
            self._verified(shard)  # which says what is wrong

    def _verified(self, shard: Mapping[str, Any]) -> bytes:
        file = f"{self.path}/{shard['file']}"
        try:
            data, _ = self.place.read(shard["file"])
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"every shard must be there: {file} is missing; restore it from a copy"
            ) from None
        if digest_of(data) != shard["sha256"]:
            what, told = "has another SHA-256 than the manifest", said_by(data)
            if told and (told["about"], _folder(told["round"])) != (
                self.about_store,
                str(Path(shard["file"]).parent),
            ):
                what = "is a shard of another store or round"
            elif len(data) < shard["bytes"]:
                what = f"is cut off, at {len(data)} of {shard['bytes']} bytes"
            raise InputError(f"a shard must be as it was written: {file} {what}; restore it from a copy")
        return data

    def _decoded(self, name: str, data: bytes) -> list[Rollout]:
        file = f"{self.path}/{name}"
        try:
            rollouts = decode(data)
        except ValueError as error:
            raise InputError(
                f"a shard must be a parquet file of rollouts: {file} is not ({error}); restore it"
            ) from None
        for index, rollout in enumerate(rollouts):
            check_rollout(rollout, f"row {index} of {file}")
        return rollouts

    # What is not sealed yet

    def append(self, rollouts: Sequence[Rollout], **made_by: Any) -> None:
        """Add a part of a round; it is on disk when this returns.

        Args:
          rollouts: of one round or of several, each of which gets a part.
          made_by: what drew or scored them, as JSON values: the parts of a round must agree on it.

        Raises:
          InputError: a rollout cannot be stored as it is (`opd_jax.rollout.schema.check_rollout`) or has
            other columns than the rest, the round is sealed already, another process writes, the manifest
            is gone, or the place has no room.
        """
        for rollout in rollouts:
            check_rollout(rollout, f"a rollout of problem {rollout.problem!r}")
        if not rollouts:
            return
        with self._writing():
            self._append(rollouts, made_by)

    def _append(self, rollouts: Sequence[Rollout], made_by: Mapping[str, Any]) -> None:
        manifest, version = self._manifest.read()
        if version is None:  # from here on the store says whose it is
            self._manifest.write(manifest, None)
        self._refuse_additions(manifest)
        for round_ in dict.fromkeys(rollout.round for rollout in rollouts):
            _refuse_sealed(manifest, round_, self.path)
            chosen = [rollout for rollout in rollouts if rollout.round == round_]
            check_alike(chosen)
            if round_ not in self._numbers:  # nobody else adds to them while the store is locked
                self._numbers[round_] = {_number(name) for name, _ in self._parts(round_, made_by)}
            taken = self._numbers[round_]
            # A part that was lost is made again in its place.
            number = min(set(range(len(taken) + 1)) - taken)
            says = {
                "schema": SCHEMA_VERSION,
                "about": manifest["about"],
                "round": round_,
                "part": number,
                "made_by": made_by,
                "rows": len(chosen),
                "tokens": sum(len(rollout.response_ids) for rollout in chosen),
            }
            data = encode(chosen, says)
            name = part_name(f"part-{number:05d}", data, ".parquet")
            # One that is there already is this very part, put by a request whose answer was lost.
            with contextlib.suppress(FileExistsError):
                self.place.create(f"{self.place.staged(_folder(round_))}/{name}", data)
            taken.add(number)

    def _refuse_additions(self, manifest: Mapping[str, Any]) -> None:
        for name, expected in self.about.items():
            if manifest["about"].get(name) != expected:
                raise InputError(
                    f"rollouts of one {name} are not added to those of another: {self.path} was written for "
                    f"{manifest['about'].get(name)!r}; name a new folder"
                )

    def pending(self, round_: int, **made_by: Any) -> list[Rollout]:
        """The rollouts of a round that is not sealed yet, verified, in the order of their parts.

        A part that is not whole counts for nothing; who holds the lock sets it aside, and says so.

        Args:
          round_: which round.
          made_by: what `append` was told, if it matters.

        Raises:
          InputError: a part was made by something else, or for another store; the message names it.
        """
        _refuse_sealed(self._manifest.read()[0], round_, self.path)
        parts = self._parts(round_, made_by or None)
        return [rollout for name, data in parts for rollout in self._decoded(name, data)]

    def discard(self, round_: int) -> None:
        """Take away the parts of a round that is not sealed, which can be had again.

        Raises:
          InputError: the round is sealed, or the store is of something else.
        """
        with self._writing():
            manifest, _ = self._manifest.read()
            _refuse_sealed(manifest, round_, self.path)
            self._refuse_additions(manifest)
            self._numbers.pop(round_, None)
            for name in self._part_names(round_):
                self.place.remove(name)

    def seal(self, round_: int, **about: Any) -> None:
        """Make what was appended to a round visible, and the round complete.

        Args:
          round_: which round; each is sealed once.
          about: recorded with the round, as JSON values.

        Raises:
          InputError: the round is there already, there is nothing to seal, or another process writes.
        """
        with self._writing(last=True):
            manifest, version = self._manifest.read()
            _refuse_sealed(manifest, round_, self.path)
            shards = []
            for index, (name, data) in enumerate(self._parts(round_)):
                if _number(name) != index:
                    raise InputError(
                        f"a round is sealed whole: part {index} of round {round_} in {self.path} is lost; "
                        "append it again"
                    )
                told = said_by(data)
                shards.append(
                    {
                        "file": f"{_folder(round_)}/{name.rpartition('/')[2]}",
                        "rows": told["rows"],
                        "tokens": told["tokens"],
                        "bytes": len(data),
                        "sha256": digest_of(data),
                    }
                )
            if not shards:
                raise InputError(f"a round must have rows: round {round_} has none; append rollouts first")
            self.place.publish(_folder(round_))
            counts = {name: sum(shard[name] for shard in shards) for name in ("rows", "tokens")}
            entry = json.loads(json.dumps({"round": round_, **counts, "shards": shards, **about}))
            rounds = sorted([*manifest["rounds"], entry], key=lambda entry: entry["round"])
            self._manifest.write({**manifest, "rounds": rounds}, version)

    def _part_names(self, round_: int) -> list[str]:
        final = _folder(round_)
        folders = dict.fromkeys((self.place.staged(final), final))
        return sorted(
            (name for folder in folders for name in self.place.names(folder)),
            key=lambda name: name.rpartition("/")[2],
        )

    def _parts(self, round_: int, made_by: Mapping[str, Any] | None = None) -> Iterator[tuple[str, bytes]]:
        """The whole parts of a round that is not sealed, by number; who holds the lock sets others aside."""
        about, wanted = self.about_store, json.loads(json.dumps(made_by))
        for name in self._part_names(round_):
            file = f"{self.path}/{name}"
            if _number(name) < 0:
                raise InputError(
                    f"a round that is not sealed holds its parts alone: {file} is none; take it away"
                )
            data, _ = self.place.read(name)
            if not is_whole(name, data):
                if self._locked:
                    self._set_aside(name, data)
                continue
            told = said_by(data)
            if (told.get("about"), told.get("round"), told.get("part")) != (about, round_, _number(name)):
                raise InputError(
                    f"a store holds its own parts alone: {file} is of another store or round; take it away"
                )
            if wanted is not None and told.get("made_by") != wanted:
                raise InputError(
                    f"the parts of a round are made by one and the same: {file} was made by "
                    f"{told.get('made_by')}, this run has {wanted}; remove it to make it again"
                )
            yield name, data

    def _set_aside(self, name: str, data: bytes) -> None:
        """Put a part that is not whole where tools pass by, and say so."""
        stem = str(Path(name).with_suffix("")).removeprefix(".").replace("/", "-")
        aside = f"{DAMAGED}/{part_name(stem, data, '.parquet')}"
        with contextlib.suppress(FileExistsError):
            self.place.create(aside, data)
        self.place.remove(name)
        print(
            f"opd: a part must be as it was written: {self.path}/{name} is not, by the digest in its name; "
            f"it is kept as {aside} and made again",
            file=sys.stderr,
        )

    def _all_parts(self) -> dict[str, int]:
        """The round of every shard and part that lies here, in the manifest or not, by name."""
        found = ((name, re.match(r"\.?round-(\d{5,})/part-", name)) for name in self.place.all_names())
        return {name: int(match[1]) for name, match in found if match}

    def _refuse_orphans(self) -> None:
        unvouched = self._manifest.read()[1] is None and self._all_parts()
        # Read again: another may have begun the store in between.
        if unvouched and self._manifest.read()[1] is None:
            raise InputError(
                f"a store's shards are vouched for by its manifest: {self.path} has {min(unvouched)} and no "
                f"{MANIFEST}; restore it from a copy, or name a new folder"
            )

    # Who may write

    @contextlib.contextmanager
    def _writing(self, last: bool = False) -> Iterator[None]:
        """Hold the lock; it stays held afterwards, but after what fails and what is the last."""
        self._lock()
        try:
            yield
        except BaseException:
            last = True
            raise
        finally:
            if last and not self._entered:
                self.close()

    def _lock(self) -> None:
        if not self._locked:
            self.place.lock()
            self._locked = True
            try:  # which another writer may have lost meanwhile
                self._refuse_orphans()
            except InputError:
                self.close()
                raise

    def close(self) -> None:
        """Let others write."""
        if self._locked:
            self.place.unlock()
            self._locked = False
            self._numbers.clear()

    def __enter__(self) -> RolloutStore:
        self._lock()
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered = False
        self.close()


def _folder(round_: int) -> str:
    return f"round-{round_:05d}"


def _number(name: str) -> int:
    """Which part of its round a file is; -1 for a name that is none of ours."""
    found = re.fullmatch(r"part-(\d{5,})-[0-9a-f]{16}\.parquet", name.rpartition("/")[2])
    return int(found[1]) if found else -1


def _refuse_sealed(manifest: Mapping[str, Any], round_: int, path: object) -> None:
    if round_ in [entry["round"] for entry in manifest["rounds"]]:
        raise InputError(f"a round is written once: {path} has round {round_} already; read it instead")
