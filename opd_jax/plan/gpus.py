"""GPUs that need not be here: what their compiler has to know of them to compile for them.

Figures are those the devices tell of themselves: A100, H100, H200 and B200 as OpenXLA's
``xla/backends/gpu/target_config/specs`` has them, T4 by TensorFlow's log of one (NVIDIA/DALI issue 1813).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import re
from typing import Any

from opd_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    kind: str  # as a jax device calls itself
    capability: tuple[int, int]
    processors: int  # streaming multiprocessors
    memory: int  # bytes
    bandwidth: float  # bytes a second
    l2: int  # bytes
    gigahertz: float
    shared: int  # bytes of shared memory of a processor
    threads: int = 2048  # that a processor holds
    lanes: int = 128  # float32 units of a processor


GPUS = {
    "t4": Gpu("Tesla T4", (7, 5), 40, 15_837_691_904, 320e9, 4_194_304, 1.59, 65_536, 1024, 64),
    "a100-40gb": Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 42_331_013_120, 1555e9, 41_943_040, 1.41, 167_936, lanes=64
    ),
    "a100-80gb": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_100_068_864, 2039e9, 41_943_040, 1.41, 167_936, lanes=64
    ),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 84_942_979_072, 3352e9, 52_428_800, 1.98, 233_472),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 151_397_597_184, 4800e9, 52_428_800, 1.98, 233_472),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 191_514_411_008, 7672e9, 132_644_864, 1.965, 233_472),
}

SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
MOST = 100_000  # GPUs, of a topology


def gpu_devices(topology: str) -> list[Any]:
    """Abstract GPUs: ``h100`` is one, ``h100:8`` a host of eight, ``h100:2x8`` two such hosts.

    Raises:
      InputError: there is no such topology, or the compiler is not installed.
    """
    name, colon, size = topology.partition(":")
    shape = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", size if colon else "1")
    if name not in GPUS or not shape or int(shape[1] or 1) * int(shape[2]) > MOST:
        raise InputError(
            f"a topology of GPUs is one of {', '.join(GPUS)}, then how many, up to {MOST:,}: got "
            f"{topology!r}; use h100:8 or h100:2x8, for example"
        )
    _share()  # jax would not read its environment either
    # There is no driver to be of the right version.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    said = {"target_config": _target(GPUS[name]), "topology": f"1x{shape[1] or 1}x{shape[2]}"}
    try:
        try:
            found = topologies.get_topology_desc(platform="cuda", **said)
        except NotImplementedError:
            _register()
            found = topologies.get_topology_desc(platform="cuda", **said)
    except Exception as error:  # the compiler's own kinds of errors
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"a topology of GPUs needs their compiler: got {topology!r} ({reason}); install the extra gpu"
        ) from None
    return list(found.devices)


def _register() -> None:
    """Jax looks for compilers once, at its first operation, and passed one over that found no driver then."""
    for plugin in importlib.metadata.entry_points(group="jax_plugins"):
        if plugin.name.startswith("xla_cuda"):
            plugin.load().initialize()


def gpu_memory(kind: str) -> int | None:
    """Bytes that jax takes of a GPU of this kind, which is 3/4 unless the environment says otherwise."""
    for gpu in GPUS.values():
        if gpu.kind == kind:
            return int(gpu.memory * _share())
    return None


def _share() -> float:
    """The share of a GPU's memory that jax takes, by the two names that it has in the environment."""
    asked = {name: os.environ[name] for name in SHARE if os.environ.get(name)}
    said = " and ".join(f"{name}={value}" for name, value in asked.items())
    if len(asked) > 1:
        raise InputError(f"a share of a GPU's memory is given once: got {said}; drop one of them")
    try:
        share = float(*asked.values()) if asked else 0.75
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise InputError(
            f"a share of a GPU's memory must be a number above 0: got {said}; use 0.9, for example"
        )
    return share


def _target(gpu: Gpu) -> str:
    """The text that XLA reads a GPU's figures from (``GpuTargetConfigProto``)."""
    major, minor = gpu.capability
    figures = {
        "core_count": gpu.processors,
        "fpus_per_core": gpu.lanes,
        "clock_rate_ghz": gpu.gigahertz,
        "device_memory_size": gpu.memory,
        "memory_bandwidth": int(gpu.bandwidth),
        "l2_cache_size": gpu.l2,
        "shared_memory_per_core": gpu.shared,
        # A processor keeps a KiB of it for each block; Turing and older keep none.
        "shared_memory_per_block_optin": gpu.shared - (1024 if major >= 8 else 0),
        "shared_memory_per_block": 49_152,
        "threads_per_core_limit": gpu.threads,
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
    }
    lines = [f"{name}: {value}" for name, value in figures.items()]
    lines.append(f"cuda_compute_capability {{ major: {major} minor: {minor} }}")
    return (
        f"gpu_device_info {{ {' '.join(lines)} }}\n"
        'platform_name: "CUDA"\n'
        "dnn_version_info { major: 9 minor: 10 }\n"
        "runtime_version { major: 13 }\n"
        f'device_description_str: "{gpu.kind}"\n'
    )
