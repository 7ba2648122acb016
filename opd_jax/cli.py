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
from opd_jax.interrupt import Interrupted, Stop, stop_on_signal
from opd_jax.processes import end_soon, join

INTERRUPTED = 130  # the shell's status for Ctrl-C
NO_SETTINGS = ("report", "lab", "problems", "import", "export")
# These hold nothing that stopping later could spare.
AT_ONCE = ("report", "plan", "problems", "import", "inspect", "export")


class _Parser(argparse.ArgumentParser):
    """Argparse with errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _path(text: str) -> Path:
    """A path of this machine; of a URL, which Path would make a folder of, the user is told."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"files and run folders are of this machine: got {text}; name a path (only stores may be URLs: "
            "store.at, import --out, inspect)"
        )
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="opd",
        description="Drift-gated on-policy distillation.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help_: str, *, settings: str = "gate.block 32") -> argparse.ArgumentParser:
        epilog = f"Settings are overridden by dotted names: --{settings}" if settings else None
        sub = commands.add_parser(name, help=help_, description=help_, epilog=epilog)
        if settings.startswith("gate"):
            sub.add_argument("--config", type=_path, help="YAML or TOML file of settings")
        return sub

    def shared(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """A command that many processes may do together."""
        sub.add_argument("--distributed", action="store_true", help="join the other processes of the cluster")
        return sub

    demo = shared(command("demo", "Distil the lab's student with and without the gate, and report."))
    demo.add_argument("run", nargs="?", type=_path, default=Path("runs/demo"), help="folder to fill")
    for name, help_ in (
        ("distill", "Do all rounds of a run, or go on with it."),
        ("sample", "Draw the next round's rollouts of a run."),
        ("score", "Attach old log-probs and the teacher's signal to them."),
        ("train", "Do the updates of the current round."),
    ):
        shared(command(name, help_)).add_argument("run", type=_path, help="run folder")
    export = shared(command("export", "Write a run's student as it is now, for others to load.", settings=""))
    export.add_argument("run", type=_path, help="run folder")
    evaluate = shared(
        command("evaluate", "Judge a run's model on held-out problems.", settings="evaluation.samples 16")
    )
    evaluate.add_argument("run", type=_path, help="run folder")
    evaluate.add_argument(
        "--of", choices=("student", "base", "teacher"), default="student", help="which model"
    )
    report = command("report", "Write a page of plots over one or more runs.", settings="")
    report.add_argument("runs", type=_path, nargs="+", help="run folders")
    report.add_argument("--out", type=_path, default=Path("report.html"), help="page to write")
    plan = command("plan", "Compile a run's programs for devices, and say what they will take.")
    plan.add_argument("--topology", default="local", help="local, GPUs (h100:8) or TPUs (v5e:16x16)")
    plan.add_argument("--model", default="", help="the student: a published size, or a checkpoint folder")
    plan.add_argument("--teacher", default="", help="the teacher, likewise")
    plan.add_argument("--json", type=_path, help="write the figures here, too")
    problems = command("problems", "Make a training set without what evaluation asks.", settings="")
    problems.add_argument(
        "sources", nargs="+", metavar="FILE", help="problems: file, folder or hf:OWNER/NAME"
    )
    problems.add_argument("--against", nargs="+", metavar="FILE", default=[], help="evaluation problems")
    problems.add_argument("--out", type=_path, required=True, help="JSON lines to write")
    problems.add_argument("--report", type=_path, help="report to write, .json; readable beside it as .txt")
    problems.add_argument(
        "--common", type=int, default=10, help="problems that may share words before they count as phrasing"
    )
    imported = command("import", "Make a store of rollouts that another trainer wrote down.", settings="")
    imported.add_argument("trainer", choices=("verl", "trl"), help="whose dump it is")
    imported.add_argument("dump", type=_path, metavar="DUMP", help="file or folder")
    imported.add_argument("--out", required=True, help="store to write: a folder, or a URL")
    imported.add_argument("--tokenizer", type=_path, required=True, help="folder of the model's tokenizer")
    imported.add_argument("--temperature", type=float, default=1.0, help="that the log-probs are of")
    imported.add_argument("--reward", default="", metavar="COLUMN", help="column of the reward")
    inspect = command("inspect", "Read drift and gate weights off a store, without training.")
    inspect.add_argument("store", help="scored or imported store: a folder, or a URL")
    inspect.add_argument("--round", type=int, action="append", default=[], help="only this round")
    inspect.add_argument("--tokenizer", type=_path, help="folder of the tokenizer, for gate.segments newline")
    inspect.add_argument("--json", type=_path, help="write the figures here, too")
    lab = command("lab", "Train the lab's models from nothing.", settings="")
    lab.add_argument("--out", type=_path, required=True, help="folder to write")
    lab.add_argument("--root-seed", type=int, default=0, help="of problems, batches and initial weights")
    return parser


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part ``--dotted.name value`` pairs, and ``--seed``, from the rest of a command line.

    >>> split_settings(["train", "--gate.block", "32", "runs/a", "--seed=3", "--config", "c.yaml"])
    (['train', 'runs/a', '--config', 'c.yaml'], ['--gate.block=32', '--seed=3'])
    """
    rest: list[str] = []
    settings: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if not (name.startswith("--") and ("." in name or name == "--seed")):
            rest.append(word)
        elif equals:
            settings.append(word)
        else:
            value = next(words, None)
            if value is None:
                raise InputError(f"a setting must have a value: {name} has none; add one")
            settings.append(f"{name}={value}")
    return rest, settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _status(argv)
    except BaseException:
        end_soon(1)
        raise
    if status:
        end_soon(status)
    return status


def _status(argv: Sequence[str]) -> int:
    try:
        with stop_on_signal(at_once=bool(argv) and argv[0] in AT_ONCE) as stop:
            words, settings = split_settings(argv)
            arguments = _parser().parse_args(words)
            if settings and arguments.command in NO_SETTINGS:
                raise InputError(
                    f"opd {arguments.command} takes no settings: got {' '.join(settings)}; drop them"
                )
            _run(arguments, settings, stop)
    except (Interrupted, KeyboardInterrupt):
        # What is finished is on disk either way; a second Ctrl-C only costs what is under way.
        print(f"\nopd: interrupted; {_again(argv)}", file=sys.stderr)
        return INTERRUPTED
    except InputError as error:
        print(f"opd: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except (OSError, MemoryError) as error:
        reason = " ".join(str(error).split()) or "out of memory"
        print(
            f"opd: files and memory must be there to use: {reason}; make room, or name others",
            file=sys.stderr,
        )
        return 2
    except RuntimeError as error:  # JAX's, which is not loaded yet where it is not needed
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        reason = " ".join(str(error).splitlines()[0].split())
        print(
            f"opd: a run must fit its devices: {reason}; take fewer rows at a time (schedule.microbatches, "
            "sampling.slots), set model.residency to sequential, or ask opd plan",
            file=sys.stderr,
        )
        return 2
    return 0


def _again(argv: Sequence[str]) -> str:
    """How to go on, in words that work where this command did."""
    if argv and argv[0] in ("lab", *AT_ONCE):
        return "begin again with the same command"
    program = sys.argv[0] if Path(sys.argv[0]).name == "opd" else f"{sys.executable} -m opd_jax.cli"
    return f"go on with: {program} {shlex.join(argv)}"


def _run(arguments: argparse.Namespace, settings: list[str], stop: Stop) -> None:
    # Three processes a round compile the same programs; the cache makes the later ones start at once.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opd_jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    sum_in_one_order()
    if "distributed" in arguments:  # the environment may ask for many, too, of a command that many can do
        join(arguments.distributed)
    # Imported late: what follows loads JAX, and `opd --help` should not wait for it.
    from opd_jax import commands

    commands.COMMANDS[arguments.command](arguments, settings, stop)


if __name__ == "__main__":
    sys.exit(main())
