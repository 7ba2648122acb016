"""The command ``opd``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from opd_jax.backend import sum_in_one_order
from opd_jax.errors import InputError

INTERRUPTED = 130  # the shell's status for Ctrl-C


class _Parser(argparse.ArgumentParser):
    """Argparse with errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="opd", description="Drift-gated on-policy distillation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help_: str, *, config: bool = True) -> argparse.ArgumentParser:
        epilog = "Settings are overridden by dotted names: --gate.block 32" if config else None
        sub = commands.add_parser(name, help=help_, description=help_, epilog=epilog)
        if config:
            sub.add_argument("--config", type=Path, help="YAML or TOML file of settings")
        return sub

    demo = command("demo", "Distil the lab's student with and without the gate, and report.")
    demo.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"), help="folder to fill")
    for name, help_ in (
        ("distill", "Do all rounds of a run, or go on with it."),
        ("sample", "Draw the next round's rollouts of a run."),
        ("score", "Attach old log-probs and the teacher's signal to them."),
        ("train", "Do the updates of the current round."),
    ):
        command(name, help_).add_argument("run", type=Path, help="run folder")
    evaluate = command("evaluate", "Judge a run's model on held-out problems.", config=False)
    evaluate.add_argument("run", type=Path, help="run folder")
    evaluate.add_argument(
        "--of", choices=("student", "base", "teacher"), default="student", help="which model"
    )
    report = command("report", "Write a page of plots over one or more runs.", config=False)
    report.add_argument("runs", type=Path, nargs="+", help="run folders")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="page to write")
    lab = command("lab", "Train the lab's models from nothing.", config=False)
    lab.add_argument("--out", type=Path, required=True, help="folder to write")
    lab.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments, overrides = _parser().parse_known_args(argv)
        if overrides and not hasattr(arguments, "config"):
            raise InputError(
                f"opd {arguments.command} takes no settings: got {' '.join(overrides)}; drop them"
            )
        return _run(arguments, overrides, again=shlex.join(["opd", *argv]))
    except InputError as error:
        print(f"opd: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1


def _run(arguments: argparse.Namespace, overrides: list[str], again: str) -> int:
    # Three processes a round compile the same programs; the cache makes the later ones start at once.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opd_jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    sum_in_one_order()
    # Imported late: what follows loads JAX, and `opd --help` should not wait for it.
    from opd_jax import commands
    from opd_jax.train.interrupt import Interrupted, stop_on_signal

    with stop_on_signal() as stop:
        try:
            commands.COMMANDS[arguments.command](arguments, overrides, stop)
        except (Interrupted, KeyboardInterrupt):
            # What is finished is on disk either way; a second Ctrl-C only costs the part under way.
            print(f"\nopd: interrupted; go on with: {again}", file=sys.stderr)
            return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
