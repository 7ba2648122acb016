"""What a config names, by a path or as ``module:function``: models and problems."""

from __future__ import annotations

from pathlib import Path

from opd_jax.errors import InputError
from opd_jax.named import call_named, is_named
from opd_jax.tasks import Problem, read_problems
from opd_jax.tasks.problems import check_problems


def model_folder(source: str, name: str) -> Path:
    """A model folder; ``name`` is the setting that names it."""
    if not source:
        raise InputError(f"{name} must be set: it is empty; name a folder in Hugging Face format")
    folder = Path(call_named(source, (str, Path)) if is_named(source) else source)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{name} must be a model folder in Hugging Face format: {folder} has no config.json; "
            "check the path, or download the checkpoint first"
        )
    return folder


def named_problems(source: str, name: str) -> list[Problem]:
    """Problems of a file, or those that a function gives."""
    if not source:
        raise InputError(f"{name} must be set: it is empty; name a file of problems")
    if not is_named(source):
        return read_problems(source)
    problems = call_named(source, list)
    check_problems(problems, source)
    return problems
