"""Rotary position embedding, plain or stretched to longer contexts by YaRN (arXiv 2309.00071)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.model.fields import check_flag, check_number

if TYPE_CHECKING:
    from opd_jax.model.config import Qwen3Config


@dataclasses.dataclass(frozen=True)
class Yarn:
    """``rope_scaling`` of a config.json whose type is ``yarn``, under its own names."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # of cosine and sine; from factor where it is not given
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = f"rope_scaling.{field.name}", getattr(self, field.name)
            if field.name == "truncate":
                check_flag(name, value)
            elif value is not None or field.default is not None:
                check_number(name, value)


def frequencies(config: Qwen3Config) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of a head's dimensions, and the factor of cosine and sine.

    Plain: ``theta^(-2i/H)``. YaRN divides the slow ones by its factor, leaves the fast ones, and goes
    linearly from one to the other between the dimensions that turn ``beta_slow`` and ``beta_fast``
    times within the original context.

    Returns:
      ``[H/2]`` float32 radians per position, and a number.
    """
    half = config.head_dim // 2
    plain = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    yarn = config.rope_scaling
    if yarn is None:
        return plain.astype(np.float32), 1.0

    def dimension(turns: float) -> float:
        """Where a pair turns this often within the original context."""
        wavelength = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return half * math.log(wavelength) / math.log(config.rope_theta)

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    slow = np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0, 1)
    stretched = plain / yarn.factor * slow + plain * (1 - slow)
    return stretched.astype(np.float32), _attention_factor(yarn)


def _attention_factor(yarn: Yarn) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor

    def scale(m: float) -> float:
        return 1.0 if yarn.factor <= 1 else 0.1 * m * math.log(yarn.factor) + 1.0

    if yarn.mscale and yarn.mscale_all_dim:
        return scale(yarn.mscale) / scale(yarn.mscale_all_dim)
    return scale(1.0)


def rotary_angles(positions: jax.Array, config: Qwen3Config) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine ``[B, T, H/2]`` float32 of ``position * frequency``, times YaRN's factor."""
    frequency, factor = frequencies(config)
    angle = positions[..., None].astype(jnp.float32) * frequency
    if factor == 1.0:
        return jnp.cos(angle), jnp.sin(angle)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding of ``x [B, T, heads, H]`` in Hugging Face's half-split layout."""
    cos, sin = (part[:, :, None] for part in angles)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)
