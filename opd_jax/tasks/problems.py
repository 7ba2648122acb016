"""What is asked: problems, and where they come from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from opd_jax.errors import InputError


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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"problems must be a readable JSON-lines file: {path} ({error}); check the path"
        ) from None
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            prompt, answer = fields["prompt"], str(fields["answer"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(
                'each line must be a JSON object with "prompt" and "answer": '
                f"line {number} of {path} is not; correct it"
            ) from None
        if not isinstance(prompt, str) or not prompt:
            raise InputError(f"a prompt must be text: line {number} of {path} has {prompt!r}; correct it")
        name = str(fields.get("id") or hashlib.sha256(prompt.encode()).hexdigest()[:16])
        problems.append(Problem(name, prompt, answer))
    check_problems(problems, str(path))
    return problems


def check_problems(problems: Sequence[Problem], source: str) -> None:
    """Refuse an empty list of problems and ids that come twice."""
    if not problems:
        raise InputError(f"there must be at least one problem: {source} has none; give another file")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise InputError(f"a problem must be listed once: {source} has {problem.id!r} twice; remove one")
        seen.add(problem.id)


def write_problems(path: str | Path, problems: Sequence[Problem]) -> None:
    """Write problems as the JSON lines that `read_problems` reads."""
    text = "".join(json.dumps(dataclasses.asdict(problem)) + "\n" for problem in problems)
    Path(path).write_text(text, encoding="utf-8")
