"""Text to token ids and back, through the checkpoint's own tokenizer."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def load_tokenizer(folder: str | Path) -> Any:
    """The Hugging Face tokenizer of a model folder; nothing is fetched and no remote code is run.

    Raises:
      InputError: the folder holds no tokenizer.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise InputError(
            f"a model folder must hold tokenizer.json: {folder} does not; copy it from the original"
        )
    # Only tokenizers are used, and transformers would advise every user to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a broken tokenizer raises whatever its parser does
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"a tokenizer must be one that AutoTokenizer loads: that of {folder} is not ({reason}); "
            "restore it"
        ) from None


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary and rules: what stored token ids mean."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON lets through and UTF-8 cannot hold."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def encode_prompt(tokenizer: Any, prompt: str) -> np.ndarray:
    """Token ids ``[P]`` int32 of a plain-text prompt."""
    return np.asarray(tokenizer(prompt, add_special_tokens=False)["input_ids"], np.int32)


def decode_response(tokenizer: Any, ids: np.ndarray) -> str:
    """Text of a response without its special tokens."""
    return tokenizer.decode(ids.tolist(), skip_special_tokens=True)


def newline_table(tokenizer: Any, size: int) -> np.ndarray:
    """Which ids end a line: ``[size]`` bool, true where the token's text contains a newline."""
    ids = range(min(len(tokenizer), size))
    texts = tokenizer.batch_decode([[i] for i in ids])
    table = np.zeros(size, bool)
    table[: len(texts)] = ["\n" in text for text in texts]
    return table
