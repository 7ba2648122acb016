"""How the lab's models were made: one command trains both from nothing.

    opd lab --out DIR

The teacher is trained until it is good. The student is a smaller model of the same kind, stopped as
soon as it solves some problems sometimes: it knows the format, and slips.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from tqdm import tqdm

from opd_jax.evaluate import answers, by_problem
from opd_jax.files import write_text
from opd_jax.interrupt import Interrupted, Stop
from opd_jax.keys import derived_seed, stream
from opd_jax.lab.chains import chains, solution
from opd_jax.lab.tokenizer import VOCABULARY, build_tokenizer
from opd_jax.model import Qwen3Config, init_params, parameter_count, save_pretrained
from opd_jax.rollout import JaxEngine, make_rows, make_sampler
from opd_jax.tasks import Problem, encode_prompt
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.supervised import make_supervised_step
from opd_jax.types import Params

MAX_PROMPT, MAX_RESPONSE = 61, 144  # tokens of the longest chain of 20 one-digit terms
WIDTH = MAX_PROMPT + MAX_RESPONSE - 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One model of the lab and how long it is trained."""

    width: int
    mlp: int
    heads: int
    steps: int
    stop_at: float = 2.0  # pass@1 on fresh training problems at which to stop
    learning_rate: float = 3e-3
    batch: int = 64

    @property
    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=2,
            num_attention_heads=self.heads,
            num_key_value_heads=1,
            head_dim=32,
            rope_theta=10_000.0,
            max_position_embeddings=512,
            eos_token_id=0,
        )


TEACHER = Recipe(width=96, mlp=256, heads=3, steps=1400)
STUDENT = Recipe(width=64, mlp=192, heads=2, steps=1600, stop_at=0.2)


def judge(
    config: Qwen3Config, params: Params, problems: Sequence[Problem], *, samples: int, greedy: bool
) -> dict[int, float]:
    """Mean pass@1 and pass@``samples`` at temperature 1 and top-p 0.9, or greedily."""
    tokenizer = build_tokenizer()
    sampler = make_sampler(
        config,
        slots=128,
        max_prompt=MAX_PROMPT,
        max_response=MAX_RESPONSE,
        temperature=0.0 if greedy else 1.0,
        top_p=0.9,
        usable=len(tokenizer),
    )
    engine = JaxEngine(sampler, params, stream(0, "evaluate"))
    records = list(answers(engine, tokenizer, problems, samples=samples))
    return {k: float(np.mean(list(by_problem(records, k).values()))) for k in {1, samples}}


def train(recipe: Recipe, seed: int, report: Callable[[int, float], None], stop: Stop) -> tuple[Params, int]:
    """Train one model on written solutions; returns its parameters and the steps it took.

    Chains of all lengths from two terms on are mixed: short ones teach the arithmetic early, which
    long ones alone do not within the same steps.
    """
    tokenizer = build_tokenizer()
    problems = chains("train", 20_000, seed=derived_seed(seed, "supervised"), terms=(2, 20))
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    responses = [
        np.append(encode_prompt(tokenizer, solution(problem)), tokenizer.eos_token_id) for problem in problems
    ]
    fresh = chains("train", 64, seed=derived_seed(seed, "check"))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, 50, recipe.steps, 0.1 * recipe.learning_rate
    )
    optimizer = make_optimizer(schedule, b2=0.95)
    step = make_supervised_step(recipe.config, optimizer)
    params = init_params(recipe.config, stream(seed, "init"))
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(derived_seed(seed, "batches"))
    for done in range(1, recipe.steps + 1):
        if stop():
            raise Interrupted
        chosen = rng.integers(len(problems), size=recipe.batch)
        rows = make_rows([prompts[i] for i in chosen], [responses[i] for i in chosen], WIDTH)
        params, opt_state, loss = step(params, opt_state, rows)
        report(done, float(loss))
        due = recipe.stop_at <= 1 and done >= 400 and done % 25 == 0
        if due and judge(recipe.config, params, fresh, samples=4, greedy=False)[1] >= recipe.stop_at:
            return params, done
    return params, recipe.steps


def make(out: Path, stop: Stop, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """Train teacher and student, write both to ``out``, and return their held-out figures."""
    heldout = chains("heldout", 200)
    out.mkdir(parents=True, exist_ok=True)  # before twenty minutes of work, not after
    figures = {}
    for name, recipe in (("teacher", TEACHER), ("student", STUDENT)):
        began = time.monotonic()
        with tqdm(total=recipe.steps, desc=name) as bar:

            def report(done: int, loss: float, bar: tqdm = bar) -> None:
                bar.update(done - bar.n)
                bar.set_postfix(loss=f"{loss:.4f}")

            params, steps = train(recipe, derived_seed(seed, name), report, stop)
        seconds = time.monotonic() - began
        sampled = judge(recipe.config, params, heldout, samples=8, greedy=False)
        figures[name] = {
            "parameters": parameter_count(recipe.config),
            "steps": steps,
            "seconds": round(seconds),
            "greedy": judge(recipe.config, params, heldout, samples=1, greedy=True)[1],
            "pass@1": sampled[1],
            "pass@8": sampled[8],
        }
        save_pretrained(out / name, recipe.config, jax.device_get(params))
        build_tokenizer().save_pretrained(out / name)
        print(json.dumps({name: figures[name]}))
    write_text(out / "figures.json", json.dumps({"seed": seed, **figures}, indent=1) + "\n")
    return figures
