"""Stored rollouts one by one, without loading the store: random access to parquet shards."""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opd_jax.errors import InputError
from opd_jax.rollout.rows import lengths_of
from opd_jax.rollout.schema import HIDDEN, ROLLOUT, SCORE, values_of
from opd_jax.rollout.store import Rollout, RolloutStore, Score

_SCORE = [name for name in SCORE if name != HIDDEN]


class _Opened(NamedTuple):
    """What stays in memory of a shard that was verified."""

    starts: list[int]  # row of the shard that each row group begins with
    lengths: np.ndarray  # [rows] int32: positions that each rollout takes


class RolloutSource:
    """Rollout i of a store, in the order of its rounds and of the rows within them.

    Its memory is a few row groups of the columns that are asked for, whatever the store holds. A row group
    is the least that parquet reads, so it is what one rollout costs; the newest few stay in memory for those
    who read in order. A shard is compared with its SHA-256 when something of it is first asked for; its pages
    bear checksums, which tell what becomes of it later. Threads may share a source.

    Args:
      store: of whose sealed rounds the rollouts are, as it is now.
      columns: of `Score`, those to read, the teacher's hidden states excepted; the others are None, and so is
        the score where none is named.
      held: row groups that stay in memory.

    Raises:
      InputError: a column is none of `Score`; later, a shard is missing, changed, or without a column.
    """

    def __init__(self, store: RolloutStore, columns: Sequence[str] = (), *, held: int = 4) -> None:
        for name in columns:
            if name not in _SCORE:
                raise InputError(
                    f"a column must be one that is fed: got {name!r}; choose from {', '.join(_SCORE)}"
                )
        self._store, self._columns = store, [*ROLLOUT, *columns]
        self._held, self._lock, self._opening = held, threading.Lock(), threading.Lock()
        self._groups: OrderedDict[tuple[int, int], Mapping[str, Any]] = OrderedDict()
        self._opened: dict[int, _Opened] = {}
        self.shards = store.shards
        self._starts = [0, *accumulate(shard["rows"] for shard in self.shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        return f"RolloutSource({len(self)} rollouts in {len(self.shards)} shards of {self._store.path})"

    def __getitem__(self, index: Any) -> Rollout:
        """Rollout ``index``, counted from 0 over all shards; its arrays are its own."""
        shard, row = self._place(index)
        starts = self._open(shard).starts
        group = bisect.bisect_right(starts, row) - 1
        columns = self._group(shard, group)
        return _rollout({name: column[row - starts[group]] for name, column in columns.items()})

    def length(self, index: Any) -> int:
        """Positions that rollout ``index`` takes in a row, P + R - 1, without its columns."""
        shard, row = self._place(index)
        return int(self._open(shard).lengths[row])

    def _place(self, index: Any) -> tuple[int, int]:
        """Shard of a rollout, and its row there."""
        index = range(len(self))[index]
        shard = bisect.bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _open(self, number: int) -> _Opened:
        """A shard, verified once."""
        with self._opening:
            if number not in self._opened:
                self._store.check(self.shards[number])
                with self._reading(number) as reader:
                    self._opened[number] = self._looked_at(reader, number)
            return self._opened[number]

    def _looked_at(self, reader: pq.ParquetFile, number: int) -> _Opened:
        for name in self._columns:
            if name not in reader.schema_arrow.names:
                raise InputError(
                    f"a shard must have the columns that are read: {self._file(number)} has no {name}; score "
                    "what has no scores, or ask for columns that are there"
                )
        groups = range(reader.metadata.num_row_groups)
        lengths = [
            lengths_of(*(self._read(reader, group, [name])[name] for name in ("prompt_ids", "response_ids")))
            for group in groups
        ]
        starts = [0, *accumulate(reader.metadata.row_group(group).num_rows for group in groups)]
        if starts[-1] != self.shards[number]["rows"]:
            raise InputError(
                f"a shard must have the rows that the manifest says: {self._file(number)} has {starts[-1]}, "
                f"not {self.shards[number]['rows']}; restore it from a copy"
            )
        return _Opened(starts[:-1], np.concatenate(lengths).astype(np.int32))

    def _group(self, number: int, group: int) -> Mapping[str, Any]:
        """The columns of a row group, a sequence each."""
        place = number, group
        with self._lock:
            if place in self._groups:
                self._groups.move_to_end(place)
                return self._groups[place]
        with self._reading(number) as reader:  # whose footers would fill the memory, were they all kept
            columns = self._read(reader, group, self._columns)
        with self._lock:
            self._groups[place] = columns
            while len(self._groups) > self._held:
                self._groups.popitem(last=False)
        return columns

    def _read(self, reader: pq.ParquetFile, group: int, names: list[str]) -> dict[str, Any]:
        table = reader.read_row_group(group, columns=names, use_threads=False)
        return {name: values_of(name, table[name].combine_chunks()) for name in names}

    @contextlib.contextmanager
    def _reading(self, number: int) -> Iterator[pq.ParquetFile]:
        try:
            with (
                self._store.place.open(self.shards[number]["file"]) as file,
                pq.ParquetFile(file, page_checksum_verification=True) as reader,
            ):
                yield reader
        except InputError:
            raise
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"a shard must be a parquet file of rollouts: {self._file(number)} is not ({error}); "
                "restore it"
            ) from None

    def _file(self, number: int) -> str:
        return f"{self._store.path}/{self.shards[number]['file']}"


def _rollout(row: Mapping[str, Any]) -> Rollout:
    """A rollout from its columns, copied, so that it does not keep its row group in memory."""

    def own(value: Any) -> Any:
        return value.copy() if isinstance(value, np.ndarray) else value

    score = None
    if any(name in row for name in _SCORE):
        score = Score(**{name: own(row.get(name)) for name in _SCORE})
    return Rollout(**{name: own(row[name]) for name in ROLLOUT}, score=score)
