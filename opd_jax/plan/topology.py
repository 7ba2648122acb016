"""Devices to compile for: those at hand, or GPUs and topologies of TPUs that nobody here owns."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from opd_jax.errors import InputError
from opd_jax.plan.gpus import GPUS, gpu_devices, gpu_memory

GIB = 2**30
# High-bandwidth memory that the compiler has of one device, by its kind, as it says where a program is too
# large (libtpu 0.0.42); it keeps some of what is built in. A TPU7x chip is two devices.
_HBM = {
    "TPU v4": int(30.75 * GIB),
    "TPU v5 lite": int(15.75 * GIB),
    "TPU v5": int(95.74 * GIB),
    "TPU v5p": int(95.74 * GIB),
    "TPU v6 lite": int(31.25 * GIB),
    "TPU7x": int(94.75 * GIB),
}


def devices_of(topology: str) -> list[Any]:
    """The devices of ``local``, or abstract ones: of GPUs (``h100:8``) or of a TPU topology (``v5e:16x16``).

    Abstract devices hold nothing and run nothing, but their compiler compiles for them.

    Raises:
      InputError: there is no such topology, or the compiler is not installed.
    """
    if topology == "local":
        return list(jax.devices())
    if not topology:
        raise InputError(
            "a topology must have a name: got an empty one; use local, h100:8 or v5e:16x16, for example"
        )
    if topology.partition(":")[0] in GPUS:
        return gpu_devices(topology)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU's metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # which share no TPU, for there is none
    from jax.experimental import topologies

    try:
        # The two cores of a v4 chip are one device to JAX, which this compiler has to be told.
        merged = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **merged)
    except Exception as error:  # the compiler's own kinds of errors
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"a topology must be local, GPUs ({', '.join(GPUS)}), or one that the TPU compiler knows: got "
            f"{topology!r} ({reason}); use h100:8 or v5e:16x16, for example, and install the extra gpu or tpu"
        ) from None
    return list(found.devices)


@contextlib.contextmanager
def uncached(devices: Iterable[Any]) -> Iterator[None]:
    """Keep nothing of what is compiled for devices that are not here.

    JAX would find it in its cache the next time, and could not load it.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    if not set(devices) <= set(jax.devices()):
        jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def memory_of(device: Any) -> int | None:
    """Bytes of a device's own memory; None where it has none apart, as a CPU."""
    if device.device_kind in _HBM:
        return _HBM[device.device_kind]
    if device.platform in ("cpu", "tpu"):
        return None
    try:
        limit: int | None = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # one that is not here
        return gpu_memory(device.device_kind)
    return limit
