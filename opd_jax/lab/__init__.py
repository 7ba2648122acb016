"""The lab: an embedded world in which the whole road runs on a laptop.

A verifiable long-chain task, its tokenizer, and two small Qwen3 models trained on it. In a config the
models are ``lab:student`` and ``lab:teacher``, the problems ``lab:train``, ``lab:validation`` and
``lab:heldout``.
"""

from __future__ import annotations

from pathlib import Path

from opd_jax.lab.chains import chains, solution
from opd_jax.tasks import Problem

__all__ = ["chains", "heldout", "solution", "student", "teacher", "train", "validation"]


def student() -> Path:
    """Folder of the base student: it knows the format, and slips."""
    return Path(__file__).parent / "models" / "student"


def teacher() -> Path:
    """Folder of the teacher."""
    return Path(__file__).parent / "models" / "teacher"


def train() -> list[Problem]:
    """Training problems: 16 to 20 one-digit terms."""
    return chains("train", 4096)


def heldout() -> list[Problem]:
    """Held-out problems, disjoint from all training ones by construction."""
    return chains("heldout", 200)


def validation() -> list[Problem]:
    """Problems to choose settings by: in neither the training nor the held-out ones."""
    reserved = {problem.id for problem in heldout()}
    return [problem for problem in chains("heldout", 220, seed=1) if problem.id not in reserved][:200]
