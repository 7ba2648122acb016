"""Hugging Face folders in: ``config.json`` and ``*.safetensors``, streamed into device shards.

Names, shapes and dtypes of all tensors are checked from the files' headers before any weight is read.
Then each process reads the slices that its own shards need, one shard at a time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, Sharding
from safetensors import SafetensorError, safe_open

from opd_jax.errors import InputError
from opd_jax.files import restore_folder
from opd_jax.model.config import Qwen3Config
from opd_jax.model.config_json import config_from_json
from opd_jax.model.hf import hf_shape, hf_tensors
from opd_jax.model.parameters import Parameter, parameter_table
from opd_jax.model.sharding import RULES, Rules, param_shardings
from opd_jax.processes import first_alone
from opd_jax.types import Params

INDEX = "model.safetensors.index.json"
DTYPES = ("BF16", "F16", "F32", "F64")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
READ_BYTES = 2**26  # of one tensor at a time

Span = tuple[range, ...]  # what of every dimension a shard holds
Stored = Mapping[str, Any]  # tensors by name, unread; `tensor[rows, columns]` reads


def load_pretrained(
    path: str | Path, *, mesh: Mesh | None = None, rules: Rules = RULES, dtype: Any = jnp.float32
) -> tuple[Qwen3Config, Params]:
    """Read a Qwen3 checkpoint folder.

    Host memory holds one shard of one stacked parameter at a time, beyond what the devices hold.

    Args:
      path: folder with ``config.json`` and one or more ``*.safetensors``; where an index lies beside
        them, only the files that it names are read.
      mesh: where to place the parameters; one device by default.
      rules: how they lie on it, `sharding.RULES` or `sharding.SPREAD`.
      dtype: of the parameters.

    Returns:
      The configuration and the nested dict of parameters.

    Raises:
      InputError: the folder is missing, its tensors are not those of its configuration, or ``dtype`` is
        none of floats.
    """
    folder, asked = Path(path), _float_dtype(dtype)
    restore_folder(folder)
    if not folder.is_dir():
        raise InputError(
            f"a model must be a folder in Hugging Face format: {folder} is not there; "
            "check the path, or download the checkpoint first"
        )
    config = config_from_json(folder / "config.json")
    table = parameter_table(config)
    shardings = traverse_util.flatten_dict(param_shardings(config, mesh, rules)) if mesh else {}
    with contextlib.ExitStack() as stack:
        stored = _open(folder, stack)
        check_tensors(stored, table, folder, extra=_tied_head(config))
        if config.tie_word_embeddings and HEAD in stored:
            first_alone(functools.partial(_check_tied_head, stored, folder))
        # The largest come first, while memory is still empty around their copy on the host.
        largest_first = sorted(table, key=lambda name: math.prod(table[name].shape), reverse=True)
        flat = {
            name: load_parameter(table[name], stored, shardings.get(name), asked) for name in largest_first
        }
    return config, traverse_util.unflatten_dict({name: flat[name] for name in table})


def _float_dtype(dtype: Any) -> np.dtype:
    with contextlib.suppress(TypeError):
        if jnp.issubdtype(found := jnp.dtype(dtype), jnp.floating):
            return found
    raise InputError(f"parameters must be floats: got the dtype {dtype!r}; use float32 or bfloat16")


def check_folder(path: str | Path) -> None:
    """Check that a folder holds all tensors of its configuration; no weight is read.

    Raises:
      InputError: it does not; the message names what is wrong.
    """
    folder = Path(path)
    config = config_from_json(folder / "config.json")
    with contextlib.ExitStack() as stack:
        check_tensors(_open(folder, stack), parameter_table(config), folder, extra=_tied_head(config))


def _open(folder: Path, stack: contextlib.ExitStack) -> Stored:
    """The tensors of a folder by name, none of them read yet."""
    index = folder / INDEX
    listed = _read_index(index) if index.exists() else None
    stored: dict[str, Any] = {}
    where: dict[str, str] = {}
    for file in _file_names(folder, listed):
        try:
            reader = stack.enter_context(safe_open(folder / file, framework="numpy"))
        except FileNotFoundError:
            raise InputError(
                f"the files that an index names must be there: {file} of {index} is not; restore it"
            ) from None
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"weights must be whole safetensors files: {folder / file} is not ({error}); restore it"
            ) from None
        for name in reader.keys():  # noqa: SIM118 (a safetensors reader is no mapping)
            if name in where:
                raise InputError(
                    f"a tensor must be stored once: {name} is in two files of {folder}, {where[name]} and "
                    f"{file}; remove the stale one"
                )
            where[name] = file
            stored[name] = reader.get_slice(name)
    if listed is not None:
        _check_index(index, listed, where)
    return stored


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, in the order of their names: those of its index, where it has one.

    Raises:
      InputError: it has none, or its index is damaged.
    """
    index = folder / INDEX
    listed = _read_index(index) if index.exists() else None
    return [folder / name for name in _file_names(folder, listed)]


def _file_names(folder: Path, listed: Mapping[str, str] | None) -> list[str]:
    if listed is not None:
        return sorted(set(listed.values()))
    names = sorted(file.name for file in folder.glob("*.safetensors") if file.is_file())
    if not names:
        raise InputError(f"a model folder must hold *.safetensors: {folder} has none; restore them")
    return names


def _read_index(path: Path) -> dict[str, str]:
    """The file of every tensor, by an index."""
    try:
        listed = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        if not listed or not all(file == Path(file).name for file in listed.values()):
            raise ValueError("it must name a file of its own folder for every tensor")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"an index must be whole JSON: {path} is not ({error}); restore it") from None
    return listed


def _check_index(path: Path, listed: Mapping[str, str], where: Mapping[str, str]) -> None:
    """Refuse an index that says something else than the files do."""
    for name in sorted(listed.keys() | where.keys()):
        if listed.get(name) != where.get(name):
            said, found = listed.get(name, "no file"), where.get(name, "no file")
            raise InputError(
                f"an index must say where tensors are: {path} has {name} in {said}, it is in {found}; "
                "use index and weights of one model"
            )


def _tied_head(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """The head that some published tied checkpoints store although it is the embedding, with its shape."""
    return {HEAD: (config.vocab_size, config.hidden_size)} if config.tie_word_embeddings else {}


def _check_tied_head(stored: Stored, folder: Path) -> None:
    """Refuse a tied model that stores a head of its own, which other readers of the format would use."""
    head, embedding = stored[HEAD], stored[EMBEDDING]
    rows, width = head.get_shape()
    # As float64 is the widest, two pieces of this many rows keep within READ_BYTES.
    for part, _ in _cut([(slice(0, rows), slice(0, rows))], max(1, READ_BYTES // (2 * 8 * width))):
        if not np.array_equal(head[part], embedding[part]):
            raise InputError(
                f"the head of a tied model must be its embedding: {HEAD} of {folder} differs from "
                f"{EMBEDDING}; set tie_word_embeddings to false in config.json, or remove the stored head"
            )


def check_tensors(
    stored: Stored,
    table: Mapping[tuple[str, ...], Parameter],
    folder: Path,
    extra: Mapping[str, tuple[int, ...]],
) -> None:
    """Check dtypes, names and shapes of all tensors by their headers; those of ``extra`` may be missing.

    Raises:
      InputError: one is quantised, missing, unknown or misshapen; the message names it.
    """
    for name, tensor in stored.items():
        if tensor.get_dtype() not in DTYPES:
            raise InputError(
                f"weights must be stored as one of {', '.join(DTYPES)}: {name} of {folder} is "
                f"{tensor.get_dtype()}; use the checkpoint that is not quantised"
            )
    expected = {
        name: hf_shape(parameter) for parameter in table.values() for _, name in hf_tensors(parameter)
    }
    for wrong, found in (
        ("missing", sorted(expected.keys() - stored.keys())),
        ("unknown", sorted(stored.keys() - expected.keys() - extra.keys())),
    ):
        if found:
            raise InputError(
                f"tensors must be those that config.json describes: {folder} has {len(found)} "
                f"{wrong}, first {found[0]}; use weights and config.json of one model"
            )
    for name, shape in {**extra, **expected}.items():
        if name in stored and tuple(stored[name].get_shape()) != shape:
            raise InputError(
                f"tensors must have the shapes that config.json describes: {name} of {folder} is "
                f"{tuple(stored[name].get_shape())}, not {shape}; use weights and config.json of one model"
            )


def load_parameter(
    parameter: Parameter, stored: Stored, sharding: Sharding | None, dtype: np.dtype
) -> jax.Array:
    """One parameter on its devices, those of this process; on the default device without a sharding.

    A shard that several devices hold is read once. `jax.make_array_from_callback` would read it for
    each, and hold all shards of the process before it places the first.
    """
    shape = parameter.shape
    holders: dict[Span, list[jax.Device | None]] = {}
    if sharding is None:
        holders[tuple(range(size) for size in shape)] = [None]
    else:
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            span = tuple(range(*part.indices(size)) for part, size in zip(index or (), shape, strict=True))
            holders.setdefault(span, []).append(device)
    shards: list[jax.Array] = []
    for span, devices in holders.items():
        value = read_shard(parameter, stored, span, dtype)
        # Waited for, so that the host's copy is gone before the next is made; JAX lets go of what it has
        # copied when garbage is collected.
        shards += jax.block_until_ready([jax.device_put(value, device) for device in devices])
        del value
        gc.collect(0)
    if sharding is None:
        return shards[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def read_shard(parameter: Parameter, stored: Stored, span: Span, dtype: np.dtype) -> np.ndarray:
    """A part of a parameter, read from those slices of its tensors that it is made of."""
    shard = np.empty([len(part) for part in span], dtype)
    stacks, inputs = parameter.stacks, parameter.inputs
    sizes, inner = parameter.shape[stacks:], span[stacks:]
    if inputs:  # a matrix: the outputs make its rows, the inputs its columns
        runs = [_runs(sizes[inputs:], inner[inputs:]), _runs(sizes[:inputs], inner[:inputs])]
    else:
        runs = [_runs([size], [part]) for size, part in zip(sizes, inner, strict=True)]
    width = math.prod(sum(run.stop - run.start for run, _ in column) for column in runs[1:])
    runs[0] = list(_cut(runs[0], max(1, READ_BYTES // (8 * width))))

    names = dict(hf_tensors(parameter))
    for place in np.ndindex(*shard.shape[:stacks]):
        tensor = stored[names[tuple(part[i] for part, i in zip(span, place, strict=False))]]
        target = shard[place]
        if inputs:
            target = target.reshape(math.prod(target.shape[:inputs]), -1).T
        for blocks in itertools.product(*runs):
            target[tuple(to for _, to in blocks)] = tensor[tuple(source for source, _ in blocks)]
    return shard


def _runs(sizes: Sequence[int], span: Sequence[range]) -> list[tuple[slice, slice]]:
    """A part of several dimensions as runs of the one that they are flattened to: from where, to where."""
    flat = np.arange(math.prod(sizes)).reshape(sizes)[np.ix_(*span)].reshape(-1)
    borders = [0, *(np.flatnonzero(np.diff(flat) != 1) + 1).tolist(), len(flat)]
    return [
        (slice(int(flat[start]), int(flat[stop - 1]) + 1), slice(start, stop))
        for start, stop in itertools.pairwise(borders)
    ]


def _cut(runs: Sequence[tuple[slice, slice]], most: int) -> Iterator[tuple[slice, slice]]:
    """The same runs in pieces of at most ``most``."""
    for source, to in runs:
        for start in range(0, to.stop - to.start, most):
            stop = min(start + most, to.stop - to.start)
            yield (
                slice(source.start + start, source.start + stop),
                slice(to.start + start, to.start + stop),
            )
