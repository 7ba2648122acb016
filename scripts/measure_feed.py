"""Memory and speed of feeding: 100,000 rollouts of 4,096 tokens, in shuffled packed batches.

    .venv/bin/python scripts/measure_feed.py /somewhere     # 6.6 GB of disk there, about ten minutes

Four processes, a line of JSON each: one writes the shards; one reads a whole epoch and tells its peak of
resident memory (VmHWM), its rollouts a second and whether every rollout came once; one reads half as many
batches and saves its position; one is set to that position and reads on. The digests of all batches after it
must be those of the uninterrupted epoch. The shards are deleted at the end unless --keep is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PROMPT = 100  # tokens
SHARD = 2000  # rollouts
READ = ("old_logprobs", "teacher_logprobs")


def write(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Write synthetic rollouts: random ids and log-probs, lengths from 1/8 of the longest to all of it."""
    folder.mkdir(parents=True)
    began, number = time.monotonic(), 0
    while number < given.rollouts:
        count = min(SHARD, given.rollouts - number)
        rng = np.random.default_rng(number)
        low = given.tokens // 8 if given.ragged else given.tokens
        pq.write_table(
            _table(rng, number, rng.integers(low, given.tokens + 1, count)),
            folder / f"part-{number // SHARD:05d}.parquet",
            row_group_size=given.group,
            use_dictionary=["problem"],
        )
        number += count
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"bytes": size, "seconds": round(time.monotonic() - began, 1)}


def _table(rng: np.random.Generator, first: int, lengths: np.ndarray) -> pa.Table:
    count = len(lengths)

    def lists(values: np.ndarray, sizes: np.ndarray) -> pa.ListArray:
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))

    def ids(sizes: np.ndarray) -> pa.ListArray:
        return lists(rng.integers(0, 150_000, sizes.sum(), np.int32), sizes)

    def nats() -> pa.ListArray:
        return lists(-rng.standard_exponential(lengths.sum(), np.float32), lengths)

    return pa.table(
        {
            "round": np.zeros(count, np.int32),
            "problem": [f"problem {(first + i) // 8}" for i in range(count)],
            "sample": np.arange(count, dtype=np.int32) % 8,
            "prompt_ids": ids(np.full(count, PROMPT)),
            "response_ids": ids(lengths),
            "behaviour_logprobs": nats(),
            "truncated": np.zeros(count, bool),
            "reward": np.zeros(count, np.float32),
            "old_logprobs": nats(),
            "teacher_logprobs": nats(),
        }
    )


def read(folder: Path, given: argparse.Namespace, state: Any = None, stop: int | None = None) -> dict:
    """Read batches to the end of the epoch, or ``stop`` of them."""
    from opd_jax.rollout.feed import packed_batches
    from opd_jax.rollout.score import batch_of
    from opd_jax.rollout.source import RolloutSource

    source = RolloutSource(sorted(folder.glob("*.parquet")), READ)
    before = peak_bytes()
    feed = iter(
        packed_batches(
            source,
            batch_of,
            seed=0,
            rows=given.rows,
            widths=[given.width],
            window=given.window,
            epochs=1,
            threads=given.threads,
        )
    )
    if state is not None:
        feed.set_state(state)
    digests: list[str] = []
    seen = np.zeros(len(source), int)
    held = tokens = 0
    began = time.monotonic()
    while stop is None or len(digests) < stop:
        try:
            fed = next(feed)
        except StopIteration:
            break
        digest = hashlib.sha256(fed.numbers.tobytes())
        rows, signal = fed.batch.rows, fed.batch.signal
        for array in (*vars(rows).values(), signal.old, signal.teacher, signal.group):
            digest.update(np.ascontiguousarray(array).data)
        digests.append(digest.hexdigest()[:16])
        np.add.at(seen, fed.numbers, 1)
        held, tokens = held + rows.sequence_ids.size, tokens + int((rows.sequence_ids > 0).sum())
    seconds = time.monotonic() - began
    return {
        "batches": len(digests),
        "rollouts": int(seen.sum()),
        "each_once": bool((seen == 1).all()),
        "positions_filled": round(tokens / max(held, 1), 4),
        "before_feeding_bytes": before,
        "peak_resident_bytes": peak_bytes(),
        "rollouts_per_second": round(seen.sum() / seconds, 1),
        "positions_per_second": round(tokens / seconds),
        "seconds": round(seconds, 1),
        "digests": digests,
        "state": feed.get_state(),
    }


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status; Linux is needed")


def step(name: str, folder: Path, given: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """One step in a process of its own."""
    out = folder.with_name(f"{folder.name}.{name}.json")
    asked = [f"--{key}={getattr(given, key)}" for key in SHAPE]
    command = [sys.executable, __file__, str(folder.parent), *asked, "--step", name, "--out", str(out)]
    command += ["--ragged"] if given.ragged else []
    subprocess.run(
        [*command, "--options", json.dumps(options)], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    told = json.loads(out.read_text())
    out.unlink()
    shown = {key: value for key, value in told.items() if key != "digests"}
    print(json.dumps({"step": name, **shown}), flush=True)
    return told


SHAPE = {
    "rollouts": 100_000,
    "tokens": 4096,
    "rows": 8,
    "width": 8390,
    "window": 512,
    "threads": 2,
    "group": 8,
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write; a folder feed-shards is made in it")
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ragged", action="store_true", help="responses of 1/8 to all of --tokens")
    parser.add_argument("--keep", action="store_true", help="leave the shards there")
    for name in ("step", "out", "options"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    folder = given.folder / "feed-shards"
    if given.step:
        told = (
            write(folder, given)
            if given.step == "write"
            else read(folder, given, **json.loads(given.options))
        )
        Path(given.out).write_text(json.dumps(told))
        return told
    needed = given.rollouts * given.tokens * 4 * 4
    if shutil.disk_usage(given.folder).free < 1.2 * needed:
        raise SystemExit(
            f"the shards take {needed / 1e9:.1f} GB: {given.folder} has less; name another folder"
        )
    try:
        step("write", folder, given, {})
        whole = step("whole", folder, given, {})
        middle = whole["batches"] // 2
        first = step("first half", folder, given, {"stop": middle})
        second = step("second half", folder, given, {"state": first["state"]})
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    told = {
        "restored_exactly": first["digests"] + second["digests"] == whole["digests"],
        "each_rollout_once": whole["each_once"],
        "peak_resident_gb": max(x["peak_resident_bytes"] for x in (whole, first, second)) / 1e9,
    }
    print(json.dumps(told), flush=True)
    return told


if __name__ == "__main__":
    main()
