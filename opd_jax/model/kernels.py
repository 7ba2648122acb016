"""Which attention kernel computes rows on a device, and why not another."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax.numpy as jnp

from opd_jax.errors import InputError

FUSED = 128  # positions: fused kernels read rows in multiples of it


class KernelChoice(NamedTuple):
    """Which attention kernel runs, and why in one clause."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"attention kernel {self.name}: {self.reason}"


def choose_kernel(
    asked: str,
    *,
    platform: str,
    dtype: Any,
    length: int,
    head_dim: int,
    packed: bool,
    compute_capability: str | None = None,
) -> KernelChoice:
    """The attention kernel for rows like these on a device like this.

    "auto" takes the best valid one: cuDNN on an NVIDIA GPU, splash on a TPU, XLA elsewhere and where
    those cannot honour the rows. One asked for by name is taken or refused, never replaced.

    Args:
      asked: "auto", "xla", "cudnn" or "splash".
      platform: of the device: "cpu", "gpu" or "cuda", "tpu", ...
      dtype: of query, key and value.
      length: T, of a row.
      head_dim: H.
      packed: whether a row may hold more than one sequence.
      compute_capability: of a GPU, as its jax device says it.

    Raises:
      InputError: no kernel has that name, or it cannot do what was asked.
    """
    obstacles = {
        "xla": None,
        "cudnn": _cudnn_obstacle(platform, dtype, head_dim, packed, compute_capability),
        "splash": _splash_obstacle(platform, dtype, length, head_dim),
    }
    if asked == "auto":
        best = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform)
        if best is None:
            return KernelChoice("xla", f"there is no fused kernel for {platform}")
        if obstacles[best] is None:
            return KernelChoice(best, f"the fused kernel for {platform}")
        return KernelChoice("xla", str(obstacles[best]))
    if asked not in obstacles:
        raise InputError(
            f"an attention kernel must be auto, xla, cudnn or splash: got {asked!r}; name one of them"
        )
    if obstacles[asked] is not None:
        raise InputError(f"{obstacles[asked]}, or ask for auto or xla")
    return KernelChoice(asked, "asked for by name")


# An obstacle is a line in the three parts of an error: it is one where the kernel was asked for by
# name, and the reason for falling back where it was not.


def _cudnn_obstacle(
    platform: str, dtype: Any, head_dim: int, packed: bool, compute_capability: str | None
) -> str | None:
    """Why cuDNN cannot attend, if so."""
    if platform not in ("gpu", "cuda"):
        return f"cudnn attention runs on NVIDIA GPUs: got {platform}; run on one"
    # Other makers' GPUs go by "gpu" too, and say what they are in this field, if at all.
    if compute_capability is None or not re.fullmatch(r"\d+\.\d+", compute_capability):
        came = (
            f"compute capability {compute_capability}" if compute_capability else "unknown compute capability"
        )
        return f"cudnn attention runs on NVIDIA GPUs: got {platform} of {came}; run on one"
    if float(compute_capability) < 8:
        return (
            f"cudnn attention needs compute capability 8.0 (Ampere) or newer: got {compute_capability}; "
            "run on such a GPU"
        )
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cudnn attention reads bfloat16 or float16: got {jnp.dtype(dtype)}; compute in bfloat16"
    # jax lets heads of up to 256 through from Hopper on, but their backward pass comes and goes with
    # the cuDNN release; every published Qwen3 has 128.
    if head_dim > 128 or head_dim % 8:
        return (
            f"cudnn attention needs a head_dim that is a multiple of 8 up to 128: got {head_dim}; "
            "choose such a model"
        )
    # Offsets of packed sequences are not in jax's public interface, and the private one reads wrong
    # keys under grouped-query attention before jax 0.11.2 (jax-ml/jax pull 39521). A mask is: but it
    # becomes a dense [B, 1, T, T] bias, with which cuDNN's backward pass gives NaN at T = 64 mod 128
    # (pytorch/pytorch issue 196678).
    if packed:
        return (
            "cudnn attention cannot keep the sequences of a row apart: got packed rows; "
            "put one sequence in a row"
        )
    return None


def _splash_obstacle(platform: str, dtype: Any, length: int, head_dim: int) -> str | None:
    """Why splash attention cannot attend, if so."""
    if platform != "tpu":
        return f"splash attention runs on TPUs: got {platform}; run on one"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"splash attention reads bfloat16 or float32: got {jnp.dtype(dtype)}; compute in bfloat16"
    if length % FUSED:
        return (
            f"splash attention needs rows of a multiple of 128 positions: got {length}; "
            f"pad rows to {-(-length // FUSED) * FUSED}"
        )
    # Narrower heads compile, but jax tests the kernel at these widths alone.
    if head_dim % 128:
        return (
            f"splash attention needs a head_dim that is a multiple of 128: got {head_dim}; "
            "choose such a model"
        )
    return None
