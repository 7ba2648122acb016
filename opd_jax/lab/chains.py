r"""Long-chain arithmetic: a verifiable task in which one early slip spoils the end.

A problem is a sum of labelled one-digit terms; the answer walks through it line by line::

    a+3b+9c-4                 the prompt, ended by a newline
    a+3=3                     each line: label, sign, term, running result
    b+9=12
    c-4=8
    \boxed{8}                 the answer

Difficulty is the number of terms and their size. Running results stay between 0 and 99. Train and
held-out problems are disjoint by construction: the hash of a prompt says which split it belongs to.
"""

from __future__ import annotations

import hashlib
import itertools
import string
from typing import Literal

import numpy as np

from opd_jax.errors import InputError
from opd_jax.tasks.problems import Problem

Split = Literal["train", "heldout"]
LABELS = string.ascii_lowercase
LIMIT = 99  # largest running result


def chains(
    split: Split, count: int, *, seed: int = 0, terms: tuple[int, int] = (16, 20), largest: int = 9
) -> list[Problem]:
    """Draw ``count`` distinct problems of one split.

    Args:
      split: ``train`` or ``heldout``; no prompt is ever in both.
      count: how many.
      seed: of the draw.
      terms: fewest and most terms, both included, at most 26.
      largest: terms are drawn from 1 to this, at most 9 for one-digit terms, 99 for two-digit ones.

    Raises:
      InputError: the range of terms or their size is impossible.
    """
    fewest, most = terms
    if not 1 <= fewest <= most <= len(LABELS) or not 1 <= largest <= LIMIT:
        raise InputError(
            f"a chain has 1 to {len(LABELS)} terms of 1 to {LIMIT}: got terms {fewest} to {most} of "
            f"up to {largest}; choose within the range"
        )
    rng = np.random.default_rng([seed, split == "train"])
    drawn: dict[str, Problem] = {}
    barren = 0
    while len(drawn) < count:
        problem = _draw(rng, int(rng.integers(fewest, most + 1)), largest)
        if split_of(problem.prompt) == split and problem.id not in drawn:
            drawn[problem.id] = problem
            barren = 0
        else:
            barren += 1
        if barren > 10_000:
            raise InputError(
                f"there must be enough distinct chains: only {len(drawn)} of {count} were found with "
                f"terms {fewest} to {most} of up to {largest}; ask for fewer or for longer ones"
            )
    return list(drawn.values())


def _draw(rng: np.random.Generator, terms: int, largest: int) -> Problem:
    total, text = 0, ""
    for label in LABELS[:terms]:
        signs: list[int] = []
        while not signs:  # a large term may fit with neither sign
            term = int(rng.integers(1, largest + 1))
            signs = [s for s in (1, -1) if 0 <= total + s * term <= LIMIT]
        sign = signs[int(rng.integers(len(signs)))]
        total += sign * term
        text += f"{label}{'+' if sign > 0 else '-'}{term}"
    return Problem(id=text, prompt=text + "\n", answer=str(total))


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to: one hash bucket in eight is held out."""
    return "heldout" if hashlib.sha256(prompt.strip().encode()).digest()[0] % 8 == 0 else "train"


def solution(problem: Problem) -> str:
    """The full written answer of a problem, as the models are taught to give it."""
    text, total, lines = problem.prompt.strip(), 0, []
    starts = [i for i, char in enumerate(text) if char in LABELS] + [len(text)]
    for start, end in itertools.pairwise(starts):
        total += int(text[start + 1 : end])
        lines.append(f"{text[start:end]}={total}\n")
    return "".join(lines) + rf"\boxed{{{total}}}"
