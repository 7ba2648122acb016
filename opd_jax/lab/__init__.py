"""The lab: an embedded world in which the whole road runs on a laptop.

A verifiable long-chain task, its tokenizer, and two small Qwen3 models trained on it. In a config the
models are ``lab:student`` and ``lab:teacher``, the problems ``lab:train`` and ``lab:heldout``.
"""

from __future__ import annotations

from pathlib import Path

from opd_jax.lab.chains import chains, first_slip, solution
from opd_jax.tasks import Problem

__all__ = ["chains", "first_slip", "heldout", "solution", "student", "teacher", "train"]


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
