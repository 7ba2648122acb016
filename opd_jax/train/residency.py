"""Arrays that wait on the host while something else is on the devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What this process holds of an array that lies on the devices of several."""

    shape: tuple[int, ...]
    sharding: Sharding
    pieces: list[tuple[jax.Device, np.ndarray]]


def moved(tree: Any, shardings: Any) -> Any:
    """Arrays on the devices where ``shardings`` has them, or on the host where it is None.

    An array on the devices of several processes waits in `Pieces`, for each process keeps its own.
    """
    if shardings is None:
        return jax.tree.map(_to_host, tree)
    return jax.device_put(jax.tree.map(_together, tree), shardings)


def _to_host(value: Any) -> Any:
    if isinstance(value, Pieces):
        return value
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return jax.device_get(value)
    if value.is_fully_replicated:  # its shards cannot be asked for if it came from one device
        whole = jax.device_get(value)
        pieces = [(device, whole) for device in value.sharding.addressable_devices]
        return Pieces(value.shape, value.sharding, pieces)
    copies: dict[str, np.ndarray] = {}
    for shard in value.addressable_shards:
        if str(shard.index) not in copies:  # what is the same on several devices is kept once
            copies[str(shard.index)] = np.asarray(shard.data)
    pieces = [(shard.device, copies[str(shard.index)]) for shard in value.addressable_shards]
    return Pieces(value.shape, value.sharding, pieces)


def _together(value: Any) -> Any:
    if not isinstance(value, Pieces):
        return value
    placed = [jax.device_put(piece, device) for device, piece in value.pieces]
    return jax.make_array_from_single_device_arrays(value.shape, value.sharding, placed)
