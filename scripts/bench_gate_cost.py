"""What the gate and its readings cost: steps of the lab's student, with and without them, in turn.

    .venv/bin/python scripts/bench_gate_cost.py runs/bench

Three compiled steps on one scored minibatch: the bare loss and update; the same with Block64 and all
every-step readings; and the costly readings of ``log.diagnose_every``. Each pair is timed back to back, the
order alternating; printed are the median over pairs of the extra time in percent of the bare step, and the
middle half of the pairs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_jax.backend import sum_in_one_order

sum_in_one_order()

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.method import weighted_loss
from opd_jax.rollout.score import batch_of
from opd_jax.settings import config_file, load_config
from opd_jax.tasks import newline_table
from opd_jax.train.choices import base_loss
from opd_jax.train.collect import minibatch_plan
from opd_jax.train.diagnose import without_gate
from opd_jax.train.fields import read_fields
from opd_jax.train.loop import do_part
from opd_jax.train.opening import open_run
from opd_jax.train.run import Run
from opd_jax.train.step import TrainState, apply_gradient, init_state
from opd_jax.types import Batch, Params

PAIRS = 30


def bare_step(run: Run) -> Callable[[TrainState, Batch, Params], tuple[TrainState, Any]]:
    """The loss averaged over tokens, its gradient and the update; no weights, no readings."""
    config, newline = (
        without_gate(run.config),
        jnp.asarray(newline_table(run.tokenizer, run.model.vocab_size)),
    )

    def loss(params: Any, batch: Batch) -> Any:
        fields = read_fields(params, batch, config, run.model, newline, {})
        mask = fields["mask"]
        return weighted_loss(base_loss(config, fields), mask.astype(jnp.float32), mask)

    def step(state: TrainState, batch: Batch, frozen: Params) -> tuple[TrainState, Any]:
        value, gradient = jax.value_and_grad(loss)(state.params, batch)
        return apply_gradient(state, gradient, run.optimizer), value

    return jax.jit(step, donate_argnums=0)


def main(folder: Path) -> None:
    run = open_run(folder, load_config(config_file("lab.yaml"), ["--gate.segments=block"]))
    for part in ("sample", "score")[len(run.rollouts.rounds) + len(run.scored.rounds) :]:
        do_part(run, part, lambda line: None, lambda: False)
    rollouts = run.scored.read(0)
    batch = jax.device_put(batch_of([rollouts[i] for i in minibatch_plan(run.config, 0)[0]], run.width))

    def fresh() -> TrainState:
        return init_state(jax.tree.map(jnp.copy, run.base), run.optimizer)

    states = {"bare": fresh(), "gated": fresh()}
    steps = {"bare": bare_step(run), "gated": run.train_step}

    def timed(name: str) -> float:
        began = time.perf_counter()
        states[name], told = steps[name](states[name], batch, {})
        jax.block_until_ready((states[name], told))
        return time.perf_counter() - began

    def diagnosed() -> float:
        began = time.perf_counter()
        jax.block_until_ready(run.diagnose(run.base, batch, jnp.zeros((), jnp.int32), {}))
        return time.perf_counter() - began

    with jax.set_mesh(run.mesh):
        for name in steps:
            timed(name), timed(name)
        diagnosed()
        pairs = [
            {name: timed(name) for name in (("bare", "gated") if i % 2 else ("gated", "bare"))}
            for i in range(PAIRS)
        ]
        costly = [diagnosed() for _ in range(10)]
    bare = np.array([pair["bare"] for pair in pairs])
    extra = 100 * np.array([pair["gated"] / pair["bare"] - 1 for pair in pairs])
    low, median, high = np.percentile(extra, [25, 50, 75])
    print(f"bare step: {1e3 * np.median(bare):.1f} ms, {run.config.sampling.slots // 4} rows of {run.width}")
    print(f"gate and every-step readings: {median:+.2f} % [{low:+.2f}, {high:+.2f}], median of {PAIRS} pairs")
    share = 100 * np.median(costly) / np.median(bare)
    print(
        f"costly readings: {1e3 * np.median(costly):.1f} ms, {share:.0f} % of a bare step, "
        f"once every {run.config.log.diagnose_every} updates"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
