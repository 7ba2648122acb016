"""Answers of a model to problems, graded and written down one by one."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opd_jax.config import ProblemsConfig
from opd_jax.errors import InputError
from opd_jax.evaluate.pass_at_k import pass_at_k
from opd_jax.files import read_text, write_text
from opd_jax.rollout.engine import Engine, Request, in_order
from opd_jax.tasks import Problem, decode_response, grade, prompt_ids


@dataclasses.dataclass(frozen=True)
class Answer:
    """One graded response."""

    problem: str
    sample: int
    correct: bool
    truncated: bool
    tokens: int
    response: str


def answers(
    engine: Engine,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    samples: int,
    prompting: ProblemsConfig | None = None,
    done: int = 0,
) -> Iterator[Answer]:
    """Draw ``samples`` responses to every problem and grade them.

    Draws depend on (the engine's stream, problem, sample), so two models are compared on the same ones.

    Args:
      engine: draws with the model judged.
      tokenizer: its tokenizer.
      problems: what is asked.
      samples: n, per problem.
      prompting: how a prompt is made of a problem; by default it is the plain question.
      done: draws, from the first of the first problem on, that need no answer any more.
    """
    settings = prompting or ProblemsConfig()
    draws = [(problem, number) for problem in problems for number in range(samples)][done:]
    prompts = {problem.id: prompt_ids(tokenizer, problem.prompt, settings) for problem in problems}
    requests = [Request(prompts[problem.id], problem.key, number) for problem, number in draws]
    for (problem, number), generated in zip(draws, in_order(engine.draw(requests)), strict=True):
        text = decode_response(tokenizer, generated.ids)
        yield Answer(
            problem=problem.id,
            sample=number,
            correct=grade(text, problem.answer),
            truncated=generated.truncated,
            tokens=len(generated.ids),
            response=text,
        )


def write_answers(path: Path, records: Sequence[Answer]) -> None:
    """Write answers as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in records))


def read_answers(path: Path) -> list[Answer]:
    """Read what `write_answers` wrote.

    Raises:
      InputError: the file is empty or holds something else.
    """
    try:
        records = [Answer(**json.loads(line)) for line in read_text(path).rstrip().split("\n")]
    except (ValueError, TypeError):
        records = []
    if not records:
        raise InputError(
            f"answers must be JSON lines that an evaluation wrote: {path} is not; remove it and "
            "evaluate again"
        )
    return records


def by_problem(records: Sequence[Answer], k: int) -> dict[str, float]:
    """pass@k of every problem, by its id."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        groups[record.problem].append(record.correct)
    return {problem: pass_at_k(len(g), sum(g), k) for problem, g in groups.items()}
