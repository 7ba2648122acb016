"""Low-rank adaptation: ``W + alpha / r * a b`` with W frozen (Hu et al., arXiv 2106.09685).

An adapter is a tree of its own, ``layers / lora / target / a, b``, stacked over layers like what it
adapts. `lora_delta` adds it beside a projection, `merge_lora` into the weights.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from safetensors.numpy import save_file

from opd_jax.errors import InputError
from opd_jax.files import replacing_folder
from opd_jax.model.config import Qwen3Config
from opd_jax.model.hf import hf_tensors
from opd_jax.model.hf_save import host_tensors
from opd_jax.model.parameters import Parameter, parameter_table
from opd_jax.processes import first_alone
from opd_jax.types import Params

OURS = ("adapter_config.json", "adapter_model.safetensors")  # files of an export
TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections are adapted, and how."""

    rank: int = 16  # r
    alpha: float = 32.0  # the adapter counts alpha / rank
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise InputError(f"a LoRA rank must be a whole number of at least 1: got {self.rank!r}; raise it")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise InputError(f"a LoRA alpha must be a number above 0: got {self.alpha!r}; raise it")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise InputError(
                f"LoRA targets must be at least one, each named once: got {list(self.targets)}; "
                f"choose among {', '.join(TARGETS)}"
            )
        for target in self.targets:
            if target not in TARGETS:
                near = difflib.get_close_matches(target, TARGETS, n=1)
                hint = f"the nearest is {near[0]}" if near else f"choose among {', '.join(TARGETS)}"
                raise InputError(f"a LoRA target must be a projection of a layer: got {target!r}; {hint}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def lora_table(config: Qwen3Config, lora: LoraConfig) -> dict[tuple[str, ...], Parameter]:
    """The parameters of an adapter: ``a [L, inputs..., r]`` and ``b [L, r, outputs...]`` of each target.

    ``a`` begins normal with standard deviation ``1 / sqrt(fan-in)``, ``b`` at zero, so that training
    begins with the model as it is. Names are those of the PEFT library.

    Raises:
      InputError: a target is stacked by expert or not in this model, or the rank exceeds what its
        matrix can have.
    """
    base = parameter_table(config)
    table: dict[tuple[str, ...], Parameter] = {}
    for target in lora.targets:
        weight = base.get(("layers", target))
        if weight is None or weight.stacks != 1:
            raise InputError(
                f"LoRA adapts one matrix a layer: {target} of this model is stacked by expert; "
                "choose among the projections of attention"
            )
        matrix, split = weight.shape[1:], weight.inputs
        fan_in, fan_out = math.prod(matrix[:split]), math.prod(matrix[split:])
        if lora.rank > min(fan_in, fan_out):
            raise InputError(
                f"a LoRA rank must be at most the smaller side of what it adapts: got {lora.rank}, {target} "
                f"is {fan_in} x {fan_out}; lower it"
            )
        name = f"base_model.model.{weight.name.removesuffix('.weight')}.lora_{{}}.weight"
        table["layers", "lora", target, "a"] = Parameter(
            (*weight.shape[: 1 + split], lora.rank),
            (*weight.axes[: 1 + split], "rank"),
            name.replace("{}", "A"),
            fan_in**-0.5,
            split,
        )
        table["layers", "lora", target, "b"] = Parameter(
            (weight.shape[0], lora.rank, *weight.shape[1 + split :]),
            (weight.axes[0], "rank", *weight.axes[1 + split :]),
            name.replace("{}", "B"),
            0.0,
            1,
        )
    return table


def init_lora(config: Qwen3Config, lora: LoraConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """A fresh adapter, which changes nothing yet."""
    table = lora_table(config, lora)
    keys = jax.random.split(key, len(table))
    flat = {
        path: (p.scale * jax.random.normal(k, p.shape)).astype(dtype)
        if p.scale
        else jnp.zeros(p.shape, dtype)
        for (path, p), k in zip(table.items(), keys, strict=True)
    }
    return traverse_util.unflatten_dict(flat)


def lora_delta(h: jax.Array, a: jax.Array, b: jax.Array, scale: float, inputs: int) -> jax.Array:
    """What an adapter adds to a projection: ``scale * (h a) b``.

    Args:
      h: ``[B, T, inputs...]``, what the projection reads.
      a: ``[inputs..., r]``, of one layer.
      b: ``[r, outputs...]``.
      scale: ``alpha / r``.
      inputs: how many axes the projection contracts.

    Returns:
      ``[B, T, outputs...]`` in the dtype of ``h``.
    """
    return jnp.tensordot(scale * jnp.tensordot(h, a, axes=inputs), b, axes=1)


def on_top(params: Params, adapter: Params) -> Params:
    """The parameters with an adapter beside them; of no parameters, the adapter as it is."""
    if not params:
        return adapter
    return {**params, "layers": {**params["layers"], **adapter["layers"]}}


def merge_lora(params: Params, lora_params: Params, lora: LoraConfig) -> Params:
    """The parameters with an adapter merged in: ``W + alpha / r * a b``, in float32.

    In bfloat16 much of a small update would be rounded away. One parameter is merged at a time, layer by
    layer; an adapter already among ``params`` is left out.

    Raises:
      InputError: the adapter is not what ``lora`` describes.
    """
    merged = merged_in_turn(params, lora_params, lora)
    layers = dict(merged["layers"])
    for target in lora.targets:
        stack = layers[target]
        out = getattr(stack.weight, "sharding", None)
        merge = jax.jit(functools.partial(_merge, scale=lora.scale), out_shardings=out)
        layers[target] = merge(stack.weight, stack.a, stack.b)
    return {**merged, "layers": layers}


def merged_in_turn(params: Params, lora_params: Params, lora: LoraConfig) -> Params:
    """`merge_lora` without a second copy of the weights: a layer of a stack is merged when asked for."""
    _refuse_another(lora_params, lora)
    layers = {name: value for name, value in params["layers"].items() if name != "lora"}
    for target in lora.targets:
        adapter = lora_params["layers"]["lora"][target]
        layers[target] = MergedStack(layers[target], adapter["a"], adapter["b"], lora.scale)
    return {**params, "layers": layers}


@dataclasses.dataclass(frozen=True)
class MergedStack:
    """A stack of layers with an adapter merged in, none of them kept."""

    weight: Any
    a: Any
    b: Any
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(jnp.float32)

    def layer(self, index: int) -> jax.Array:
        parts = (
            jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in (self.weight, self.a, self.b)
        )
        return _merge_layer(*parts, scale=self.scale)


def _merge(weight: jax.Array, a: jax.Array, b: jax.Array, *, scale: float) -> jax.Array:
    return jax.lax.map(lambda parts: _merge_layer(*parts, scale=scale), (weight, a, b))


@functools.partial(jax.jit, static_argnames="scale")
def _merge_layer(weight: jax.Array, a: jax.Array, b: jax.Array, *, scale: float) -> jax.Array:
    # A TPU would otherwise multiply in bfloat16.
    exact = jax.lax.Precision.HIGHEST
    delta = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1, precision=exact)
    return weight.astype(jnp.float32) + scale * delta


def _refuse_another(lora_params: Params, lora: LoraConfig) -> None:
    """Refuse an adapter that has other targets or another rank than ``lora`` says."""
    found = {target: x["a"].shape[-1] for target, x in lora_params["layers"]["lora"].items()}
    if found != dict.fromkeys(lora.targets, lora.rank):
        raise InputError(
            f"an adapter must be what its LoraConfig describes: it has the ranks {found}, the config rank "
            f"{lora.rank} of {', '.join(lora.targets)}; give the config that it was made with"
        )


def save_adapter(
    path: str | Path, config: Qwen3Config, lora_params: Params, lora: LoraConfig, *, base: str = ""
) -> None:
    """Write the adapter alone as a folder that the PEFT library reads, replaced whole.

    Args:
      path: the folder; it may be there.
      config: dimensions of the model that is adapted.
      lora_params: the adapter.
      lora: what it adapts.
      base: name or path of that model, for the reader to find it.

    Raises:
      InputError: the adapter is not what ``lora`` describes, or the folder cannot be replaced.
    """
    _refuse_another(lora_params, lora)
    table = lora_table(config, lora)
    names = [name for parameter in table.values() for _, name in hf_tensors(parameter)]
    flat = traverse_util.flatten_dict(lora_params)
    tensors = dict(zip(names, host_tensors(table, flat), strict=True))
    modules = [parameter_table(config)["layers", target].name.split(".")[-2] for target in lora.targets]
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }

    def write() -> None:
        with replacing_folder(Path(path), OURS) as new:
            (new / "adapter_config.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
            save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})

    first_alone(write)
