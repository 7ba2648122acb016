"""Where arrays live on the mesh: rules from logical axes to mesh axes.

The train step is plain ``jax.jit`` with NamedShardings. Parameters and inputs are placed by these
rules, a handful of `constrain` calls pin the activations, and the compiler does the rest. Without a
mesh in context, or inside shard_map and pmap, `constrain` does nothing, so that one model serves all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opd_jax.errors import InputError
from opd_jax.model.config import Qwen3Config
from opd_jax.model.parameters import Table, parameter_table

MESH_AXES = ("data", "fsdp", "expert", "tensor")
# The mesh axes that rows are split over. Outside of experts, an expert axis is one more data axis.
BATCH = ("data", "fsdp", "expert")

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "routes": None,
    "norm": None,
    "rank": None,
    # activations
    "batch": BATCH,
    "length": None,
    "width": None,
    "support": None,
}

# Weights that are only read may lie otherwise: a teacher too large for one copy in each group of the data
# axis is split over that axis too, and gathered a layer at a time. What is computed with follows RULES.
SPREAD: Rules = {**RULES, "embed": ("data", "fsdp")}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1, *, devices: Any = None) -> Mesh:
    """A mesh of ``data x fsdp x expert x tensor`` devices, the first of those at hand unless named.

    Raises:
      InputError: there are fewer devices than the mesh asks for, or it leaves out a process that has some.
    """
    shape = (data, fsdp, expert, tensor)
    if min(shape) < 1:
        raise InputError(
            f"an axis of a mesh must have a device: got {data} x {fsdp} x {expert} x {tensor} (data, fsdp, "
            "expert, tensor); give positive sizes"
        )
    devices = jax.devices() if devices is None else devices
    wanted, present = math.prod(shape), len(devices)
    if wanted > present:
        raise InputError(
            f"a mesh cannot be larger than the devices at hand: mesh {data} x {fsdp} x {expert} x {tensor} "
            f"(data, fsdp, expert, tensor) needs {wanted}, there are {present}; lower one of mesh.data, "
            "mesh.fsdp, mesh.expert, mesh.tensor"
        )
    kinds, chosen = (AxisType.Auto,) * len(MESH_AXES), devices[:wanted]
    held, hosts = (len({device.process_index for device in some}) for some in (chosen, devices))
    if held < hosts:
        raise InputError(
            f"a mesh must hold devices of every process: mesh {data} x {fsdp} x {expert} x {tensor} (data, "
            f"fsdp, expert, tensor) has those of {held} of {hosts}; let mesh.data, mesh.fsdp, "
            f"mesh.expert and mesh.tensor multiply to {present}, all that there are"
        )
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=chosen)
    except NotImplementedError:  # an axis is smaller than the torus it would lie on
        laid_out = create_device_mesh(shape, chosen, allow_split_physical_axes=True)
        return Mesh(laid_out, MESH_AXES, axis_types=kinds)
    except AssertionError:  # a part of the torus that is no block of it
        return Mesh(np.asarray(chosen).reshape(shape), MESH_AXES, axis_types=kinds)


def partition(*axes: str, rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names."""
    placed = [rules[axis] for axis in axes]
    used = [name for place in placed for name in ((place,) if isinstance(place, str) else place or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"two axes of one array fall on one mesh axis: {axes} -> {placed}")
    return PartitionSpec(*placed)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pin ``x`` to the rules of its logical axes under the mesh in context; else leave it alone."""
    if not in_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, partition(*axes))


def in_mesh() -> bool:
    """Whether a mesh is in context whose arrays are whole here: not inside shard_map or pmap."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind == AxisType.Auto for kind in mesh.axis_types)


def can_split(rows: int) -> bool:
    """Whether a mesh is in context over whose batch axes this many rows split evenly."""
    shape = jax.sharding.get_abstract_mesh().shape
    return (
        in_mesh() and math.prod(shape.values()) > 1 and rows % math.prod(shape[name] for name in BATCH) == 0
    )


def ways_of(rows: int) -> int:
    """How many parts the mesh in context splits this many rows into; 1 where it does not."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in BATCH) if can_split(rows) else 1


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of ``[B, ...]`` arrays: rows over data, fsdp and expert."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def on_mesh(arrays: Any, mesh: Mesh) -> Any:
    """Host arrays ``[B, ...]``, the same in every process, as global arrays with their rows split."""
    return jax.device_put(arrays, batch_sharding(mesh))


def everywhere(arrays: Any) -> Any:
    """Results of a program made whole on every device, so that every process can read them."""
    if not in_mesh():
        return arrays
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), arrays)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(config: Qwen3Config, mesh: Mesh, rules: Rules = RULES) -> dict:
    """NamedSharding of every parameter, as a nested dict like the parameters themselves.

    Raises:
      InputError: a dimension is not divisible by the mesh axes that it falls on.
    """
    return table_shardings(parameter_table(config), mesh, rules)


def table_shardings(table: Table, mesh: Mesh, rules: Rules = RULES) -> dict:
    """`param_shardings` of any table of parameters."""
    flat = {}
    for path, parameter in table.items():
        spec = partition(*parameter.axes, rules=rules)
        for size, axis, place in zip(parameter.shape, parameter.axes, spec, strict=True):
            names = (place,) if isinstance(place, str) else place or ()
            ways = math.prod(mesh.shape[name] for name in names)
            if size % ways:
                raise InputError(
                    f"a dimension must divide by the mesh axes it is split over: {'.'.join(path)} "
                    f"has {axis} = {size}, mesh {'x'.join(names)} = {ways}; use a divisor of {size}"
                )
        flat[path] = NamedSharding(mesh, spec)
    return traverse_util.unflatten_dict(flat)
