"""Checks of the fields of a ``config.json``: kind, finiteness, sign. A truth value is no number here."""

from __future__ import annotations

import sys
from typing import Any

from opd_jax.errors import InputError


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is not a whole number of at least ``least``, or beyond int32, which arrays count in."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        _refuse(name, f"a whole number of at least {least}, below 2**31", value)


def check_number(name: str, value: Any, above: float = 0.0) -> None:
    """Refuse what is not a finite number above ``above``; one beyond float64 counts as infinite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not above < value <= sys.float_info.max:
        _refuse(name, f"a finite number above {above:g}", value)


def check_kind(name: str, value: Any, kind: type, words: str) -> None:
    """Refuse what is not of this kind, which ``words`` name as JSON does."""
    if not isinstance(value, kind):
        _refuse(name, words, value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is none of these words."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}: got {value!r}; choose one")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false."""
    check_kind(name, value, bool, "true or false")


def _refuse(name: str, rule: str, value: Any) -> None:
    said = repr(value)
    said = said if len(said) < 60 else f"{said[:60]}..."
    raise InputError(f"{name} must be {rule}: got {said}; correct config.json")
