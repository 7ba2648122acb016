"""What is asked: problems, and where they come from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from opd_jax.errors import InputError
from opd_jax.tasks.layouts import LAYOUTS
from opd_jax.tasks.tables import rows_of_source
from opd_jax.tasks.text import is_unicode


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


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """The problems of one source, and what was read to get them."""

    source: str
    layout: str  # a name of `opd_jax.tasks.layouts.LAYOUTS`
    problems: list[Problem]
    rows: int
    repeats: int  # rows that repeat another to the letter, which DAPO-Math-17k does a hundredfold
    unwrapped: int  # problems whose prompt lost an instruction of the set's own


def read_problems(source: str | Path) -> list[Problem]:
    """The problems of a file or folder, in order; see `read_problem_set`."""
    return read_problem_set(source).problems


def read_problem_set(source: str | Path) -> ProblemSet:
    """Read problems from JSON lines, parquet, or a folder of a data set.

    The formats are those of `opd_jax.tasks.tables.rows_of_source`, the layouts those of
    `opd_jax.tasks.layouts`. An id that is not there is derived from the prompt. In a layout other than the
    project's own, rows that repeat another to the letter are left out and counted.

    Raises:
      InputError: the source is missing or empty, its columns are of no known layout, a row cannot be
        read, or an id comes twice.
    """
    layout, rows = rows_of_source(source)
    found: dict[str, Problem] = {}
    count = repeats = unwrapped = 0
    for where, fields in rows:
        count += 1
        try:
            asked = LAYOUTS[layout].read(fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"each row must have {' and '.join(LAYOUTS[layout].columns)}: {where} does not ({reason}); "
                "correct it"
            ) from None
        for name, text in (("prompt", asked.prompt), ("answer", asked.answer), ("id", asked.id or "-")):
            if not isinstance(text, str) or not text.strip() or not is_unicode(text):
                raise InputError(f"the {name} must be text: {where} has {text!r}; correct it")
        name = asked.id or hashlib.sha256(asked.prompt.encode()).hexdigest()[:16]
        problem = Problem(name, asked.prompt, asked.answer)
        if name not in found:
            found[name] = problem
            unwrapped += asked.unwrapped
        elif layout != "prompt" and found[name] == problem:
            repeats += 1
        else:
            raise InputError(f"a problem must be listed once: {where} has {name!r} twice; remove one")
    return ProblemSet(str(source), layout, list(found.values()), count, repeats, unwrapped)


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
