"""Stored rollouts one by one, without loading the store: random access to parquet shards."""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opd_jax.errors import InputError
from opd_jax.rollout.schema import values_of
from opd_jax.rollout.store import Rollout, Score

_ROLLOUT = tuple(name for name in Rollout.__dataclass_fields__ if name != "score")
_SCORE = tuple(name for name in Score.__dataclass_fields__ if name != "teacher_hidden")


class RolloutSource:
    """Rollout i of parquet shards, in the order of the files and of the rows within them.

    A row group is the least that parquet reads, so it is what one rollout costs; the newest few stay in
    memory for those who read in order. Threads may share a source.

    Args:
      files: the shards of a store in the order of its manifest, as `RolloutStore.files` has them.
      columns: of `Score`, those to read, by default all that are there but the teacher's hidden states; the
        others are None.
      held: row groups that stay in memory.

    Raises:
      InputError: a file is missing, or no parquet file of rollouts.
    """

    def __init__(
        self, files: Sequence[str | Path], columns: Sequence[str] | None = None, *, held: int = 4
    ) -> None:
        self._wanted = {*_ROLLOUT, *(_SCORE if columns is None else columns)}
        self._held, self._lock = held, threading.Lock()
        self._groups: OrderedDict[int, Mapping[str, Any]] = OrderedDict()
        self._metadata: list[pq.FileMetaData] = []
        self._starts: list[int] = []  # number of the first rollout of each row group
        self._places: list[tuple[int, int]] = []  # its file, and which of the file's row groups it is
        self.shards: list[tuple[Path, int]] = []  # each file and its rollouts
        count = 0
        for number, file in enumerate(map(Path, files)):
            with _reading(file):
                metadata = pq.read_metadata(file)
            self._metadata.append(metadata)
            self.shards.append((file, metadata.num_rows))
            for group in range(metadata.num_row_groups):
                self._starts.append(count)
                self._places.append((number, group))
                count += metadata.row_group(group).num_rows
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"RolloutSource({self._count} rollouts in {len(self.shards)} files)"

    def __getitem__(self, index: Any) -> Rollout:
        """Rollout ``index``, counted from 0 over all files; its arrays are its own."""
        index = range(self._count)[index]
        place = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[place]
        return _rollout({name: column[row] for name, column in self._group(place).items()})

    def _group(self, place: int) -> Mapping[str, Any]:
        """The columns of a row group, a sequence each."""
        with self._lock:
            if place in self._groups:
                self._groups.move_to_end(place)
                return self._groups[place]
        number, group = self._places[place]
        file, _ = self.shards[number]
        with _reading(file), pq.ParquetFile(file, metadata=self._metadata[number]) as reader:
            names = [name for name in reader.schema_arrow.names if name in self._wanted]
            table = reader.read_row_group(group, columns=names, use_threads=False)
            columns = {name: values_of(name, table[name].combine_chunks()) for name in names}
        with self._lock:
            self._groups[place] = columns
            while len(self._groups) > self._held:
                self._groups.popitem(last=False)
        return columns


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"a shard must be a parquet file of rollouts: {file} is not ({error}); restore it"
        ) from None


def _rollout(row: Mapping[str, Any]) -> Rollout:
    """A rollout from its columns, copied, so that it does not keep its row group in memory."""

    def own(value: Any) -> Any:
        return value.copy() if isinstance(value, np.ndarray) else value

    score = None
    if "old_logprobs" in row:
        score = Score(**{name: own(row.get(name)) for name in _SCORE})
    return Rollout(**{name: own(row[name]) for name in _ROLLOUT}, score=score)
