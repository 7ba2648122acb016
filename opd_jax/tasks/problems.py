"""What is asked: problems, and where they come from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from opd_jax.errors import InputError
from opd_jax.files import read_text


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with its known answer.

    ``id`` names the problem for good: random keys, stored rollouts and evaluation records refer to it.
    """

    id: str
    prompt: str
    answer: str

    @property
    def key(self) -> int:
        """31 bits of the id's SHA-256: the problem's part in every random key."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big") >> 1


def read_problems(path: str | Path) -> list[Problem]:
    """Read problems from JSON lines, each ``{"id": ..., "prompt": ..., "answer": ...}``.

    ``id`` may be left out; it is then derived from the prompt.

    Raises:
      InputError: the file is missing or empty, a line is not such an object, or an id comes twice.
    """
    path = Path(path)
    problems = []
    # Not splitlines(): a line separator may stand inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt, answer = fields["prompt"], fields["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                'each line must be a JSON object with "prompt" and "answer": '
                f"line {number} of {path} is not; correct it"
            ) from None
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = str(answer)
        for name, text in (("prompt", prompt), ("answer", answer)):
            if not isinstance(text, str) or not text.strip() or not _is_unicode(text):
                raise InputError(f"the {name} must be text: line {number} of {path} has {text!r}; correct it")
        name = str(fields.get("id") or hashlib.sha256(prompt.encode()).hexdigest()[:16])
        problems.append(Problem(name, prompt, answer))
    check_problems(problems, str(path))
    return problems


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON lets through and UTF-8 cannot hold."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def check_problems(problems: Sequence[Problem], source: str) -> None:
    """Refuse an empty list of problems, what is no problem, and ids that come twice."""
    for problem in problems:
        if not isinstance(problem, Problem):
            raise InputError(f"problems must be of type Problem: {source} has {problem!r}; wrap it")
    if not problems:
        raise InputError(f"there must be at least one problem: {source} has none; give another file")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise InputError(f"a problem must be listed once: {source} has {problem.id!r} twice; remove one")
        seen.add(problem.id)
