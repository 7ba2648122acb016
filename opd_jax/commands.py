"""What each subcommand of ``opd`` does."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

from opd_jax.config import Config, flatten
from opd_jax.errors import InputError
from opd_jax.evaluate import Answer, by_problem, read_answers
from opd_jax.files import write_text
from opd_jax.interrupt import Stop
from opd_jax.processes import is_first
from opd_jax.settings import config_file, load_config
from opd_jax.study.demo import ARM_SETTINGS, demo
from opd_jax.study.evaluation import Who, evaluate_run, is_judged
from opd_jax.study.report import write_report
from opd_jax.study.statistics import share_interval
from opd_jax.train.loop import Report, distill, do_part, export_student, next_part
from opd_jax.train.opening import open_run
from opd_jax.train.run import Run

Overrides = Sequence[str]


@contextlib.contextmanager
def progress(run: Run, label: str) -> Iterator[Report]:
    """A bar over a run's updates: loss, drift, gate and response tokens trained on per second."""
    schedule = run.config.schedule
    began, tokens = time.monotonic(), 0
    with tqdm(
        total=schedule.rounds * schedule.updates_per_round,
        initial=int(run.state.update),
        desc=label,
        unit="update",
        disable=not is_first() or None,
    ) as bar:

        def report(line: dict[str, Any]) -> None:
            nonlocal tokens
            tokens += line["tokens"]
            bar.set_postfix_str(
                f"loss {line['loss']:+.4f}, drift {line['drift_abs']:.4f}, "
                f"gate {line['effective_token_ratio']:.3f}, "
                f"{tokens / (time.monotonic() - began):,.0f} tokens/s",
                refresh=False,
            )
            bar.update()

        yield report


def judge(run: Run, who: Who, label: str, stop: Stop) -> None:
    """Evaluate a model of a run, with a bar, and print what came out."""
    total = len(run.heldout) * run.config.evaluation.samples
    seen = right = 0
    with tqdm(total=total, desc=f"{label}: evaluation", unit="answer", disable=not is_first() or None) as bar:

        def report(answer: Answer) -> None:
            nonlocal seen, right
            seen, right = seen + 1, right + answer.correct
            bar.set_postfix_str(f"right {right / seen:.3f}", refresh=False)
            bar.update()

        file = evaluate_run(run, who, report, stop)
    if not is_first():
        return
    records = read_answers(file)
    for k in sorted({1, run.config.evaluation.samples}):
        interval = share_interval(list(by_problem(records, k).values()))
        print(f"{label}: pass@{k} {interval.percent()} %, {len(run.heldout)} problems, {file}")


def say(line: str) -> None:
    """Print, if this process speaks for the run."""
    if is_first():
        print(line)


def _settings(arguments: argparse.Namespace, overrides: Overrides) -> Config | None:
    """The config that the command line asks for; None where it asks for none."""
    saved = arguments.run / "config.yaml"
    if arguments.config is None and not overrides:
        return None
    return load_config(arguments.config or (saved if saved.exists() else None), overrides)


def _demo(arguments: argparse.Namespace, overrides: Overrides, stop: Stop) -> None:
    for word in overrides:
        if word.removeprefix("--").split("=")[0] in ARM_SETTINGS:
            raise InputError(f"the demo's arms set {' and '.join(ARM_SETTINGS)}: got {word}; use opd distill")
    config = load_config(arguments.config or config_file("lab.yaml"), overrides)
    asked, default = flatten(config), flatten(Config())
    for name in ARM_SETTINGS:
        if asked[name] != default[name]:
            raise InputError(
                f"the demo's arms set {' and '.join(ARM_SETTINGS)}: {arguments.config} sets {name}; drop it, "
                "or use opd distill"
            )

    failed = threading.Event()  # an arm has, and the others need not go on

    def halt() -> bool:
        return stop() or failed.is_set()

    def judge_once(run: Run, who: Who, label: str) -> None:
        if not is_judged(run, who):
            judge(run, who, label, halt)

    def train(run: Run, label: str) -> None:
        if next_part(run) != "done":
            with progress(run, label) as report:
                distill(run, report, halt)

    print(f"report: {demo(arguments.run, config, train, judge_once, failed.set)}")


def _opened(arguments: argparse.Namespace, overrides: Overrides) -> Run:
    """The run, after a line on its peak, where a device can run out of memory or the models take turns."""
    settings, saved = _settings(arguments, overrides), arguments.run / "config.yaml"
    asked = settings or (load_config(saved) if saved.exists() else None)
    if asked is not None:
        from opd_jax.plan.command import peak_of
        from opd_jax.plan.topology import memory_of

        if asked.model.residency == "sequential" or memory_of(jax.local_devices()[0]) is not None:
            say(peak_of(Run(arguments.run, asked)))  # before anything is loaded
    return open_run(arguments.run, settings)


def _distill(arguments: argparse.Namespace, overrides: Overrides, stop: Stop) -> None:
    run = _opened(arguments, overrides)
    say(str(run.kernel))
    with progress(run, arguments.run.name) as report:
        distill(run, report, stop)
    say(f"student: {export_student(run)}")


def _part(arguments: argparse.Namespace, overrides: Overrides, stop: Stop) -> None:
    run, part = _opened(arguments, overrides), arguments.command
    if part == "train":
        with progress(run, arguments.run.name) as report:
            do_part(run, part, report, stop)
    else:
        do_part(run, part, lambda line: None, stop)
    done = {"sample": run.rollouts, "score": run.scored}.get(part)
    what = f"round {done.rounds[-1]} in {done.path}" if done else f"update {int(run.state.update)}"
    following = next_part(run)
    say(f"{part}: {what}; next: {following}")
    if following == "done":
        say(f"student: {export_student(run)}")


def _export(arguments: argparse.Namespace, overrides: Overrides, stop: Stop) -> None:
    if not (arguments.run / "config.yaml").exists():
        raise InputError(f"export writes a run's student: {arguments.run} has no config.yaml; name a run")
    say(f"student: {export_student(open_run(arguments.run))}")


def _evaluate(arguments: argparse.Namespace, overrides: Overrides, stop: Stop) -> None:
    saved = arguments.run / "config.yaml"
    if not saved.exists():
        raise InputError(f"evaluate judges a run: {arguments.run} has no config.yaml; train one there first")
    for word in overrides:
        if not word.startswith(("--evaluation.", "--mesh.")):
            raise InputError(f"evaluate takes settings of evaluation and mesh: got {word}; drop it")
    judge(open_run(arguments.run, load_config(saved, overrides)), arguments.of, arguments.of, stop)


def _report(arguments: argparse.Namespace, overrides: Overrides, stop: Stop) -> None:
    print(f"report: {write_report(arguments.runs, arguments.out)}")


def _plan(arguments: argparse.Namespace, overrides: Overrides, stop: Stop) -> None:
    from opd_jax.plan.command import check_fit, plan
    from opd_jax.plan.report import as_json, as_table

    config = load_config(arguments.config, overrides)
    student, teacher = arguments.model or config.model.student, arguments.teacher or config.model.teacher
    programs, memory, about = plan(config, student, teacher, arguments.topology)
    print(f"{student} <- {teacher}: {about}\n\n{as_table(config, programs, memory)}")
    if arguments.json:
        write_text(arguments.json, json.dumps(as_json(programs, memory), indent=1) + "\n")
    check_fit(programs, memory)


def _problems(arguments: argparse.Namespace, overrides: Overrides, stop: Stop) -> None:
    from opd_jax.tasks.clean import clean_problems

    report = arguments.report or arguments.out.with_suffix(".report.json")
    told = clean_problems(
        arguments.sources, arguments.against, arguments.out, report, common=arguments.common
    )
    print(
        f"problems: {told['problems']:,} in {arguments.out}; left out {told['duplicates']:,} duplicates and "
        f"{told['contaminated']:,} that evaluation asks; kept {told['phrasing']:,} that share but common "
        f"phrasing with it; every pair in {report.with_suffix('.txt')}"
    )


def _import(arguments: argparse.Namespace, overrides: Overrides, stop: Stop) -> None:
    from opd_jax.rollout.import_dumps import import_dump, old_store
    from opd_jax.tasks import load_tokenizer

    told = import_dump(
        arguments.dump,
        arguments.trainer,
        arguments.out,
        load_tokenizer(arguments.tokenizer),
        temperature=arguments.temperature,
        reward=arguments.reward,
    )
    skipped = f", {len(told.skipped)} there already" if told.skipped else ""
    print(
        f"imported: {told.rollouts:,} rollouts in {len(told.rounds)} rounds{skipped}, {told.repeats:,} that "
        f"came again left out; {told.columns[0]} in {arguments.out}"
    )
    if len(told.columns) == 2:
        print(f"{told.columns[1]} in {old_store(arguments.out)}; next: opd inspect {arguments.out}")
    else:
        print("one column of log-probs: drift can be read once a second is there, by scoring these rollouts")


def _inspect(arguments: argparse.Namespace, overrides: Overrides, stop: Stop) -> None:
    from opd_jax.study.inspection import as_text, inspect_store
    from opd_jax.tasks import load_tokenizer, newline_table
    from opd_jax.train.combinations import check_choices

    for word in overrides:
        if not word.startswith(("--gate.", "--weights.", "--seed")):
            raise InputError(f"inspect takes settings of gate and weights: got {word}; drop it")
    config = load_config(arguments.config, overrides)
    check_choices(config)
    newline = None
    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
        newline = newline_table(tokenizer, len(tokenizer))
    readings = inspect_store(arguments.store, config, newline=newline, rounds=arguments.round)
    print(as_text(arguments.store, config, readings))
    if arguments.json:
        told = [dataclasses.asdict(reading) for reading in readings]
        write_text(arguments.json, json.dumps(told, indent=1, allow_nan=False) + "\n")


def _lab(arguments: argparse.Namespace, overrides: Overrides, stop: Stop) -> None:
    from opd_jax.lab.make import make  # loads what only this command needs

    make(arguments.out, stop, seed=arguments.root_seed)


COMMANDS: dict[str, Callable[[argparse.Namespace, Overrides, Stop], None]] = {
    "demo": _demo,
    "distill": _distill,
    "sample": _part,
    "score": _part,
    "train": _part,
    "export": _export,
    "evaluate": _evaluate,
    "report": _report,
    "plan": _plan,
    "problems": _problems,
    "import": _import,
    "inspect": _inspect,
    "lab": _lab,
}
