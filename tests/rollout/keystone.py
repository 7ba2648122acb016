"""Cached decoding against whole rows, in the world as users run it: one device.

Run as a program, since the fake devices of the test session split elementwise loops differently and a
token in two thousand then differs by rounding. Prints the largest difference of every case as JSON.
"""

from __future__ import annotations

import json

from opd_jax.backend import sum_in_one_order

sum_in_one_order()

import jax
import numpy as np

from opd_jax.keys import stream
from opd_jax.lab import chains, student, teacher
from opd_jax.model import load_pretrained, token_logprobs
from opd_jax.rollout import Request, make_rows, make_sampler, sample
from opd_jax.tasks import encode_prompt, load_tokenizer

SLOTS, P, R = 32, 61, 144
CASES = ((1.0, 1.0), (1.0, 0.9), (0.7, 0.9), (0.0, 1.0))  # temperature, top-p


def main() -> None:
    found = {}
    for folder in (student(), teacher()):
        config, params = load_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        requests = [
            Request(encode_prompt(tokenizer, problem.prompt), problem.key, number)
            for problem in chains("heldout", 16)
            for number in range(4)
        ]
        for temperature, top_p in CASES:
            sampler = make_sampler(
                config,
                slots=SLOTS,
                max_prompt=P,
                max_response=R,
                temperature=temperature,
                top_p=top_p,
                usable=len(tokenizer),
            )
            root = stream(0, "sample")
            drawn = list(sample(sampler, params, requests, root))
            rows = make_rows([r.prompt_ids for r in requests], [g.ids for g in drawn], P + R - 1)
            read = jax.jit(
                lambda p, r, c=config, t=temperature: token_logprobs(p, r, c, temperature=t or 1.0)
            )
            forced = np.asarray(read(params, rows))[rows.mask]
            difference = np.abs(np.concatenate([g.logprobs for g in drawn]) - forced)
            found[f"{folder.name} {temperature} {top_p}"] = [float(difference.max()), len(difference)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
