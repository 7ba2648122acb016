"""How published problem sets name their columns, and what each row of them asks.

A layout is recognised by its columns alone, whatever their case:

    verl            prompt (a user message), reward_model.ground_truth, extra_info.index (DAPO-Math-17k)
    labelled        prompt (text or a user message), label
    prompt          prompt, answer (the project's own: read as it stands)
    problem         problem, answer (AIME, AMC, MATH-500)
    solution        problem, solution that ends in ``\\boxed{...}`` (MATH)
    question        question, answer, which may end in ``#### n`` (GSM8K, AIME)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd_jax.tasks.grade import boxed

Fields = Mapping[str, Any]  # of one row, by lower-case column name


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one row asks."""

    id: str | None
    prompt: str
    answer: str
    unwrapped: bool = False  # an instruction of the set's own was taken off the prompt


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way of naming columns."""

    columns: tuple[str, ...]  # all of which it needs
    read: Callable[[Fields], Asked]  # raises ValueError, KeyError or TypeError on a row it cannot read


# Instructions that published sets put around a question. They ask for an answer in another place than
# the `\boxed{...}` that `opd_jax.tasks.grade` reads; `problems.instruction` takes their place.
WRAPPERS = (
    (  # DAPO-Math-17k
        "Solve the following math problem step by step. The last line of your response should be of the "
        "form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n",
        '\n\nRemember to put your answer on its own line after "Answer:".',
    ),
    ("", ' Let\'s think step by step and output the final answer after "####".'),  # verl's GSM8K
    ("", " Let's think step by step and output the final answer within \\boxed{}."),  # verl's MATH
    ("", "\nPlease reason step by step, and put your final answer within \\boxed{}."),
)


def unwrap(text: str) -> tuple[str, bool]:
    """A question without the known instruction around it, and whether there was one.

    >>> unwrap('1+1? Let\\'s think step by step and output the final answer after "####".')
    ('1+1?', True)
    """
    for before, after in WRAPPERS:
        if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
            return text[len(before) : len(text) - len(after)].strip(), True
    return text, False


def message(prompt: Any) -> str:
    """The text of a prompt that is text, or a chat of one user message.

    Raises:
      ValueError: it is neither; a system message would be lost without a word.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or not all(isinstance(turn, Mapping) for turn in prompt):
        raise ValueError(f"its prompt is {type(prompt).__name__}, not text or messages")
    roles = [turn.get("role") for turn in prompt]
    if roles != ["user"] or not isinstance(prompt[0].get("content"), str):
        raise ValueError(
            f"its prompt has messages of {', '.join(map(str, roles)) or 'nobody'}, not one of user"
        )
    return prompt[0]["content"]


def plain_answer(value: Any) -> str:
    """An answer as text; a whole number that a table stored as a float is written as one.

    Raises:
      ValueError: it is neither text nor a finite number.

    >>> plain_answer(27.0), plain_answer(0.5), plain_answer(" x ")
    ('27', '0.5', ' x ')
    """
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value
    raise ValueError(f"the answer must be text: it has {value!r}")


def solved(solution: str) -> str:
    r"""The final answer of a MATH solution: its last box, of which some have no braces.

    Raises:
      ValueError: there is no box.

    >>> solved(r"Thus $\boxed{\frac12}$."), solved(r"so $\boxed 3$."), solved(r"so \fbox{4}")
    ('\\frac12', '3', '4')
    """
    answer = boxed(solution.replace(r"\fbox{", r"\boxed{"))
    if answer is None:
        bare = re.findall(r"\\boxed\s+([^\s$.{}]+)", solution)
        if not bare:
            raise ValueError(r"its solution has no \boxed{...}")
        answer = bare[-1]
    return answer


def after_hashes(answer: Any) -> str:
    """The final answer of a GSM8K solution, or an answer that is one already.

    >>> after_hashes("2+2=<<2+2=4>>4\\n#### 1,004"), after_hashes("12")
    ('1004', '12')
    """
    text = plain_answer(answer)
    _, hashes, final = text.rpartition("####")
    return re.sub(r"(?<=\d),(?=\d{3})", "", final.strip()) if hashes else text


def named(fields: Fields) -> str | None:
    """The id a row goes by, if it has one."""
    extra = fields.get("extra_info")
    if isinstance(extra, Mapping) and extra.get("index") is not None:
        index = extra["index"]
        # verl's own scripts number the rows of each set and split from 0; DAPO's are unique by themselves.
        if isinstance(index, int):
            return "/".join(
                str(part)
                for part in (fields.get("data_source"), extra.get("split"), index)
                if part is not None
            )
        return str(index)
    for name in ("id", "unique_id"):
        if fields.get(name) not in (None, ""):
            return str(fields[name])
    return None


def _verl(fields: Fields) -> Asked:
    prompt, unwrapped = unwrap(message(fields["prompt"]))
    return Asked(named(fields), prompt, plain_answer(fields["reward_model"]["ground_truth"]), unwrapped)


def _labelled(fields: Fields) -> Asked:
    prompt, unwrapped = unwrap(message(fields["prompt"]))
    return Asked(named(fields), prompt, plain_answer(fields["label"]), unwrapped)


LAYOUTS = {
    "verl": Layout(("prompt", "reward_model"), _verl),
    "prompt": Layout(
        ("prompt", "answer"), lambda f: Asked(named(f), message(f["prompt"]), plain_answer(f["answer"]))
    ),
    "labelled": Layout(("prompt", "label"), _labelled),
    "problem": Layout(
        ("problem", "answer"), lambda f: Asked(named(f), f["problem"], plain_answer(f["answer"]))
    ),
    "solution": Layout(
        ("problem", "solution"), lambda f: Asked(named(f), f["problem"], solved(f["solution"]))
    ),
    "question": Layout(
        ("question", "answer"), lambda f: Asked(named(f), f["question"], after_hashes(f["answer"]))
    ),
}


def layout_of(columns: Sequence[str]) -> str | None:
    """The name of the first layout whose columns are all there, in whatever case; None if none is.

    >>> layout_of(["ID", "Problem", "Solution", "Answer"]), layout_of(["text"])
    ('problem', None)
    """
    have = {column.lower() for column in columns}
    return next((name for name, layout in LAYOUTS.items() if have.issuperset(layout.columns)), None)


# What is read of a wide table beside a layout's own columns: enough to name a row.
NAMING = ("extra_info", "data_source", "id", "unique_id")
