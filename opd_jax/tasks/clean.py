"""Making a clean training set: read, list each problem once, leave out what evaluation asks, report."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_jax.errors import InputError
from opd_jax.files import write_text
from opd_jax.tasks.contamination import COMMON, Pair, decontaminate, deduplicate
from opd_jax.tasks.problems import Problem, ProblemSet, check_problems, read_problem_set


def clean_problems(
    sources: Sequence[str], against: Sequence[str], out: Path, report: Path, *, common: int = COMMON
) -> dict[str, Any]:
    """Write the problems of ``sources`` that are listed once and are in none of ``against``.

    Args:
      sources: files or folders of training problems, as `opd_jax.tasks.read_problem_set` reads them.
      against: of evaluation problems.
      out: JSON lines to write, in the project's own layout.
      report: JSON to write, with a readable text beside it (``.txt``).
      common: see `opd_jax.tasks.contamination.decontaminate`.

    Returns:
      What the report says.

    Raises:
      InputError: something cannot be read, nothing is left, a file would be overwritten, or ``common`` is
        no count.
    """
    if common < 1:
        raise InputError(f"--common must be at least 1: got {common}; give how many problems may share words")
    text = report.with_suffix(".txt")
    for file in (out, report, text):
        if file.exists():
            raise InputError(f"a file is written once: {file} is there already; remove it, or name another")
    if len({out, report, text}) < 3:
        raise InputError(f"problems and report are three files: got {out}, {report} and {text}; rename one")
    trained = [read_problem_set(source) for source in sources]
    heldout = {source: read_problem_set(source) for source in against}
    problems, repeats = deduplicate(_joined(trained))
    clean, contaminated, waived = decontaminate(
        problems, {source: read.problems for source, read in heldout.items()}, common=common
    )
    check_problems(clean, "what is left after decontamination")
    told = {
        "read": [_about(read) for read in trained],
        "against": [_about(read) for read in heldout.values()],
        "problems": len(clean),
        "duplicates": len(repeats),
        "duplicates_with_other_answers": sum(not pair.answers_agree for pair in repeats),
        "contaminated": len({pair.first for pair in contaminated}),
        "rules": dict(Counter(pair.rule for pair in contaminated)),
        "common": common,
        "phrasing": len({pair.first for pair in waived}),
        "duplicate_pairs": [dataclasses.asdict(pair) for pair in repeats],
        "contaminated_pairs": [dataclasses.asdict(pair) for pair in contaminated],
        "phrasing_pairs": [dataclasses.asdict(pair) for pair in waived],
    }
    for file in (out, report):
        file.parent.mkdir(parents=True, exist_ok=True)
    # The problems last: where they are, their report is.
    write_text(text, as_text(told, repeats, contaminated, waived))
    write_text(report, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    write_text(out, "".join(_line(problem) for problem in clean))
    return told


def _line(problem: Problem) -> str:
    return json.dumps(dataclasses.asdict(problem), ensure_ascii=False) + "\n"


def _about(read: ProblemSet) -> dict[str, Any]:
    """What is told of a source; its problems are counted."""
    return {**dataclasses.asdict(read), "problems": len(read.problems)}


def _joined(sets: Sequence[ProblemSet]) -> list[Problem]:
    """Problems of several sets; where sets use the same ids, each is put behind the name of its set."""
    owners: dict[str, str] = {}
    clash = False
    for read in sets:
        for problem in read.problems:
            clash |= owners.setdefault(problem.id, read.source) != read.source
    if not clash:
        return [problem for read in sets for problem in read.problems]
    joined = [
        dataclasses.replace(problem, id=f"{Path(read.source).stem}/{problem.id}")
        for read in sets
        for problem in read.problems
    ]
    check_problems(joined, " and ".join(read.source for read in sets))
    return joined


def as_text(
    told: dict[str, Any], repeats: Sequence[Pair], contaminated: Sequence[Pair], waived: Sequence[Pair]
) -> str:
    """A report to read: counts, then every pair with what both have."""
    lines = []
    for role in ("read", "against"):
        for read in told[role]:
            lines.append(
                f"{role} {read['source']}: layout {read['layout']}, {read['rows']:,} rows, "
                f"{read['repeats']:,} repeats, {read['problems']:,} problems, {read['unwrapped']:,} without "
                "the instruction they came with"
            )
    lines += [
        f"duplicates left out: {told['duplicates']:,}, of them with another answer: "
        f"{told['duplicates_with_other_answers']:,}",
        f"contaminated left out: {told['contaminated']:,}"
        + "".join(f"; {rule} {count:,}" for rule, count in told["rules"].items()),
        f"kept that share but phrasing of more than {told['common']} problems: {told['phrasing']:,}",
        f"problems written: {told['problems']:,}",
    ]
    for title, pairs in (
        ("CONTAMINATED", contaminated),
        ("DUPLICATES", repeats),
        ("KEPT, COMMON PHRASING ALONE", waived),
    ):
        lines += ["", title] if pairs else []
        for pair in pairs:
            of = f" of {pair.set}" if pair.set else ""
            answers = "" if pair.answers_agree else ", another answer"
            lines.append(f"{pair.first} = {pair.second}{of} ({pair.rule}{answers}): {pair.fragment}")
    return "\n".join(lines) + "\n"
