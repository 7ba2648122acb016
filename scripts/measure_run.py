"""A round of a run on the devices at hand, of models with random weights: what was planned, and what it took.

    .venv/bin/python scripts/measure_run.py runs/measured --config configs/gpu-80gb.yaml \
        --student qwen3-1.7b --teacher qwen3-4b --sampling.samples=2

Both models get random weights of the published shapes and the lab's tokenizer, whose ids never hold the
models' end of text: a response has its full length, unless `--sampling.stop` names a string that ends it.
Printed are the lines of `opd plan`, then of each part of the round its seconds and the most memory that a
device had in use by then; how far apart sampler, trainer and a second scoring are; and what an update takes
on rows that are full. Programs are compiled twice unless JAX_COMPILATION_CACHE_DIR names a folder, and the
seconds hold the second time. Needs disk for both models and, at the end of the round, for the training state.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import statistics
import time
from pathlib import Path

from opd_jax.backend import sum_in_one_order

sum_in_one_order()

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.lab import student as lab_student
from opd_jax.model import init_params, preset, save_pretrained
from opd_jax.model.sharding import on_mesh
from opd_jax.plan.programs import compile_programs
from opd_jax.plan.report import as_table
from opd_jax.plan.topology import GIB, memory_of
from opd_jax.rollout.score import batch_of
from opd_jax.settings import load_config
from opd_jax.tasks import TOKENIZER_FILES
from opd_jax.train.collect import minibatch_plan
from opd_jax.train.loop import do_part
from opd_jax.train.opening import open_run
from opd_jax.train.run import Run
from opd_jax.types import Batch

UPDATES = 3  # on full rows; the first may compile


def make_model(folder: Path, name: str, seed: int) -> Path:
    """A checkpoint of random bfloat16 weights with the lab's tokenizer."""
    if not (folder / "config.json").exists():
        config = preset(name)
        make = jax.jit(functools.partial(init_params, config, dtype=jnp.bfloat16))
        beside = [Path(lab_student()) / file for file in TOKENIZER_FILES]
        save_pretrained(folder, config, make(jax.random.key(seed)), beside=beside)
    return folder


def peak_gib() -> float | None:
    """The most that a local device had in use since the process began; None where it does not count."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return round(max(peaks) / GIB, 2) if None not in peaks else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the models and the run; the run is made anew")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--student", required=True, help="a published size, such as qwen3-1.7b")
    parser.add_argument("--teacher", required=True)
    given, overrides = parser.parse_known_args()
    models = {
        role: make_model(given.folder / f"{role}-{name}", name, seed)
        for seed, (role, name) in enumerate((("student", given.student), ("teacher", given.teacher)))
    }
    problems = ["--problems.train=lab:train", "--problems.heldout=lab:heldout", "--schedule.rounds=1"]
    named = [f"--model.{role}={folder}" for role, folder in models.items()]
    config = load_config(given.config, [*named, *problems, *overrides])
    shutil.rmtree(given.folder / "run", ignore_errors=True)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"after making the models: peak {peak_gib()} GiB", flush=True)

    run = open_run(given.folder / "run", config)
    print(run.kernel)
    programs = compile_programs(config, run.model, run.teacher_model, run.mesh, run.usable)
    print(as_table(config, programs, memory_of(jax.devices()[0])), flush=True)
    tflop = {program.name: program.flops * run.mesh.size / 1e12 for program in programs}
    for part in ("sample", "score", "train"):
        began = time.monotonic()
        do_part(run, part, lambda line: None, lambda: False)
        told = {"part": part, "seconds": round(time.monotonic() - began, 1), "peak_gib": peak_gib()}
        if part == "sample":
            lengths = [len(rollout.response_ids) for rollout in run.rollouts.read(0)]
            told |= {"tokens": sum(lengths), "longest": max(lengths)}
        print(json.dumps(told), flush=True)
    scored = run.scored.shard(0)
    print(json.dumps({name: scored[name] for name in ("tokens", "mismatch", "null_drift")}))
    for line in run.metrics_file.read_text().splitlines():
        told = json.loads(line)
        print(
            json.dumps(
                {name: told[name] for name in ("update", "loss", "drift_abs", "drift_max", "weight_min")}
            )
        )

    batch = full_batch(run)
    with jax.set_mesh(run.mesh):
        seconds = []
        for _ in range(UPDATES):
            began = time.monotonic()
            run.state, readings = run.train_step(run.state, batch, run.frozen)
            jax.block_until_ready((run.state, readings))
            seconds.append(time.monotonic() - began)
    middle, tokens = statistics.median(seconds[1:]), int(batch.rows.mask.sum())
    told = {
        "full_rows": batch.rows.mask.shape,
        "seconds_an_update": [round(second, 2) for second in seconds],
        "tokens_a_second": round(tokens / middle),
        "tflop_a_second": round(tflop["train"] / middle, 1),
        "peak_gib": peak_gib(),
    }
    print(json.dumps(told), flush=True)


def full_batch(run: Run) -> Batch:
    """The first minibatch with a token of a response at every position."""
    rollouts = run.scored.read(0)
    batch = batch_of([rollouts[index] for index in minibatch_plan(run.config, 0)[0]], run.width)
    tokens = np.random.default_rng(0).integers(run.usable, size=batch.rows.tokens.shape, dtype=np.int32)
    rows = dataclasses.replace(
        batch.rows,
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        mask=np.ones(tokens.shape, bool),
        sequence_ids=np.ones_like(tokens),
        positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
    )
    return on_mesh(dataclasses.replace(batch, rows=rows), run.mesh)


if __name__ == "__main__":
    main()
