"""Memory and speed of feeding: 100,000 scored rollouts of 4,096 tokens, in shuffled packed batches.

    .venv/bin/python scripts/measure_feed.py /somewhere     # 115 GB of disk there; 23 with --top-k 4

Four processes, a line of JSON each: one writes a store, part by part; one reads a whole epoch and tells its
peak of resident memory (VmHWM), its rollouts a second and whether every rollout came once; one reads half as
many batches and saves its position; one is set to that position and reads on. The digests of all batches
after it must be those of the uninterrupted epoch. The store is deleted at the end unless --keep is given.
"""

from __future__ import annotations

import argparse
import dataclasses
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

PROMPT = 100  # tokens
PART = 64  # rollouts appended together
ROUND = 2048  # rollouts
# Of a store as scoring leaves it, what `batch_of` reads for loss.kind teacher_topk.
READ = ("old_logprobs", "teacher_logprobs", "teacher_entropy", "teacher_topk_ids", "teacher_topk_logprobs")


def write(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Write synthetic rollouts: random ids and log-probs, lengths from 1/8 of the longest to all of it.

    Every part has the arrays of the first.
    """
    from opd_jax.rollout.store import RolloutStore

    began, store = time.monotonic(), RolloutStore(folder, {"made_by": "measure_feed"})
    drawn = _drawn(given)
    for round_, first in enumerate(range(0, given.rollouts, ROUND)):
        last = min(first + ROUND, given.rollouts)
        for number in range(first, last, PART):
            count = min(PART, last - number)
            store.append(
                [
                    dataclasses.replace(
                        rollout, round=round_, problem=f"problem {(number + i) // 8}", sample=i % 8
                    )
                    for i, rollout in enumerate(drawn[:count])
                ]
            )
        store.seal(round_)
    size = sum(shard["bytes"] for shard in store.shards)
    return {"bytes": size, "seconds": round(time.monotonic() - began, 1)}


def _drawn(given: argparse.Namespace) -> list[Any]:
    from opd_jax.rollout.store import Rollout, Score

    rng = np.random.default_rng(0)

    def one() -> Rollout:
        length = int(rng.integers(given.tokens // 8, given.tokens + 1)) if given.ragged else given.tokens

        def nats(*shape: int) -> np.ndarray:
            return -rng.standard_exponential((length, *shape), np.float32)

        def ids(*shape: int) -> np.ndarray:
            return rng.integers(0, 150_000, shape, np.int32)

        return Rollout(
            round=0,
            problem="",
            sample=0,
            prompt_ids=ids(PROMPT),
            response_ids=ids(length),
            behaviour_logprobs=nats(),
            truncated=False,
            reward=0.0,
            score=Score(
                old_logprobs=nats(),
                teacher_logprobs=nats(),
                teacher_topk_ids=ids(length, given.top_k),
                teacher_topk_logprobs=nats(given.top_k),
                teacher_outside_mass=-nats(),
                teacher_entropy=-nats(),
            ),
        )

    return [one() for _ in range(min(PART, given.rollouts))]


def read(folder: Path, given: argparse.Namespace, state: Any = None, stop: int | None = None) -> dict:
    """Read batches to the end of the epoch, or ``stop`` of them."""
    from opd_jax.rollout.feed import packed_batches
    from opd_jax.rollout.score import batch_of
    from opd_jax.rollout.source import RolloutSource
    from opd_jax.rollout.store import RolloutStore

    source = RolloutSource(RolloutStore(folder), READ)
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
        scores = signal.old, signal.teacher, signal.group, signal.support_ids, signal.support_logprobs
        for array in (*vars(rows).values(), *scores):
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
    asked = [f"--{key}={getattr(given, key.replace('-', '_'))}" for key in SHAPE]
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
    "top-k": 32,
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
    needed = given.rollouts * given.tokens * 4 * (6 + 2 * given.top_k)
    if shutil.disk_usage(given.folder).free < 1.2 * needed:
        raise SystemExit(
            f"the shards take {needed / 1e9:.1f} GB: {given.folder} has less; name another folder, or ask "
            "for fewer --rollouts or --top-k"
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
