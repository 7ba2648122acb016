"""Plots of a summary, as SVG text for one page."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from opd_jax.method.structure import SIZES
from opd_jax.study.summary import Numbers, Summary

# Arms keep one colour on the whole page; chosen to be told apart by most colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "svg.hashsalt": "opd",  # equal numbers give equal files
    "svg.fonttype": "none",
}


def _svg(draw: Callable[[Sequence[Axes]], None], panels: int, height: float, rows: int = 1) -> str:
    """Draw panels side by side and return the figure as an ``<svg>`` element."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, height), layout="constrained")
        # Panels above each other are one quantity for all runs.
        share: Literal["row", "none"] = "row" if rows > 1 else "none"
        axes = figure.subplots(rows, panels, squeeze=False, sharey=share)
        draw(axes.ravel().tolist())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _coloured(summary: Summary) -> Iterator[tuple[Numbers, str]]:
    """Every run with its colour."""
    return zip(summary.runs, itertools.cycle(COLOURS), strict=False)


def _count_along(axis: Axes, label: str) -> None:
    """An x-axis that counts: whole numbers only."""
    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def learning_curves(summary: Summary) -> str:
    """Reward, KL to the teacher and loss by round."""
    panels = (
        ("reward", "share of training rollouts that are right"),
        ("kl_teacher_k1", "KL(student || teacher) per token, nats"),
        ("loss", "loss (its scale differs between losses)"),
    )

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (name, title) in zip(axes, panels, strict=True):
            for run, colour in _coloured(summary):
                rounds = [r["round"] + 1 for r in run["rounds"]]
                axis.plot(rounds, [r[name] for r in run["rounds"]], color=colour, label=run["name"])
            axis.set_title(title)
            _count_along(axis, "round")
        axes[0].legend(frameon=False)

    return _svg(draw, len(panels), 3.0)


def within_round(summary: Summary) -> str:
    """Distribution of drift (above) and weight (below) over tokens by update within a round."""

    def band(axis: Axes, run: Numbers, name: str, colour: str) -> None:
        updates = [position["update"] for position in run["within_round"]]
        values = np.array([position[name] for position in run["within_round"]])
        axis.fill_between(updates, values[:, 0], values[:, 4], color=colour, alpha=0.18, lw=0)
        axis.fill_between(updates, values[:, 1], values[:, 3], color=colour, alpha=0.35, lw=0)
        axis.plot(updates, values[:, 2], color=colour)

    def draw(axes: Sequence[Axes]) -> None:
        upper, lower = axes[: len(summary.runs)], axes[len(summary.runs) :]
        for run, colour, top, bottom in zip(
            summary.runs, itertools.cycle(COLOURS), upper, lower, strict=False
        ):
            band(top, run, "drift_percentiles", colour)
            band(bottom, run, "weight_percentiles", colour)
            top.set_title(run["name"])
            _count_along(top, "")
            _count_along(bottom, "update within a round")
        upper[0].set_ylabel("drift d, nats")
        lower[0].set_ylabel("weight w")

    return _svg(draw, len(summary.runs), 4.6, rows=2)


def effective_tokens(summary: Summary) -> str:
    """Effective token ratio and mean drift, by update within a round and over the run."""

    def draw(axes: Sequence[Axes]) -> None:
        for run, colour in _coloured(summary):
            positions = run["within_round"]
            updates = [position["update"] for position in positions]
            for axis, name in ((axes[0], "effective_token_ratio"), (axes[1], "drift_abs")):
                axis.plot(
                    updates,
                    [p[name] for p in positions],
                    "o-",
                    ms=3,
                    color=colour,
                    label=run["name"],
                )
            series = run["updates"]
            axes[2].plot(series["update"], series["effective_token_ratio"], lw=0.8, color=colour)
        for axis, title, label in (
            (axes[0], "effective token ratio", "update within a round"),
            (axes[1], "mean |d| per token, nats", "update within a round"),
            (axes[2], "effective token ratio over the run", "update"),
        ):
            axis.set_title(title)
            _count_along(axis, label)
        axes[0].legend(frameon=False)

    return _svg(draw, 3, 3.0)


def structure(summary: Summary) -> str:
    """Whether drift is coherent along a response: autocorrelation, variance of block means, cancellation."""
    panels = (
        ("autocorrelation", "autocorrelation of drift", "lag, tokens"),
        ("block_variance", "variance of block means, over that of noise", "block size, tokens"),
        ("cancellation", "|mean d| / mean |d| within blocks", "block size, tokens"),
    )

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (name, title, label) in zip(axes, panels, strict=True):
            for run, colour in _coloured(summary):
                if run["diagnosis"]:
                    told = sorted((int(key), value) for key, value in run["diagnosis"][name].items())
                    sizes, values = [key for key, _ in told], [value for _, value in told]
                    axis.plot(sizes, values, "o-", ms=3, color=colour, label=run["name"])
            axis.set_title(title)
            axis.set_xlabel(label)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        blocks = np.array(SIZES, float)
        axes[0].axhline(0, color="#999999", lw=0.8, ls="--")
        axes[1].axhline(1, color="#999999", lw=0.8, ls="--")
        axes[2].plot(blocks, blocks**-0.5, color="#999999", lw=0.8, ls="--")
        axes[0].legend(frameon=False)

    return _svg(draw, len(panels), 3.0)


def scores(summary: Summary) -> str:
    """pass@1 and pass@n of every model, with 95% intervals over problems."""
    names = [judged["name"] for judged in summary.judged]
    arms = {run["name"]: colour for run, colour in _coloured(summary)}
    metrics = [name for name in summary.judged[0] if name.startswith("pass@")]

    def draw(axes: Sequence[Axes]) -> None:
        for axis, metric in zip(axes, metrics, strict=True):
            for row, judged in enumerate(summary.judged):
                value = judged[metric]
                colour = arms[judged["name"]] if judged["kind"] == "arm" else "#555555"
                if value["low"] is not None:
                    axis.plot([value["low"], value["high"]], [row, row], color=colour, lw=2)
                axis.plot(value["mean"], row, "o", color=colour)
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
            axis.set_title(metric + " on held-out problems")
            axis.grid(axis="y", visible=False)

    return _svg(draw, len(metrics), 0.9 + 0.32 * len(names))
