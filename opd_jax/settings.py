"""Reading settings: a file, overrides on top of it, and refusal of what makes no sense.

draccus reads YAML, TOML, JSON and dotted ``--key value`` pairs into the frozen tree of
`opd_jax.config`; what it refuses is said here in one line.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import draccus
import yaml

from opd_jax.config import Config, flatten, flatten_tree
from opd_jax.consistency import check
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


@draccus.decode.register(float)
def _number(raw: Any, path: Sequence[str] = ()) -> float:
    """A number; ``true`` is none here either."""
    try:
        if not isinstance(raw, bool):
            return float(raw)
    except (TypeError, ValueError):
        pass
    raise draccus.utils.DecodingError(tuple(path), f"Couldn't parse {str(raw)!r} into a float")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply overrides, and check the result.

    Args:
      path: YAML, TOML or JSON file; defaults alone without one.
      overrides: dotted command-line pairs, ``["--gate.block", "32"]`` or ``["--gate.block=32"]``.

    Raises:
      InputError: the file cannot be read, a key is unknown (the nearest valid name is given), a value
        is of the wrong type, or the settings contradict each other.
    """
    named = [word.removeprefix("--").split("=")[0] for word in overrides if word.startswith("--")]
    if path is not None:
        settings = _read(Path(path))
        _check_keys(settings, str(path))
        _check_lists(dict(flatten_tree(settings)), str(path))
        config = _parse(path, (), str(path))
    _check_keys(dict.fromkeys(named), "the command line")
    if overrides or path is None:
        _check_lists(dict(flatten_tree(_values(overrides))), "the command line")
        config = _parse(path, overrides, "the command line")
    _check_given(config)
    check(config)
    return config


def _parse(path: str | Path | None, overrides: Sequence[str], source: str) -> Config:
    try:
        return draccus.parse(Config, path, args=list(overrides), exit_on_error=False)
    except Exception as error:  # draccus raises its own, argparse's and Python's kinds alike
        reason = " ".join(str(error).split())
        raise InputError(
            f"settings must have the types and choices of opd_jax.config: {reason} ({source}); "
            "correct the value"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            settings = draccus.cfgparsing.load_config(file, file=path)
        if path.suffix != ".toml":  # which refuses it itself; JSON reads as YAML does
            _check_once(yaml.compose(path.read_text(encoding="utf-8")), path)
    except OSError as error:
        raise InputError(f"a config must be a readable file: {error}; check the path") from None
    except draccus.utils.ParsingError as error:
        reason = " ".join(str(error.__cause__).split())
        raise InputError(
            f"a config must be YAML, TOML or JSON: {path} is not ({reason}); correct it"
        ) from None
    if not isinstance(settings, dict):
        raise InputError(
            f"a config must be settings by name: {path} holds {type(settings).__name__}; remove or fill it"
        )
    return settings


def _check_once(node: yaml.Node | None, path: Path) -> None:
    """Refuse a key that is set twice: YAML would take the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    keys = [key.value for key, _ in node.value]
    for key, value in node.value:
        if keys.count(key.value) > 1:
            raise InputError(
                f"a setting is set once: {key.value!r} comes twice in a group of {path}, in line "
                f"{key.start_mark.line + 1}; drop one"
            )
        _check_once(value, path)


def _hints(of: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The declared type of every setting, by its dotted name."""
    for name, hint in typing.get_type_hints(of).items():
        if dataclasses.is_dataclass(hint):
            yield from _hints(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _kinds(hint: Any) -> set[Any]:
    """What a declared type may be: the origins of its parts."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return {typing.get_origin(part) or part for part in parts}


def _values(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted command-line pairs as YAML values by name."""
    values: dict[str, Any] = {}
    words = iter(overrides)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        text = value if equals else next(words, "")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[name] = text
    return values


def _check_lists(values: Mapping[str, Any], source: str) -> None:
    """Refuse one value where several are declared: letters of a word would pass for a list."""
    for name, hint in _hints():
        allowed = {list} | (_kinds(hint) & {types.NoneType})
        if name in values and tuple in _kinds(hint) and type(values[name]) not in allowed:
            nothing = values[name] in (None, "None")
            raise InputError(
                f"a list is written in brackets: {name} is {values[name]!r} in {source}; "
                + ("write [], or drop it" if nothing else f"write [{values[name]}]")
            )


def _check_given(config: Config) -> None:
    """Refuse null where a value is declared."""
    values = flatten(config)
    for name, hint in _hints():
        if values[name] is None and types.NoneType not in _kinds(hint):
            raise InputError(f"a setting must have a value: {name} is null; give one, or drop it")


def _check_keys(settings: Mapping[str, Any], source: str) -> None:
    """Refuse keys that nothing reads, with the nearest valid name."""
    valid = list(flatten(Config()))
    groups = {name.split(".")[0] for name in valid if "." in name}
    for name, value in flatten_tree(settings):
        if "." in name and name in settings and not source.startswith("the command line"):
            raise InputError(
                f"a file nests its settings: {name!r} in {source} is dotted; write it as a group"
            )
        if name in valid or (name in groups and value is None):
            continue
        if name in groups and source != "the command line":
            raise InputError(
                f"a group holds settings by name: {name!r} is {value!r} in {source}; nest them under it"
            )
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
