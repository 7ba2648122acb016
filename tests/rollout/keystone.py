"""Cached decoding against whole rows, in the world as users run it: one device.

Run as a program, since the fake devices of the test session split elementwise loops differently and a
token in two thousand then differs by rounding. Rollouts outnumber the slots, so that most are drawn in a
slot that others had before. Prints, for every case, the largest difference from rows that hold one rollout
each and from rows that hold several, and what was drawn, as JSON.

    python -m tests.rollout.keystone ROLLOUTS CASE...
"""

from __future__ import annotations

import dataclasses
import json
import sys

from opd_jax.backend import sum_in_one_order

sum_in_one_order()

import jax
import numpy as np

from opd_jax.keys import stream
from opd_jax.lab import chains, student
from opd_jax.model import Qwen3Config, init_params, load_pretrained, token_logprobs
from opd_jax.rollout import Request, make_sampler, sample
from opd_jax.tasks import encode_prompt, load_tokenizer
from opd_jax.types import Rows

SLOTS, BATCH = 24, 25
# Id 0 is the end of text by the config, and PAD; what ends a response here is another id.
STOP = 7
DENSE = Qwen3Config(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    rope_theta=5_000.0,
    eos_token_id=0,
)
MOE = dataclasses.replace(
    DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True
)


def tiny(config: Qwen3Config, count: int) -> tuple:
    """A random model, and prompts of 1 to 12 tokens."""
    params = init_params(config, jax.random.key(3))
    draw = np.random.default_rng(5)
    prompts = [draw.integers(0, 40, draw.integers(1, 13)) for _ in range(count)]
    return (
        config,
        params,
        [Request(prompt, index, 1) for index, prompt in enumerate(prompts)],
        12,
        30,
        40,
        STOP,
    )


def lab(count: int) -> tuple:
    config, params = load_pretrained(student())
    tokenizer = load_tokenizer(student())
    problems = chains("heldout", -(-count // 4))
    wanted = [
        Request(encode_prompt(tokenizer, problem.prompt), problem.key, number)
        for problem in problems
        for number in range(4)
    ]
    return config, params, wanted[:count], 61, 144, len(tokenizer), tokenizer.eos_token_id


MODELS = {"dense": lambda n: tiny(DENSE, n), "moe": lambda n: tiny(MOE, n), "lab": lab}


def packed(pairs: list, width: int) -> Rows:
    """Rows that hold as many rollouts as fit, one after the other."""
    found: list[list[np.ndarray]] = []
    used = width
    for prompt, response in pairs:
        text, start = np.concatenate([prompt, response]), len(prompt) - 1
        size = len(text) - 1
        if used + size > width:
            found.append([np.zeros(width, np.int32) for _ in range(5)])
            used, number = 0, 0
        number += 1
        columns = text[:-1], text[1:], np.arange(size) >= start, np.full(size, number), np.arange(size)
        for row, column in zip(found[-1], columns, strict=True):
            row[used : used + size] = column
        used += size
    tokens, targets, mask, ids, positions = (np.stack(column) for column in zip(*found, strict=True))
    return Rows(tokens, targets, mask.astype(bool), ids, positions)


def forced(config: Qwen3Config, params: dict, rows: Rows, temperature: float) -> np.ndarray:
    """Log-probs of all response tokens, in order; the last batch is filled up with its own rows again."""
    read = jax.jit(lambda p, r: token_logprobs(p, r, config, temperature=temperature or 1.0))
    parts = []
    for start in range(0, len(rows.tokens), BATCH):
        part = jax.tree.map(lambda x, at=start: x[at : at + BATCH], rows)
        full = jax.tree.map(lambda x: np.resize(x, (BATCH, x.shape[1])), part)
        parts.append(np.asarray(read(params, full))[: len(part.tokens)][part.mask])
    return np.concatenate(parts)


def case(model: str, dtype: str, temperature: float, top_p: float, count: int) -> dict[str, float]:
    config, params, requests, P, R, usable, stop = MODELS[model](count)
    config = dataclasses.replace(config, compute_dtype=dtype)
    sampler = make_sampler(
        config,
        slots=SLOTS,
        max_prompt=P,
        max_response=R,
        temperature=temperature,
        top_p=top_p,
        usable=usable,
        stop_ids=(stop,),
    )
    drawn = list(sample(sampler, params, requests, stream(0, "sample")))
    pairs = [(r.prompt_ids, g.ids) for r, g in zip(requests, drawn, strict=True)]
    told = np.concatenate([g.logprobs for g in drawn])
    found = {}
    width = P + R - 1
    alone = jax.tree.map(lambda *rows: np.concatenate(rows), *(packed([pair], width) for pair in pairs))
    for way, rows in (("padded", alone), ("packed", packed(pairs, 3 * width))):
        difference = np.abs(told - forced(config, params, rows, temperature))
        found |= {way: float(difference.max()), f"{way}_mean": float(difference.mean())}
    lengths = [len(g.ids) for g in drawn]
    return found | {
        "tokens": len(told),
        "lengths": len(set(lengths)),
        "truncated": sum(g.truncated for g in drawn),
        "pad_midway": sum(0 in g.ids[:-1] for g in drawn),
    }


def main(count: int, cases: list[str]) -> None:
    found = {}
    for name in cases:
        model, dtype, temperature, top_p = name.split(",")
        found[name] = case(model, dtype, float(temperature), float(top_p), count)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
