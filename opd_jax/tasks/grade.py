"""Whether an answer is right."""

from __future__ import annotations

import re

_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")  # not that of "1 2", which is no 12
_BRACE = re.compile(r"\\boxed\{|[{}]")


def boxed(text: str) -> str | None:
    r"""Content of the last closed ``\boxed{...}`` in ``text``, braces balanced; None without one.

    >>> boxed(r"so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    # Read once, whatever a model that loops has written: braces are matched by those that are open.
    opened: list[tuple[int, bool]] = []  # where what they hold begins, and whether it is a box
    last = None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace.end(), brace[0] != "{"))
        elif opened:
            start, is_box = opened.pop()
            if is_box and (last is None or start > last.start):
                last = slice(start, brace.start())
    return None if last is None else text[last]


def grade(response: str, gold: str) -> bool:
    r"""True if the last boxed answer of ``response`` equals ``gold``.

    Integers are compared as integers of any length, anything else as text in which spaces count only
    between two letters or digits; nothing is evaluated. A response without a closed box is wrong.

    >>> grade(r"\boxed{+07}", "7"), grade(r"\boxed{7} or \boxed{8}", "7"), grade("7", "7")
    (True, False, False)
    """
    answer = boxed(response)
    if answer is None:
        return False
    answer, gold = (_SPACE.sub("", " ".join(text.split())) for text in (answer, gold))
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return _canonical(answer) == _canonical(gold)
    return answer == gold


def _canonical(integer: str) -> str:
    """Sign and digits without leading zeros (no int(): it is quadratic and limited in length)."""
    digits = integer.lstrip("+-").lstrip("0") or "0"
    return "-" + digits if integer[0] == "-" and digits != "0" else digits
