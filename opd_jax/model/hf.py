"""How the parameter table looks in a Hugging Face checkpoint: names, shapes and layout of its tensors.

Import (`hf_load`) and export (`hf_save`) both derive from it, which makes them a bijection.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator

import numpy as np

from opd_jax.model.parameters import Parameter


def hf_tensors(parameter: Parameter) -> Iterator[tuple[tuple[int, ...], str]]:
    """Every checkpoint tensor of a parameter: its index along the stacked axes, and its name."""
    axes = [axis for _, axis, _, _ in string.Formatter().parse(parameter.name) if axis]
    for index in np.ndindex(*parameter.shape[: parameter.stacks]):
        yield index, parameter.name.format(**dict(zip(axes, index, strict=True)))


def hf_shape(parameter: Parameter) -> tuple[int, ...]:
    """Shape of one checkpoint tensor of a parameter: a matrix has its outputs first."""
    shape = parameter.shape[parameter.stacks :]
    if not parameter.inputs:
        return shape
    return math.prod(shape[parameter.inputs :]), math.prod(shape[: parameter.inputs])


def to_hf(value: np.ndarray, inputs: int) -> np.ndarray:
    """One layer's weight ``[inputs..., outputs...]`` as its checkpoint tensor, contiguous."""
    if inputs:
        value = value.reshape(math.prod(value.shape[:inputs]), -1).T
    return np.ascontiguousarray(value)
