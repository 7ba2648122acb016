"""Rows of a file or folder: JSON lines, parquet, and what `datasets` saved; nothing is fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd_jax.errors import InputError
from opd_jax.files import read_text
from opd_jax.tasks.layouts import LAYOUTS, NAMING, layout_of

HUB = "hf:"  # hf:OWNER/NAME is a data set of the Hugging Face hub, if it lies in the local cache
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")

Row = tuple[str, dict[str, Any]]  # where it stands, in words; its fields by lower-case name


def rows_of_source(source: str | Path) -> tuple[str, Iterator[Row]]:
    """The layout of a source of problems, and its rows one by one.

    Args:
      source: a ``.jsonl`` or ``.parquet`` file; a folder of such files, or one that ``save_to_disk`` of
        `datasets` wrote; or ``hf:OWNER/NAME``. A folder of several tables needs ``#NAME`` behind it, as
        in ``gsm8k#main/test``.

    Raises:
      InputError: there is nothing to read, it is of no known format or layout, or one of several tables
        must be named.
    """
    files = _files(str(source))
    rows = (row for file in files for row in file_rows(file, _wanted))
    first = next(rows, None)
    if first is None:
        raise InputError(f"there must be at least one problem: {source} has none; give another file")
    where, fields = first
    layout = layout_of(list(fields))
    if layout is None:
        known = "; ".join(" and ".join(known.columns) for known in LAYOUTS.values())
        raise InputError(
            f"problems must have columns of a known layout ({known}): {where} has "
            f"{', '.join(fields) or 'none'}; rename them"
        )
    return layout, _chained(first, rows)


def _chained(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def _files(source: str) -> list[Path]:
    """The files of a source, in order."""
    path, table = Path(source), ""
    if not path.exists() and "#" in source:
        source, _, table = source.rpartition("#")
        path = Path(source)
    if source.startswith(HUB):
        path = _cached(source.removeprefix(HUB))
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file() and table:
        path, table = path / table, ""
    if (path / "state.json").is_file():
        return _saved(path)
    found = sorted([*path.rglob("*.parquet"), *path.rglob("*.jsonl")])
    tables: dict[str, list[Path]] = {}
    for file in found:
        tables.setdefault(_SHARD.sub("", str(file.relative_to(path).with_suffix(""))), []).append(file)
    if (path / "dataset_dict.json").is_file():
        tables = {folder.parent.name: [folder] for folder in sorted(path.glob("*/state.json"))}
    chosen = {n: f for n, f in tables.items() if not table or n == table or n.endswith(f"/{table}")}
    if len(chosen) != 1:
        has = f"the tables {', '.join(tables)}" if tables else "no parquet or JSON-lines file"
        raise InputError(
            f"one table is read of a folder: {source} has {has}; "
            + (f"name one, as in {source}#{next(iter(tables))}" if tables else "name another folder")
        )
    return next(iter(chosen.values()))


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a folder that ``save_to_disk`` wrote."""
    try:
        state = json.loads(read_text(folder / "state.json"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"a saved data set must say which files it has: {folder / 'state.json'} does not; save it again"
        ) from None


def _cached(name: str) -> Path:
    """The folder of a hub data set in the local cache."""
    from huggingface_hub import snapshot_download  # slow to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError):
        raise InputError(
            f"a data set of the hub must be in the local cache: {name} is not; fetch it with "
            f"hf download --repo-type dataset {name}"
        ) from None


def file_rows(file: Path, wanted: Callable[[Sequence[str]], Sequence[str]] = list) -> Iterator[Row]:
    """Rows of one file: parquet, an Arrow stream, or by any other name JSON lines.

    Args:
      file: what is read.
      wanted: of the columns of a parquet file those to read; all by default.

    Raises:
      InputError: the file, or one of its lines, cannot be read.
    """
    if file.suffix in (".parquet", ".arrow"):
        yield from _table_rows(file, wanted)
    else:
        yield from _line_rows(file)


def _wanted(names: Sequence[str]) -> list[str]:
    """Of a wide table, what a layout reads and what names a row; all of it where no layout is known."""
    layout = layout_of(names)
    if layout is None:
        return list(names)
    return [name for name in names if name.lower() in (*LAYOUTS[layout].columns, *NAMING)]


def _line_rows(file: Path) -> Iterator[Row]:
    # Not splitlines(): a line separator may stand inside a JSON string.
    text = read_text(file).removeprefix("\ufeff")  # the byte order mark that some editors put first
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        try:
            fields = json.loads(line, object_pairs_hook=_object)
        except KeyError as repeated:
            raise InputError(
                f"a name stands once in an object: {where} has {repeated} twice; rename one"
            ) from None
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise InputError(f"each line must be a JSON object: {where} is not; correct it")
        _check_names(where, list(fields))
        yield where, {name.lower(): value for name, value in fields.items()}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; KeyError on a name that comes twice, where `json` would take the last."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise KeyError(name)
        fields[name] = value
    return fields


def _check_names(where: str, names: Sequence[str]) -> None:
    """Refuse columns of which one would take the place of another, since their case is not kept."""
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            raise InputError(
                f"columns must differ in more than case: {where} has {seen[name.lower()]!r} and "
                f"{name!r}; rename one"
            )
        seen[name.lower()] = name


def _table_rows(file: Path, wanted: Callable[[Sequence[str]], Sequence[str]]) -> Iterator[Row]:
    """Rows of a parquet or Arrow file, a batch in memory at a time."""
    number = 0
    try:
        if file.suffix == ".arrow":
            with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
                _check_names(str(file), stream.schema.names)
                for batch in stream:
                    yield from _batch_rows(batch, file, number)
                    number += batch.num_rows
            return
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            columns = list(wanted(table.schema_arrow.names))
            _check_names(str(file), columns)
            for batch in table.iter_batches(4096, columns=columns):
                yield from _batch_rows(batch, file, number)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"a table must be a parquet file or an Arrow stream: {file} is not ({reason}); restore it"
        ) from None


def _batch_rows(batch: pa.RecordBatch, file: Path, before: int) -> Iterator[Row]:
    for index, fields in enumerate(batch.to_pylist()):
        where = f"row {before + index} of {file}"
        yield where, {name.lower(): value for name, value in fields.items()}
