"""A plan as a table that a person reads, and as JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from opd_jax.config import Config
from opd_jax.plan.programs import Program
from opd_jax.plan.topology import GIB


def fits(program: Program, memory: int | None) -> bool | None:
    """Whether a program fits a device; None where the device does not say how much it has."""
    if program.error:
        return False
    return None if memory is None else program.total <= memory


def as_json(programs: Sequence[Program], memory: int | None) -> list[dict[str, Any]]:
    """The figures of each program; sizes in bytes on one device."""
    return [
        {**dataclasses.asdict(program), "total": program.total, "fits": fits(program, memory)}
        for program in programs
    ]


def as_table(config: Config, programs: Sequence[Program], memory: int | None) -> str:
    """A Markdown table: a line a program, memory of one device in GiB by kind."""
    kinds = list(dict.fromkeys(kind for p in programs for kind in (*p.arguments, *p.beside)))
    kinds.sort(key=["student", "optimizer", "teacher", "base", "cache", "batch"].index)
    names = [
        "program", *kinds, "temporary", "output", "code", "total", "fits", "TFLOP", "traffic", "compiled in"
    ]  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for p in programs:
        sizes = [p.arguments.get(kind, p.beside.get(kind, 0)) for kind in kinds]
        sizes += [p.temporary, p.output, p.code, p.total]
        verdict = {True: "yes", False: p.error or "no", None: "?"}[fits(p, memory)]
        moved = f"{sum(p.traffic.values()) / GIB:.2f}"
        cells = [
            *(f"{size / GIB:.2f}" for size in sizes),
            verdict,
            f"{p.flops / 1e12:.2f}",
            moved,
            f"{p.seconds:.0f} s",
        ]
        lines.append("| " + " | ".join([p.name, *cells]) + " |")
    sampling, schedule = config.sampling, config.schedule
    rows = sampling.prompts * sampling.samples // schedule.minibatches
    of = "unknown" if memory is None else f"{memory / GIB:.2f} GiB"
    lines += [
        "",
        f"Memory, products and traffic (GiB received) are those of one device, which has {of}. "
        f"An update takes {rows} rows in {schedule.microbatches} parts. The products and traffic of sample "
        "are those of one token a slot; prefill reads prompts into the slots that are free.",
    ]
    return "\n".join(lines)
