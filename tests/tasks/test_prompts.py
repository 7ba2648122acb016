"""Prompts: what the tokenizer's own template renders, and what the lab has always asked."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from opd_jax.config import ProblemsConfig
from opd_jax.errors import InputError
from opd_jax.lab import student
from opd_jax.tasks import (
    check_template,
    encode_prompt,
    load_tokenizer,
    prompt_ids,
    prompt_text,
    prompting_digest,
)

CHAT = ProblemsConfig(template="chat")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}={{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a={% if enable_thinking is false %}0{% endif %}{% endif %}"
)
DATA = Path(os.environ.get("OPD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
QWEN = DATA / "qwen_tokenizer"


@pytest.fixture
def tokenizer():
    tokenizer = load_tokenizer(student())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_by_default_a_prompt_is_the_question(tokenizer):
    np.testing.assert_array_equal(
        prompt_ids(tokenizer, "a+9b", ProblemsConfig()), encode_prompt(tokenizer, "a+9b")
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (ProblemsConfig(instruction="box it"), "q\nbox it"),
        (CHAT, "user=q\na="),
        (dataclasses.replace(CHAT, thinking=False), "user=q\na=0"),
        (dataclasses.replace(CHAT, instruction="i", system="s"), "system=s\nuser=q\ni\na="),
    ],
)
def test_text_and_ids(tokenizer, settings, text):
    assert prompt_text(tokenizer, "q", settings) == text
    np.testing.assert_array_equal(prompt_ids(tokenizer, "q", settings), encode_prompt(tokenizer, text))


def test_every_way_of_asking_has_its_own_digest(tokenizer):
    ways = [
        ProblemsConfig(),
        ProblemsConfig(instruction="i"),
        CHAT,
        dataclasses.replace(CHAT, thinking=False),
    ]
    digests = [prompting_digest(tokenizer, way) for way in ways]
    tokenizer.chat_template = TEMPLATE.replace("a=", "b=")
    digests += [prompting_digest(tokenizer, CHAT)]
    assert len(set(digests)) == 5
    assert prompting_digest(tokenizer, ProblemsConfig()) == digests[0]  # which no template is part of
    assert prompting_digest(tokenizer, ProblemsConfig(train="elsewhere")) == digests[0]


def test_what_a_template_cannot_do_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InputError, match="does not read enable_thinking"):
        check_template(tokenizer, dataclasses.replace(CHAT, thinking=False))
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    with pytest.raises(InputError, match="no user"):
        prompt_ids(tokenizer, "q", CHAT)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="the tokenizer has none"):
        check_template(tokenizer, CHAT)


@pytest.mark.skipif(not QWEN.is_dir(), reason="the tokenizer of Qwen3 is not at hand")
def test_the_template_of_qwen3():
    tokenizer = load_tokenizer(QWEN)
    asked = [{"role": "user", "content": "1+1?"}]
    for thinking in (True, False):
        ids = prompt_ids(tokenizer, "1+1?", dataclasses.replace(CHAT, thinking=thinking))
        want = tokenizer.apply_chat_template(
            asked, tokenize=True, add_generation_prompt=True, enable_thinking=thinking
        )
        assert ids.tolist() == list(want["input_ids"])
        assert (tokenizer.convert_tokens_to_ids("</think>") in ids) == (not thinking)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")  # one token, not its letters
