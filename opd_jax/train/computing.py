"""How a model of a run is computed: settings and devices turned into fields of its config."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from opd_jax.config import Config, SamplingConfig
from opd_jax.model import Qwen3Config
from opd_jax.model.kernels import FUSED, KernelChoice, choose_kernel
from opd_jax.model.lora import LoraConfig
from opd_jax.model.sharding import MESH_AXES, RULES, SPREAD, Rules, make_mesh


def computed(model: Qwen3Config, config: Config, mesh: Mesh) -> Qwen3Config:
    """The dimensions of a model, with how this run computes it on these devices."""
    settings = config.model
    return dataclasses.replace(
        model,
        compute_dtype=settings.compute_dtype,
        head_chunk=settings.head_chunk,
        remat=settings.remat,
        attention=kernel_of(model, config, mesh).name,
        lora_alpha=settings.lora.alpha,
    )


def mesh_of(config: Config, devices: Any = None) -> Mesh:
    """The mesh of a run, over the devices at hand unless others are named."""
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    return make_mesh(**sizes, devices=devices)


def teacher_rules(config: Config) -> Rules:
    """How the teacher's weights lie on the mesh."""
    return SPREAD if config.mesh.spread_teacher else RULES


def adapter_of(config: Config) -> LoraConfig | None:
    """What is trained in the place of the student's own weights, if anything."""
    lora = config.model.lora
    return LoraConfig(lora.rank, lora.alpha, lora.targets) if lora.rank else None


def kernel_of(model: Qwen3Config, config: Config, mesh: Mesh) -> KernelChoice:
    """Which attention kernel computes rows of a run, and why.

    Raises:
      InputError: the one that ``model.attention`` names cannot.
    """
    device = mesh.devices.flat[0]
    return choose_kernel(
        config.model.attention,
        platform=device.platform,
        dtype=config.model.compute_dtype,
        length=row_width(config.sampling, device.platform),
        head_dim=model.head_dim,
        packed=config.schedule.rows == "packed",
        compute_capability=getattr(device, "compute_capability", None),
    )


def row_width(sampling: SamplingConfig, platform: str) -> int:
    """T: positions in a row that holds the longest prompt and response; rounded up where kernels ask it."""
    width = sampling.max_prompt + sampling.max_response - 1
    return width if platform == "cpu" else -(-width // FUSED) * FUSED
