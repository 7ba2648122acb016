"""What a run writes down of itself: JSON lines for numbers, parquet for tokens.

``metrics.jsonl`` has one line per update and is a function of the config alone; wall-clock times go
to ``timings.jsonl``, so that two equal runs differ in that file only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opd_jax.files import replacing, write_text
from opd_jax.rollout.store import Rollout
from opd_jax.train.step import Readings


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if it is not there. A torn last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def append_line(path: Path, fields: dict[str, Any]) -> None:
    """Add one object to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def append_timing(path: Path, part: str, round_: int, began: float) -> None:
    """Note how long a part of a round took, from ``time.monotonic()`` at its beginning."""
    seconds = round(time.monotonic() - began, 3)
    append_line(path, {"part": part, "round": round_, "seconds": seconds})


def drop_lines_from(path: Path, update: int) -> None:
    """Forget the updates that a restored state has not done yet."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line["update"] < update]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def as_line(readings: Readings) -> dict[str, Any]:
    """One update's means and histograms as JSON values."""
    readings = jax.device_get(readings)
    line: dict[str, Any] = {
        name: float(total) / float(count) if count else 0.0 for name, (total, count) in readings.sums.items()
    }
    line["tokens"] = int(readings.sums["drift"][1])
    line["drift_histogram"] = readings.drift_histogram.astype(int).tolist()
    line["weight_histogram"] = readings.weight_histogram.astype(int).tolist()
    return line


def write_tokens(path: Path, rollouts: Sequence[Rollout], mask: np.ndarray, readings: Readings) -> None:
    """Keep drift, weight and segment of every response token of a few rollouts, for the report."""
    path.parent.mkdir(exist_ok=True)
    columns: dict[str, list[Any]] = {
        "round": [rollout.round for rollout in rollouts],
        "problem": [rollout.problem for rollout in rollouts],
        "sample": [rollout.sample for rollout in rollouts],
        "reward": [rollout.reward for rollout in rollouts],
        "response_ids": [rollout.response_ids.tolist() for rollout in rollouts],
    }
    rows = range(len(rollouts))
    for name in ("drift", "weights", "segments"):
        values = np.asarray(getattr(readings, name))
        columns[name] = [values[row][mask[row]].tolist() for row in rows]
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
