"""A round of a run on the devices at hand, of models with random weights: what was planned, and what it took.

    .venv/bin/python scripts/measure_run.py runs/measured --config configs/gpu-80gb.yaml \
        --student qwen3-1.7b --teacher qwen3-4b --sampling.samples=2

Both models get random weights of the published shapes and the lab's tokenizer, whose ids never hold the
models' end of text: every response has its full length. Printed are the lines of `opd plan`, then of each
part of the round its seconds, tokens, matrix products a second and the most memory that a device had in use
by then; and how far apart sampler, trainer and a second scoring are. Needs disk for both models and, at the
end of the round, for the training state.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shutil
import statistics
import time
from pathlib import Path

from opd_jax.backend import sum_in_one_order

sum_in_one_order()

import jax
import jax.numpy as jnp

from opd_jax.lab import student as lab_student
from opd_jax.model import init_params, preset, save_pretrained
from opd_jax.plan.programs import compile_programs
from opd_jax.plan.report import as_table
from opd_jax.plan.topology import GIB, memory_of
from opd_jax.settings import load_config
from opd_jax.tasks import TOKENIZER_FILES
from opd_jax.train.loop import do_part
from opd_jax.train.opening import open_run


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
        role: make_model(given.folder / role, name, seed)
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
    rollouts = config.sampling.prompts * config.sampling.samples
    tokens = rollouts * config.sampling.max_response

    for part in ("sample", "score", "train"):
        updates: list[float] = []
        began = time.monotonic()
        do_part(run, part, lambda line, updates=updates: updates.append(time.monotonic()), lambda: False)
        told = {"part": part, "seconds": round(time.monotonic() - began, 1), "peak_gib": peak_gib()}
        if part == "sample":
            told["tokens_a_second"] = round(tokens / told["seconds"])
        if part == "train":
            step = statistics.median(b - a for a, b in itertools.pairwise(updates))
            told["seconds_an_update"] = round(step, 2)
            told["tflop_a_second"] = round(tflop["train"] / step, 1)
            told["tokens_a_second"] = round(tokens / config.schedule.minibatches / step)
        print(json.dumps(told), flush=True)
    print(json.dumps({"scored": run.scored.shard(0)}, default=str)[:4000])
    for line in run.metrics_file.read_text().splitlines():
        print(line[:600])


if __name__ == "__main__":
    main()
