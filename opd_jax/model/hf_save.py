"""Hugging Face folders out: full weights, the folder replaced whole.

Parameters leave the devices layer by layer and go straight to disk, so that host memory never holds
the model.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from opd_jax.errors import InputError
from opd_jax.files import replacing_folder
from opd_jax.model.config import Qwen3Config
from opd_jax.model.config_json import config_to_json
from opd_jax.model.hf import hf_shape, hf_tensors, to_hf
from opd_jax.model.hf_load import INDEX
from opd_jax.model.parameters import Parameter, parameter_table
from opd_jax.processes import first_alone, is_first
from opd_jax.types import Params

# Files of an export, which the next one does not leave behind.
OURS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", ".*.part")
SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}

Table = Mapping[tuple[str, ...], Parameter]
Arrays = Mapping[tuple[str, ...], Any]  # by the paths of a table


@runtime_checkable
class InTurn(Protocol):
    """A stack whose layers are made one by one as they are written; with shape and dtype, as an array has."""

    def layer(self, index: int) -> jax.Array: ...


class Tensor(NamedTuple):
    """A checkpoint tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return jnp.dtype(self.dtype).itemsize * math.prod(self.shape)


def save_pretrained(
    path: str | Path,
    config: Qwen3Config,
    params: Params,
    *,
    shard_bytes: int = 5 * 10**9,
    beside: Iterable[Path] = (),
    stop_ids: Sequence[int] = (),
) -> None:
    """Write a folder that transformers, vLLM and `load_pretrained` read.

    The folder is replaced whole (`opd_jax.files.replacing_folder`): weights, index and config.json of an
    earlier export go, files of another kind, such as a tokenizer's, stay. Every process calls it, and
    the first writes.

    Args:
      path: the folder; it may be there.
      config: dimensions.
      params: parameters, written in their own dtype.
      shard_bytes: weights above it are split into files of at most so many bytes, with an index.
      beside: files to copy into the folder, such as a tokenizer's; those that are not there are passed
        by. A ``generation_config.json`` among them stands for the one written otherwise.
      stop_ids: that end a response, for the one written otherwise; by default the end-of-text token alone.

    Raises:
      InputError: ``params`` are not those of ``config``, or the folder cannot be replaced.
    """
    folder, table = Path(path), parameter_table(config)
    flat = traverse_util.flatten_dict(params)
    _check(table, flat, folder)
    values = host_tensors(table, flat)
    widest = jnp.result_type(*(flat[name].dtype for name in table))  # which loses nothing of any

    def write() -> None:
        with contextlib.ExitStack() as stack:
            if jax.process_count() > 1:  # what one fails to write, the others gather all the same
                stack.callback(_exhaust, values)
            new = stack.enter_context(replacing_folder(folder, OURS))
            for file in beside:
                if file.is_file():
                    shutil.copyfile(file, new / file.name)
            (new / "config.json").write_text(config_to_json(config, str(widest)))
            if not (new / "generation_config.json").exists():
                ends = list(stop_ids) or [config.eos_token_id]
                said = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
                generation = json.dumps(said, indent=2) + "\n"
                (new / "generation_config.json").write_text(generation)
            _write(new, _split(table, flat, shard_bytes), values)

    if not is_first():
        _exhaust(values)
    first_alone(write)


def _exhaust(values: Iterator[np.ndarray]) -> None:
    for _ in values:
        pass


def _check(table: Table, flat: Arrays, folder: Path) -> None:
    for wrong, found in (("lack", table.keys() - flat.keys()), ("have", flat.keys() - table.keys())):
        if found:
            raise InputError(
                f"an export takes the parameters that its config describes: those for {folder} {wrong} "
                f"{'.'.join(min(found))}; give parameters and config of one model, and merge an adapter first"
            )
    for name, parameter in table.items():
        if flat[name].shape != parameter.shape or str(flat[name].dtype) not in SAFETENSORS_DTYPES:
            raise InputError(
                f"an export takes the parameters that its config describes: {'.'.join(name)} for {folder} "
                f"is {flat[name].dtype}{list(flat[name].shape)}, not {list(parameter.shape)} of floats; "
                "give parameters and config of one model"
            )


def _tensors(table: Table, flat: Arrays) -> Iterator[Tensor]:
    for path, parameter in table.items():
        for _, name in hf_tensors(parameter):
            yield Tensor(name, str(flat[path].dtype), hf_shape(parameter))


def host_tensors(table: Table, flat: Arrays) -> Iterator[np.ndarray]:
    """The checkpoint tensors of parameters, in the order of their names, on the host.

    One layer is gathered at a time, by all processes together where the devices are those of several.
    """
    for path, parameter in table.items():
        for layer in range(parameter.shape[0]) if parameter.stacks else [None]:
            value = _on_host(flat[path], layer)
            for place in np.ndindex(*parameter.shape[1 : parameter.stacks]):
                yield to_hf(value[place], parameter.inputs)


def _on_host(value: Any, layer: int | None) -> np.ndarray:
    """One layer of a stack, or the whole of what is none."""
    if layer is not None and isinstance(value, InTurn):
        part = value.layer(layer)
    elif not isinstance(value, jax.Array):
        return np.asarray(value if layer is None else value[layer])
    # A new array each time, because a jax.Array keeps its copy on the host for as long as it lives.
    elif layer is None:
        part = jnp.copy(value)
    else:
        part = jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
    if part.is_fully_addressable:
        return np.asarray(part)
    return multihost_utils.process_allgather(part, tiled=True)


def _split(table: Table, flat: Arrays, shard_bytes: int) -> dict[str, list[Tensor]]:
    """Which tensors go to which file, in their order."""
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in _tensors(table, flat):
        if files[-1] and size + tensor.bytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, start=1)}


def _write(folder: Path, files: Mapping[str, list[Tensor]], values: Iterator[np.ndarray]) -> None:
    for name, tensors in files.items():
        write_safetensors(folder / name, tensors, values)
    if len(files) > 1:
        total = sum(tensor.bytes for tensors in files.values() for tensor in tensors)
        weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_safetensors(path: Path, tensors: Iterable[Tensor], values: Iterator[np.ndarray]) -> None:
    """Write one safetensors file, taking from ``values`` an array for each tensor.

    The library's own writer wants all of a file in memory. The format: the length of a JSON header as
    eight bytes, the header with dtype, shape and place of every tensor, then their bytes end to end.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers insists on
    tensors, end = list(tensors), 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins on a multiple of eight
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in tensors:
            file.write(next(values).reshape(-1).view(np.uint8).data)
