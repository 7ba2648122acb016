"""Functions of one device's part of arrays, for what the compiler should not be left to split.

On a mesh such a function runs under ``jax.shard_map`` with the rules of `opd_jax.model.sharding` and does
its own communication; on one device, and inside somebody else's shard_map or pmap, it gets whole arrays
and has nothing to communicate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from opd_jax.errors import InputError
from opd_jax.model.sharding import RULES, in_mesh, partition

# Logical axis -> the mesh axes that it is truly split over, none on one device.
Axes = Mapping[str, tuple[str, ...]]


def per_device(function: Callable[..., Any], takes: Any, gives: Any) -> Callable[..., Any]:
    """``function(axes, *parts)`` as a function of whole arrays, under the mesh in context.

    Args:
      function: of `Axes` and one device's part of each array. It is not to be differentiated through;
        what it gives must be the same on all devices that the rules do not split it over.
      takes, gives: the names of the logical axes of each of its arrays, and of its results.

    Raises:
      InputError: a dimension of an array does not divide by the mesh axes that it falls on.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not in_mesh() or mesh.size == 1:
        return functools.partial(function, dict.fromkeys(RULES, ()))
    axes = {name: _mesh_axes(name, mesh.shape) for name in RULES}
    mapped = jax.shard_map(
        functools.partial(function, axes),
        in_specs=_specs(takes),
        out_specs=_specs(gives),
        check_vma=False,
    )

    def checked(*arrays: jax.Array) -> Any:
        for x, names in zip(arrays, takes, strict=True):
            for size, name in zip(x.shape, names, strict=True):
                ways = math.prod(mesh.shape[axis] for axis in axes[name])
                if size % ways:
                    raise InputError(
                        f"a dimension must divide by the mesh axes it is split over: {name} is {size}, "
                        f"mesh {'x'.join(axes[name])} = {ways}; use a multiple of {ways}"
                    )
        return mapped(*arrays)

    return checked


def _mesh_axes(name: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    place = RULES[name]
    names = (place,) if isinstance(place, str) else place or ()
    return tuple(axis for axis in names if sizes.get(axis, 1) > 1)


def _specs(axes: Any) -> Any:
    is_names = lambda part: isinstance(part[0], str)  # noqa: E731
    return jax.tree.map(lambda names: partition(*names), axes, is_leaf=is_names)


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Under shard_map, the arrays, each varying over all axes that any of them varies over.

    It is what a custom gradient and the carry of a loop must do there: the gradient in a replicated array
    is then summed over those axes.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return arrays
    zero = sum(0 * (x.ravel()[0] != 0) for x in arrays)
    return tuple(x + jnp.asarray(zero, x.dtype) for x in arrays)
