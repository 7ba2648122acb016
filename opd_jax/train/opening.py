"""Opening a run folder: to make one, to go on with one, and to be the only one who does."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from opd_jax.config import Config, flatten
from opd_jax.errors import InputError
from opd_jax.files import locked, read_text, write_text
from opd_jax.processes import first_alone
from opd_jax.settings import load_config, save_config
from opd_jax.tasks import check_template, prompt_ids
from opd_jax.train.combinations import check_choices
from opd_jax.train.engines import check_ids
from opd_jax.train.metrics import drop_lines_from, mend_lines
from opd_jax.train.run import Run

# Settings that may change between two sittings of a run: where it is computed and sampled, how it is judged,
# what is logged, how long it goes on, and whose rollouts it takes.
FREE = (
    "mesh.",
    "evaluation.",
    "log.",
    "schedule.rounds",
    "store.accept",
    *(f"engine.{name}" for name in ("urls", "model", "teacher_urls", "teacher_model")),
    *(f"engine.{name}" for name in ("concurrency", "timeout", "attempts", "tolerance")),
)


def open_run(folder: str | Path, config: Config | None = None) -> Run:
    """Open a run folder, or make one.

    Args:
      folder: the run.
      config: needed for a new run; for an old one it must equal the config saved there but for what is
        in `FREE`, which replaces what was saved.

    Raises:
      InputError: a new run has no config or cannot begin; an old one has another config, or its
        models or problems have changed.
    """
    folder = Path(folder)
    file = folder / "config.yaml"
    if config is not None:
        check_choices(config)
    # Asked once for all: by the time a slow process asked, the first would have made it.
    if not first_alone(file.exists):
        return _new_run(folder, file, config)
    saved = load_config(file)
    if config is not None and config != saved:
        here, there = flatten(config), flatten(saved)
        for name in here:
            # Servers do not tell all that a teacher here does, and the scores of a round are all of one kind.
            other = name == "engine.teacher_urls" and bool(here[name]) != bool(there[name])
            if here[name] != there[name] and (other or not name.startswith(FREE)):
                raise InputError(
                    f"a run keeps the config it began with: {folder} has {name} = {there[name]!r}, not "
                    f"{here[name]!r}; drop the override, or name a new folder"
                )
    run = Run(folder, config or saved)
    began_with = _identity(folder / "identity.json")
    for name, digest in run.identity.items():
        if began_with.get(name) != digest:
            raise InputError(
                f"a run goes on with what it began with: the {name} of {folder} has changed since; restore "
                "it, or name a new folder"
            )
    return run


def _identity(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(read_text(file)))
    except (ValueError, TypeError):
        raise InputError(f"what a run began with must be a JSON object: {file} is not; restore it") from None


def _new_run(folder: Path, file: Path, config: Config | None) -> Run:
    if config is None:
        raise InputError(
            f"a new run needs a config: {folder} has no config.yaml; add --config configs/lab.yaml"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"a run is a folder: {folder} is a file; name another")
    run = Run(folder, config)
    _ = run._table
    # All that a run needs is read before its folder is made: one that cannot begin leaves nothing.
    if config.engine.teacher_urls:  # which hold it; here is no room for it
        _ = run.teacher_model
    else:
        _ = run.teacher
        if config.model.residency == "sequential":
            del run.teacher
    _ = run.base
    vocabulary = min(run.usable, run.model.vocab_size, run.teacher_model.vocab_size)
    for name in ("top_k", "student_k"):
        if getattr(config.loss, name) > vocabulary:
            raise InputError(
                f"loss.{name} cannot exceed the vocabulary: got {getattr(config.loss, name)}, there are "
                f"{vocabulary} ids; lower it"
            )
    check_ids(run)
    if config.store.at:
        _ = run.rollouts, run.scored
    check_template(run.tokenizer, config.problems)
    for problem in (*run.problems, *run.heldout):
        length = len(prompt_ids(run.tokenizer, problem.prompt, config.problems))
        if not 1 <= length <= config.sampling.max_prompt:
            raise InputError(
                f"a prompt must have 1 to {config.sampling.max_prompt} tokens: problem {problem.id!r} has "
                f"{length}; drop it" + (", or raise sampling.max_prompt" if length else "")
            )
    identity = json.dumps(run.identity, indent=1) + "\n"

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "identity.json", identity)
        save_config(config, file)

    first_alone(make)
    return run


@contextlib.contextmanager
def exclusive(run: Run) -> Iterator[None]:
    """Be the one process that changes a run, and begin from what is on disk.

    What was written after the newest saved state is forgotten, so that going on writes it again.

    Raises:
      InputError: another process is at it.
    """
    with contextlib.ExitStack() as stack:
        # The first of the processes of one run keeps other runs out.
        in_use = f"one process at a time works on a run: {run.folder} is in use; wait, or name a new folder"
        first_alone(lambda: stack.enter_context(locked(run.folder / ".lock", in_use)))
        # Whatever was read before the lock was ours may have moved on since.
        if "checkpoints" in vars(run):
            run.checkpoints.close()
        for name in ("checkpoints", "state"):
            vars(run).pop(name, None)
        run.writing = True
        try:
            update = int(run.state.update)

            def mend() -> None:
                save_config(run.config, run.folder / "config.yaml")
                drop_lines_from(run.metrics_file, update)
                mend_lines(run.timings_file)

            first_alone(mend)
            yield
        finally:
            run.writing = False
            if "checkpoints" in vars(run):  # whose threads would outlive what they were made for
                vars(run).pop("checkpoints").close()
