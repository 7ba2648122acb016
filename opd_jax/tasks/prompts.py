"""From a problem to the token ids that a model is given: a plain prompt, or the tokenizer's chat template."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from opd_jax.config import ProblemsConfig
from opd_jax.errors import InputError
from opd_jax.tasks.text import encode_prompt


def prompt_text(tokenizer: Any, prompt: str, settings: ProblemsConfig) -> str:
    """The text a model is given: the question, ``problems.instruction`` on a line of its own, the template.

    With ``problems.template: chat`` it is the tokenizer's own template of one user message, up to where
    the assistant's turn begins.

    Raises:
      InputError: the tokenizer's template cannot do what is asked, see `check_template`.
    """
    if settings.instruction:
        prompt = f"{prompt}\n{settings.instruction}"
    if settings.template == "plain":
        return prompt
    turns = [{"role": "user", "content": prompt}]
    if settings.system:
        turns.insert(0, {"role": "system", "content": settings.system})
    check_template(tokenizer, settings)
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=settings.thinking
        )
    except Exception as error:  # a template is a program, and raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"a chat template must render a user message: the tokenizer's does not ({reason}); set "
            "problems.template to plain, or clear problems.system"
        ) from None


def prompt_ids(tokenizer: Any, prompt: str, settings: ProblemsConfig) -> np.ndarray:
    """Token ids ``[P]`` int32 of a problem's prompt, as `prompt_text` renders it.

    Special tokens that a chat template writes are read as such; none is added to what it writes.
    """
    return encode_prompt(tokenizer, prompt_text(tokenizer, prompt, settings))


def check_template(tokenizer: Any, settings: ProblemsConfig) -> None:
    """Refuse settings of prompts that the tokenizer's chat template has no use for."""
    if settings.template == "plain":
        return
    template = _template(tokenizer)
    if not template:
        raise InputError(
            "problems.template=chat needs a chat template: the tokenizer has none; use plain, or the "
            "tokenizer of an instruction-tuned model"
        )
    if not settings.thinking and "enable_thinking" not in template:
        raise InputError(
            "problems.thinking=false needs a chat template that can leave thinking out: the tokenizer's "
            "does not read enable_thinking; drop problems.thinking"
        )


def prompting_digest(tokenizer: Any, settings: ProblemsConfig) -> str:
    """SHA-256 of how prompts are made of problems: the settings, and the chat template where it is used."""
    chat = settings.template == "chat"
    parts = {
        "template": _template(tokenizer) if chat else "",
        "thinking": settings.thinking,
        "system": settings.system,
        "instruction": settings.instruction,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _template(tokenizer: Any) -> str:
    """The text of a tokenizer's chat template; of several, the one that is used by default."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else str(template.get("default", ""))
