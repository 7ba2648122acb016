"""Which ids of a vocabulary mean something, and which only steer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def vocabulary_end(tokenizer: Any) -> int:
    """One past the last id that the tokenizer means something by.

    Not ``len(tokenizer)``, which counts its tokens and falls short where ids between them are unused.
    """
    return max(tokenizer.get_vocab().values()) + 1


def unused_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids below the end that no token has."""
    used = set(tokenizer.get_vocab().values())
    return tuple(i for i in range(max(used) + 1) if i not in used)


def special_ids(tokenizer: Any, ends: Collection[int]) -> tuple[int, ...]:
    """Ids of the tokenizer's special tokens, but for those that end a response."""
    return tuple(sorted(set(tokenizer.all_special_ids) - set(ends)))
