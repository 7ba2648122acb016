"""The sampler against the trainer, and against itself in other company."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.keys import stream
from opd_jax.lab import chains
from opd_jax.rollout import Request, make_sampler, sample
from opd_jax.tasks import encode_prompt
from tests.conftest import as_users_have_it

SLOTS, P, R = 8, 61, 144
ROOT = Path(__file__).parent.parent.parent


def requests(tokenizer, count, samples=2):
    problems = chains("heldout", count)
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    return [
        Request(prompt, problem.key, number)
        for prompt, problem in zip(prompts, problems, strict=True)
        for number in range(samples)
    ]


def draw(model, wanted, *, temperature=1.0, top_p=1.0, max_response=R, seed=0):
    config, params = model
    sampler = make_sampler(
        config,
        slots=SLOTS,
        max_prompt=P,
        max_response=max_response,
        temperature=temperature,
        top_p=top_p,
        usable=43,
    )
    return list(sample(sampler, params, wanted, stream(seed, "sample")))


def test_keystone_cached_logprobs_are_teacher_forced_ones():
    done = subprocess.run(
        [sys.executable, "-m", "tests.rollout.keystone"],
        cwd=ROOT,
        env=as_users_have_it(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 8
    for case, (largest, tokens) in found.items():
        assert tokens > 5000
        assert largest < 1e-5, (case, largest)


def test_a_rollout_does_not_depend_on_its_company(lab_student, tokenizer):
    wanted = requests(tokenizer, 6)
    together = draw(lab_student, wanted)
    backwards = draw(lab_student, wanted[::-1])[::-1]
    alone = [draw(lab_student, [request])[0] for request in wanted[:2]]
    for other in (backwards, alone):
        for a, b in zip(together, other, strict=False):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.logprobs, b.logprobs)


def test_samples_seeds_and_problems_differ(lab_student, tokenizer):
    [first] = requests(tokenizer, 1, samples=1)
    texts = {
        tuple(draw(lab_student, [Request(first.prompt_ids, problem, number)], seed=seed)[0].ids.tolist())
        for problem in (1, 2)
        for number in (0, 1)
        for seed in (0, 1)
    }
    assert len(texts) > 4


def test_end_of_text_is_kept_and_nothing_follows_it(lab_student, tokenizer):
    for generated in draw(lab_student, requests(tokenizer, 4)):
        ids = generated.ids.tolist()
        assert len(generated.logprobs) == len(ids)
        if not generated.truncated:
            assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1]


def test_the_limit_marks_a_row_truncated(lab_student, tokenizer):
    for generated in draw(lab_student, requests(tokenizer, 2), max_response=7):
        assert generated.truncated
        assert len(generated.ids) == 7


def test_prompts_must_fit(lab_student):
    for ids in ([], [1] * (P + 1)):
        with pytest.raises(InputError, match=f"1 to {P} tokens"):
            draw(lab_student, [Request(ids, 0, 0)])
