"""Hugging Face folders in and out: ``config.json`` beside ``*.safetensors``.

Import and export are a bijection derived from the parameter table; unknown, missing, duplicate and
misshapen tensors are refused by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opd_jax.errors import InputError
from opd_jax.files import replacing, write_text
from opd_jax.model.config import Qwen3Config
from opd_jax.model.config_json import config_from_json, config_to_json
from opd_jax.model.parameters import Parameter, parameter_table
from opd_jax.model.sharding import param_shardings
from opd_jax.types import Params


def _to_hf(value: np.ndarray, inputs: int) -> np.ndarray:
    """One layer's weight as Hugging Face stores it: a vector, or a matrix with outputs first."""
    if not inputs:
        return value
    order = (*range(inputs, value.ndim), *range(inputs))
    columns = int(np.prod(value.shape[:inputs]))
    return np.ascontiguousarray(value.transpose(order).reshape(-1, columns))


def _from_hf(value: np.ndarray, shape: tuple[int, ...], inputs: int) -> np.ndarray:
    """The inverse of `_to_hf` for a weight of the given shape."""
    if not inputs:
        return value
    outputs_first = value.reshape(*shape[inputs:], *shape[:inputs])
    split = len(shape) - inputs
    return outputs_first.transpose(*range(split, len(shape)), *range(split))


def _hf_shape(parameter: Parameter) -> tuple[int, ...]:
    shape = parameter.shape[parameter.stacks :]
    if not parameter.inputs:
        return shape
    return int(np.prod(shape[parameter.inputs :])), int(np.prod(shape[: parameter.inputs]))


def _names(parameter: Parameter) -> Iterator[str]:
    """The checkpoint names of a parameter: one, or one per layer."""
    for index in np.ndindex(parameter.shape[: parameter.stacks]):
        yield parameter.name.format(**dict(zip(("layer", "expert"), index, strict=False)))


def load_pretrained(
    path: str | Path, *, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> tuple[Qwen3Config, Params]:
    """Read a Qwen3 checkpoint folder.

    Args:
      path: folder with ``config.json`` and one or more ``*.safetensors``.
      mesh: where to place the parameters, by `sharding.RULES`; one device by default.
      dtype: of the parameters.

    Returns:
      The configuration and the nested dict of parameters.

    Raises:
      InputError: the folder is missing, or its tensors are not those of its configuration.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            f"a model must be a folder in Hugging Face format: {folder} is not there; "
            "check the path, or download the checkpoint first"
        )
    config = config_from_json(folder / "config.json")
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.is_file()]
    if not files:
        raise InputError(f"a model folder must hold *.safetensors: {folder} has none; restore them")
    table = parameter_table(config)
    shardings = traverse_util.flatten_dict(param_shardings(config, mesh)) if mesh else None

    with contextlib.ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in files:
            try:
                reader = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"weights must be whole safetensors files: {file} is not ({error}); restore it"
                ) from None
            for name in reader.keys():  # noqa: SIM118 (a safetensors reader is no mapping)
                if name in where:
                    raise InputError(
                        f"a tensor must be stored once: {name} is in two files of {folder}; "
                        "remove the stale file"
                    )
                where[name] = reader
        _check_names(where, config, table, folder)

        flat = {}
        for tree_path, parameter in table.items():
            shape = parameter.shape[parameter.stacks :]
            layers = [
                _from_hf(_tensor(where[name], name, parameter, folder), shape, parameter.inputs)
                for name in _names(parameter)
            ]
            value = np.stack(layers).reshape(parameter.shape)
            value = np.asarray(value, dtype)
            place = shardings[tree_path] if shardings else None
            flat[tree_path] = jax.device_put(value, place)
    return config, traverse_util.unflatten_dict(flat)


def _check_names(
    where: dict[str, Any], config: Qwen3Config, table: dict[tuple, Parameter], folder: Path
) -> None:
    expected = {name for parameter in table.values() for name in _names(parameter)}
    if config.tie_word_embeddings:
        # Some published tied checkpoints store the head anyway; the embedding is what counts.
        where.pop("lm_head.weight", None)
    for wrong, found in (
        ("missing", sorted(expected - where.keys())),
        ("unknown", sorted(where.keys() - expected)),
    ):
        if found:
            raise InputError(
                f"tensors must be those that config.json describes: {folder} has {len(found)} "
                f"{wrong}, first {found[0]}; use weights and config.json of one model"
            )


def _tensor(reader: Any, name: str, parameter: Parameter, folder: Path) -> np.ndarray:
    value = reader.get_tensor(name)
    if value.shape != _hf_shape(parameter):
        raise InputError(
            f"tensors must have the shapes that config.json describes: {name} of {folder} is "
            f"{value.shape}, not {_hf_shape(parameter)}; use weights and config.json of one model"
        )
    return value


def save_pretrained(path: str | Path, config: Qwen3Config, params: Params) -> None:
    """Write a folder that transformers, vLLM and `load_pretrained` read.

    Each file is written under another name and moved into place whole. A tokenizer is not part of
    the parameters; `opd_jax.tasks.copy_tokenizer` puts it beside them.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(params)
    tensors = {}
    for tree_path, parameter in parameter_table(config).items():
        value = np.asarray(jax.device_get(flat[tree_path]))
        layers = value.reshape(-1, *value.shape[parameter.stacks :])
        for name, layer in zip(_names(parameter), layers, strict=True):
            tensors[name] = _to_hf(layer, parameter.inputs)
    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_text(folder / "config.json", config_to_json(config, str(value.dtype)))
