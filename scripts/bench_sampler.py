"""What a step of the sampler costs far from the longest response: filled blocks of the cache, or all of it.

    .venv/bin/python scripts/bench_sampler.py            # about five minutes

Slots of a model as wide as Qwen3-0.6B, with 4 of its 28 layers and random weights, all at one position, in
a cache for 16,384 tokens. Steps that attend over the whole cache and steps that attend over the blocks that
are filled are timed in turn, the order alternating. Printed, for each position, are the median and the middle
half of each in milliseconds, and of their ratio over pairs.
"""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.model import init_params, preset
from opd_jax.rollout import make_sampler
from opd_jax.rollout.slots import Sampler

SLOTS, LONGEST, LAYERS = 4, 16_384, 4
POSITIONS = (200, 3_000, 16_000)
STEPS, PAIRS = 4, 10


class Steps:
    """A sampler whose slots all stand at one position."""

    def __init__(self, sampler: Sampler, position: int) -> None:
        self.sampler, self.position = sampler, position
        state = sampler.begin()
        at = jnp.full(SLOTS, position)
        rows = dataclasses.replace(state.rows, position=at, done=at < 0, limit=jnp.full(SLOTS, LONGEST))
        self.state = dataclasses.replace(state, rows=rows)

    def timed(self, params: object) -> float:
        """Milliseconds of a step."""
        until = np.int32(STEPS), np.int32(SLOTS + 1)
        blocks = self.sampler.blocks(self.position + STEPS)
        began = time.perf_counter()
        state, told = self.sampler.advance(params, self.state, np.zeros(SLOTS, bool), *until, blocks)
        jax.block_until_ready((state, told))
        spent = time.perf_counter() - began
        again = dataclasses.replace(state.rows, position=jnp.full(SLOTS, self.position))
        self.state = dataclasses.replace(state, rows=again)
        return 1e3 * spent / STEPS


def said(values: list[float]) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    model = dataclasses.replace(preset("qwen3-0.6b"), num_hidden_layers=LAYERS, eos_token_id=0)
    params = init_params(model, jax.random.key(0))
    samplers = {
        name: make_sampler(
            model,
            slots=SLOTS,
            max_prompt=1,
            max_response=LONGEST,
            temperature=1.0,
            top_p=1.0,
            usable=model.vocab_size,
            banned=(0,),
            **more,
        )
        for name, more in (("whole", {"block": LONGEST}), ("blocks", {}))
    }
    for position in POSITIONS:
        found: dict[str, list[float]] = {name: [] for name in samplers}
        steps = {name: Steps(sampler, position) for name, sampler in samplers.items()}
        for pair in range(-1, PAIRS):
            for name in sorted(steps, reverse=pair % 2 == 0):
                spent = steps[name].timed(params)
                if pair >= 0:  # the first compiles
                    found[name].append(spent)
        ratio = [a / b for a, b in zip(found["whole"], found["blocks"], strict=True)]
        print(
            f"position {position}: whole cache {said(found['whole'])} ms, "
            f"blocks {said(found['blocks'])} ms, ratio {said(ratio)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
