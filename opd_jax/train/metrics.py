"""What a run writes down of itself: JSON lines for numbers, parquet for tokens.

``metrics.jsonl`` has one line per update and is a function of the config alone; wall-clock times go
to ``timings.jsonl``, so that two equal runs differ in that file only.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opd_jax.errors import InputError
from opd_jax.files import read_text, replacing, write_text
from opd_jax.method import readings as figures
from opd_jax.rollout.rows import gather
from opd_jax.rollout.store import Rollout
from opd_jax.train.gradient import Readings
from opd_jax.types import Rows


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if it is not there. A torn last line is left out.

    Raises:
      InputError: another line is no JSON object.
    """
    if not path.exists():
        return []
    lines = read_text(path).split("\n")
    found = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            fields = None
        if not isinstance(fields, dict):
            raise InputError(
                f"each line must be a JSON object: line {number} of {path} is not; restore the file"
            )
        found.append(fields)
    return found


def append_line(path: Path, fields: dict[str, Any]) -> None:
    """Add one object to a JSON-lines file, on disk when this returns."""
    append_lines(path, [fields])


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Add objects to a JSON-lines file, all on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(fields, allow_nan=False) + "\n" for fields in lines))
        file.flush()
        os.fsync(file.fileno())


def mend_lines(path: Path) -> None:
    """Drop a torn last line."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        write_text(path, "".join(json.dumps(line) + "\n" for line in read_lines(path)))


def append_timing(path: Path, part: str, round_: int, began: float) -> None:
    """Note how long a part of a round took, from ``time.monotonic()`` at its beginning."""
    seconds = round(time.monotonic() - began, 3)
    append_line(path, {"part": part, "round": round_, "seconds": seconds})


def drop_lines_from(path: Path, update: int) -> None:
    """Forget the updates that a restored state has not done yet."""
    lines = read_lines(path)
    kept = [line for line in lines if line["update"] < update]
    mend_lines(path)
    if len(kept) < len(lines):
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def as_line(readings: Readings) -> dict[str, Any]:
    """One update's means and histograms as JSON values."""
    told = jax.device_get(readings)
    line: dict[str, Any] = figures(told.sums) | {name: float(value) for name, value in told.whole.items()}
    line["tokens"] = int(told.sums["drift"][1])
    for name, counts in told.histograms.items():
        line[f"{name}_histogram"] = counts.astype(int).tolist()
    return line


def write_tokens(path: Path, kept: Mapping[int, Rollout], rows: Rows, readings: Readings) -> None:
    """Keep drift, weight and segment of every response token of a few rollouts, for the report.

    Args:
      path: the file.
      kept: rollouts by their place in the rows, counted row by row from left to right.
      rows: ``[B, T]`` of the whole minibatch.
      readings: of an update on them.
    """
    path.parent.mkdir(exist_ok=True)
    rollouts = kept.values()
    columns: dict[str, list[Any]] = {
        "round": [rollout.round for rollout in rollouts],
        "problem": [rollout.problem for rollout in rollouts],
        "sample": [rollout.sample for rollout in rollouts],
        "reward": [rollout.reward for rollout in rollouts],
        "response_ids": [rollout.response_ids.tolist() for rollout in rollouts],
    }
    for name in ("drift", "weights", "segments"):
        values = gather(np.asarray(getattr(readings, name)), rows.mask, rows.sequence_ids)
        each = [values[place] for place in kept]
        if name == "segments":  # numbered along the row, which others may share
            each = [np.where(x < 0, -1, x - min(x[x >= 0], default=0)) for x in each]
        columns[name] = [x.tolist() for x in each]
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
