"""Reading settings: a file, overrides on top of it, and refusal of what makes no sense.

draccus reads YAML, TOML, JSON and dotted ``--key value`` pairs into the frozen tree of
`opd_jax.config`; what it refuses is said here in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import draccus

from opd_jax.config import Config, flatten, flatten_tree
from opd_jax.errors import InputError
from opd_jax.files import write_text


@draccus.decode.register(int)
def _whole_number(raw: Any, path: Sequence[str] = ()) -> int:
    """A whole number; ``true`` is none, though Python and YAML would let it pass for 1."""
    if isinstance(raw, bool) or (isinstance(raw, float) and not raw.is_integer()):
        raise draccus.utils.DecodingError(tuple(path), f"Couldn't parse {str(raw)!r} into an int")
    try:
        return int(raw)
    except (TypeError, ValueError):
        raise draccus.utils.DecodingError(tuple(path), f"Couldn't parse {str(raw)!r} into an int") from None


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply overrides, and check the result.

    Args:
      path: YAML, TOML or JSON file; defaults alone without one.
      overrides: dotted command-line pairs, ``["--gate.block", "32"]`` or ``["--gate.block=32"]``.

    Raises:
      InputError: the file cannot be read, a key is unknown (the nearest valid name is given), a value
        is of the wrong type, or the settings contradict each other.
    """
    source = "the command line" if path is None else str(path)
    try:
        if path is not None:
            _check_keys(_read(Path(path)), source)
        named = [word.removeprefix("--").split("=")[0] for word in overrides if word.startswith("--")]
        _check_keys(dict.fromkeys(named), "the command line")
        config = draccus.parse(Config, path, args=list(overrides), exit_on_error=False)
    except InputError:
        raise
    except Exception as error:  # draccus raises its own, argparse's and Python's kinds alike
        reason = " ".join(str(error).split())
        raise InputError(
            f"settings must have the types and choices of opd_jax.config: {reason} ({source}); "
            "correct the value"
        ) from None
    check(config)
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            settings = draccus.cfgparsing.load_config(file, file=path)
    except OSError as error:
        raise InputError(f"a config must be a readable file: {error}; check the path") from None
    except draccus.utils.ParsingError as error:
        reason = " ".join(str(error.__cause__).split())
        raise InputError(
            f"a config must be YAML, TOML or JSON: {path} is not ({reason}); correct it"
        ) from None
    if not isinstance(settings, dict):
        raise InputError(f"a config must set at least one key: {path} sets none; remove or fill it")
    return settings


def _check_keys(settings: Mapping[str, Any], source: str) -> None:
    """Refuse keys that nothing reads, with the nearest valid name."""
    valid = list(flatten(Config()))
    groups = {name.split(".")[0] for name in valid if "." in name}
    for name, value in flatten_tree(settings):
        if name in valid or (name in groups and value is None):
            continue
        raise InputError(
            f"a setting must be one that something reads: {name!r} in {source} is not; {_hint(name, valid)}"
        )


def _hint(name: str, valid: Sequence[str]) -> str:
    by_last = {full.rsplit(".", 1)[-1]: full for full in valid}
    near = difflib.get_close_matches(name, valid, n=1) or [
        by_last[last] for last in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, n=1)
    ]
    return f"the nearest is {near[0]}" if near else "opd_jax/config.py has all of them"


def config_file(name: str) -> Path:
    """A file of ``configs/``, where it lies in a checkout or in an installed package."""
    package = Path(__file__).parent
    installed = package / "configs" / name
    return installed if installed.exists() else package.parent / "configs" / name


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back to an equal tree."""
    write_text(path, draccus.dump(config))


def check(config: Config) -> None:
    """Refuse settings that are out of range or contradict each other."""
    positive = [
        "model.head_chunk",
        "sampling.prompts",
        "sampling.samples",
        "sampling.max_prompt",
        "sampling.max_response",
        "sampling.slots",
        "loss.top_k",
        "gate.block",
        "gate.span_minimum",
        "gate.span_chunk",
        "schedule.rounds",
        "schedule.passes",
        "schedule.minibatches",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "evaluation.samples",
        "sampling.temperature",
        "evaluation.temperature",
        "optimizer.learning_rate",
        "optimizer.clip_norm",
    ]
    values = flatten(config)
    for name in positive:
        if not values[name] > 0:
            raise InputError(f"{name} must be above 0: got {values[name]}; raise it")
    for name in ("sampling.top_p", "evaluation.top_p"):
        if not 0 < values[name] <= 1:
            raise InputError(f"{name} must lie in (0, 1]: got {values[name]}; 1 keeps every token")
    for name in ("gate.tau", "gate.eps", "schedule.staleness", "log.rows", "seed", "evaluation.seed"):
        if values[name] < 0:
            raise InputError(f"{name} must not be negative: got {values[name]}; use 0 or more")
    if config.gate.span_maximum < config.gate.span_minimum:
        raise InputError(
            f"gate.span_maximum must be at least gate.span_minimum: got {config.gate.span_maximum} "
            f"and {config.gate.span_minimum}; raise the one or lower the other"
        )
    rollouts = config.sampling.prompts * config.sampling.samples
    if rollouts % config.schedule.minibatches:
        raise InputError(
            f"a round's rollouts must split evenly into minibatches: {config.sampling.prompts} prompts "
            f"x {config.sampling.samples} samples = {rollouts} do not divide by "
            f"{config.schedule.minibatches}; set schedule.minibatches to a divisor of {rollouts}"
        )
    rows, ways = rollouts // config.schedule.minibatches, config.mesh.data * config.mesh.fsdp
    for name, count in (("a minibatch", rows), ("sampling.slots", config.sampling.slots)):
        if count % ways:
            raise InputError(
                f"rows must split evenly over the mesh: {name} has {count}, mesh.data x mesh.fsdp is "
                f"{ways}; use a multiple of {ways}"
            )
