"""Digests: which model, which policy, which problems."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from opd_jax.files import sha256
from opd_jax.model import weight_files
from opd_jax.processes import first_alone
from opd_jax.tasks import Problem
from opd_jax.train.metrics import append_line, mend_lines, read_lines
from opd_jax.types import Params


def model_digest(folder: Path) -> str:
    """SHA-256 over a model's config and weights: which student, which teacher.

    Of many processes the first reads them for all.
    """

    def digest() -> str:
        files = [folder / "config.json", *weight_files(folder)]
        return hashlib.sha256("".join(map(_digest_of, files)).encode()).hexdigest()

    return first_alone(digest)


def _digest_of(file: Path) -> str:
    now = file.stat()
    return _read_once(file.resolve(), now.st_size, now.st_mtime_ns)


@functools.cache  # a command may open a run twice, and weights are large
def _read_once(file: Path, size: int, modified: int) -> str:
    return sha256(file)


def params_digest(params: Params) -> str:
    """A digest of parameters on their devices: which policy, between which two updates.

    Every array is reduced to eight bytes where it lies, with whole numbers, whose sums come out the same
    however the array is split; any changed bit changes them.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(traverse_util.flatten_dict(params).items()):
        sums = np.asarray(_sums(leaf))
        digest.update(f"{'.'.join(name)} {leaf.shape} {leaf.dtype} {sums.tolist()};".encode())
    return digest.hexdigest()


def note_policy(file: Path, made_by: Mapping[str, Any]) -> None:
    """Put down, once, which ``policy`` a run had at which ``update``."""
    mend_lines(file)
    if made_by not in read_lines(file):
        append_line(file, dict(made_by))


def had_policy(file: Path, told: Mapping[str, Any]) -> bool:
    """Whether a run had the policy that a round was drawn by, at that update."""
    return {"policy": told["policy"], "update": told["update"]} in read_lines(file)


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """Two sums of an array's bits, each weighted by odd numbers that depend on the place."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16)
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = [(place * jnp.uint32(factor) + jnp.uint32(factor)) | 1 for factor in (0x9E3779B1, 0x85EBCA77)]
    return jnp.stack([jnp.sum((bits ^ (bits >> 15)) * weight, dtype=jnp.uint32) for weight in mixed])


def problems_digest(problems: Sequence[Problem]) -> str:
    """SHA-256 over problems in their order."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.id, problem.prompt, problem.answer]).encode())
    return digest.hexdigest()
