"""The report: one self-contained page over the folders of one or more runs, and its numbers as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from opd_jax.errors import InputError
from opd_jax.files import write_text
from opd_jax.settings import load_config
from opd_jax.study import plots
from opd_jax.study.summary import Numbers, Summary, as_json, interval, summarise
from opd_jax.tasks import load_tokenizer
from opd_jax.train.run import Run

SHOWN = 2  # rollouts of each gated run


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a shown rollout."""

    text: str
    weight: float
    drift: float
    colour: str
    border: bool  # first of its segment


def write_report(folders: Sequence[Path], page: Path) -> Path:
    """Write ``page`` and, beside it, the same numbers as JSON.

    Args:
      folders: run folders; evaluations found in them are shown.
      page: the HTML file.

    Raises:
      InputError: a folder is no trained run, or ``page`` would be overwritten by its numbers.
    """
    if page.suffix not in (".html", ".htm"):
        raise InputError(f"a page is HTML, with its numbers beside it as .json: got {page}; name it .html")
    folders = [Path(folder) for folder in folders]
    summary = summarise(folders)
    environment = Environment(
        loader=PackageLoader("opd_jax.study"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda fields: interval(fields).percent()
    html = environment.get_template("report.html.j2").render(
        summary=summary,
        common=_common(summary),
        learning=Markup(plots.learning_curves(summary)),
        within=Markup(plots.within_round(summary)),
        effective=Markup(plots.effective_tokens(summary)),
        structure=Markup(plots.structure(summary)) if any(run["diagnosis"] for run in summary.runs) else None,
        scores=Markup(plots.scores(summary)) if summary.judged else None,
        rollouts=[
            shown
            for folder, run in zip(folders, summary.runs, strict=True)
            for shown in _rollouts(folder, run["name"])
        ],
        metrics=[name for name in (summary.judged or [{}])[0] if name.startswith("pass@")],
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, html)
    write_text(page.with_suffix(".json"), as_json(summary))
    return page


def _common(summary: Summary) -> Numbers:
    """The settings that all runs share."""
    first, *others = (run["settings"] for run in summary.runs)
    return {key: first[key] for key in first if all(other[key] == first[key] for other in others)}


def _rollouts(folder: Path, name: str) -> list[dict[str, Any]]:
    """A few rollouts of a gated run, at the last update of its last round."""
    config = load_config(folder / "config.yaml")
    files = sorted((folder / "tokens").glob("round-*.parquet"))
    if config.gate.segments == "none" or not files:
        return []
    tokenizer = load_tokenizer(Run(folder, config).student_folder)
    try:
        rows = pq.read_table(files[-1]).to_pylist()[:SHOWN]
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"tokens must be parquet: {files[-1]} is not ({error}); remove it") from None
    reach = max((abs(w - 1) for row in rows for w in row["weights"]), default=0.0) or 1.0
    return [
        {
            "run": name,
            "problem": row["problem"],
            "round": row["round"] + 1,
            "right": row["reward"] > 0,
            "reach": reach,
            "tokens": _tokens(tokenizer, row, reach),
        }
        for row in rows
    ]


def _tokens(tokenizer: Any, row: Numbers, reach: float) -> list[Token]:
    texts = tokenizer.batch_decode([[token] for token in row["response_ids"]])
    segments = row["segments"]
    return [
        Token(
            text=text,
            weight=weight,
            drift=drift,
            colour=_colour((weight - 1) / reach),
            border=index == 0 or segments[index] != segments[index - 1],
        )
        for index, (text, weight, drift) in enumerate(zip(texts, row["weights"], row["drift"], strict=True))
    ]


def _colour(x: float) -> str:
    """Orange for a weight below one, white at one, blue above; ``x`` in [-1, 1]."""
    towards = (213, 94, 0) if x < 0 else (0, 114, 178)
    share = 0.75 * min(abs(x), 1.0)
    red, green, blue = (round(255 + share * (end - 255)) for end in towards)
    return f"rgb({red},{green},{blue})"
