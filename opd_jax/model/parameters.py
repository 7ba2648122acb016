"""The parameter table: every weight's shape, axes, initial scale and Hugging Face name, said once.

Initialisation, shardings, import, export and counts all derive from `parameter_table`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from opd_jax.model.config import Qwen3Config
from opd_jax.types import Params

Path = tuple[str, ...]
Table = dict[Path, "Parameter"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One weight as it is stored: ``[L, E, inputs..., outputs...]``, layer and expert only in a stack.

    Hugging Face stores a projection as one matrix per layer and expert, outputs first; ``inputs``
    counts the axes that must move behind the others to get there, and 0 means the layouts agree.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # a logical name per dimension; `sharding.RULES` places them on the mesh
    name: str  # in a Hugging Face checkpoint; "{layer}" and "{expert}" stand for the stacked axes
    scale: float | None = None  # standard deviation at initialisation; None starts at one
    inputs: int = 0

    @property
    def stacks(self) -> int:
        """How many leading axes a checkpoint stores apart, a tensor for each index."""
        return self.name.count("{")


def parameter_table(config: Qwen3Config) -> Table:
    """Every parameter of a Qwen3, by its path in the nested dict of arrays."""
    L, D = config.num_hidden_layers, config.hidden_size
    N, M, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layer = "model.layers.{layer}."
    # Residual branches start small enough that the sum over layers keeps unit scale.
    branch = 1.0 / math.sqrt(2 * L)

    table: Table = {
        ("embed",): Parameter(
            (config.vocab_size, D),
            ("vocab", "embed"),
            "model.embed_tokens.weight",
            # A tied table is also the head, where unit scale would give logits of scale sqrt(D).
            scale=1.0 / math.sqrt(D) if config.tie_word_embeddings else 1.0,
        ),
        ("layers", "attention_norm"): Parameter((L, D), ("layers", "norm"), layer + "input_layernorm.weight"),
        ("layers", "query"): Parameter(
            (L, D, N, H),
            ("layers", "embed", "heads", "head_dim"),
            layer + "self_attn.q_proj.weight",
            D**-0.5,
            1,
        ),
        ("layers", "key"): Parameter(
            (L, D, M, H),
            ("layers", "embed", "kv_heads", "head_dim"),
            layer + "self_attn.k_proj.weight",
            D**-0.5,
            1,
        ),
        ("layers", "value"): Parameter(
            (L, D, M, H),
            ("layers", "embed", "kv_heads", "head_dim"),
            layer + "self_attn.v_proj.weight",
            D**-0.5,
            1,
        ),
        ("layers", "query_norm"): Parameter(
            (L, H), ("layers", "head_dim"), layer + "self_attn.q_norm.weight"
        ),
        ("layers", "key_norm"): Parameter((L, H), ("layers", "head_dim"), layer + "self_attn.k_norm.weight"),
        ("layers", "output"): Parameter(
            (L, N, H, D),
            ("layers", "heads", "head_dim", "embed"),
            layer + "self_attn.o_proj.weight",
            branch * (N * H) ** -0.5,
            2,
        ),
        ("layers", "mlp_norm"): Parameter(
            (L, D), ("layers", "norm"), layer + "post_attention_layernorm.weight"
        ),
        **(_experts(config, layer, branch) if config.num_experts else _mlp(config, layer, branch)),
        ("norm",): Parameter((D,), ("norm",), "model.norm.weight"),
    }
    if not config.tie_word_embeddings:
        table[("head",)] = Parameter((D, config.vocab_size), ("embed", "vocab"), "lm_head.weight", D**-0.5, 1)
    return table


def _mlp(config: Qwen3Config, layer: str, branch: float) -> Table:
    L, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    wide, narrow = ("layers", "embed", "mlp"), ("layers", "mlp", "embed")
    return {
        ("layers", "gate"): Parameter((L, D, F), wide, layer + "mlp.gate_proj.weight", D**-0.5, 1),
        ("layers", "up"): Parameter((L, D, F), wide, layer + "mlp.up_proj.weight", D**-0.5, 1),
        ("layers", "down"): Parameter((L, F, D), narrow, layer + "mlp.down_proj.weight", branch * F**-0.5, 1),
    }


def _experts(config: Qwen3Config, layer: str, branch: float) -> Table:
    L, D, F, E = (
        config.num_hidden_layers,
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts,
    )
    expert = layer + "mlp.experts.{expert}."
    wide, narrow = ("layers", "experts", "embed", "mlp"), ("layers", "experts", "mlp", "embed")
    return {
        ("layers", "router"): Parameter(
            (L, D, E), ("layers", "norm", "routes"), layer + "mlp.gate.weight", D**-0.5, 1
        ),
        ("layers", "expert_gate"): Parameter((L, E, D, F), wide, expert + "gate_proj.weight", D**-0.5, 1),
        ("layers", "expert_up"): Parameter((L, E, D, F), wide, expert + "up_proj.weight", D**-0.5, 1),
        ("layers", "expert_down"): Parameter(
            (L, E, F, D), narrow, expert + "down_proj.weight", branch * F**-0.5, 1
        ),
    }


def parameter_count(config: Qwen3Config) -> int:
    """Number of parameters, from the table, without allocating any."""
    return sum(math.prod(parameter.shape) for parameter in parameter_table(config).values())


def abstract_params(table: Table, dtype: Any = jnp.float32) -> Params:
    """Shapes and dtypes of a table's parameters, nothing of it in memory."""
    return traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(parameter.shape, dtype) for path, parameter in table.items()}
    )


def init_params(config: Qwen3Config, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters: normal with the table's scale, norms at one."""
    table = parameter_table(config)
    keys = jax.random.split(key, len(table))
    flat = {
        path: jnp.ones(p.shape, dtype)
        if p.scale is None
        else (p.scale * jax.random.normal(k, p.shape)).astype(dtype)
        for (path, p), k in zip(table.items(), keys, strict=True)
    }
    return traverse_util.unflatten_dict(flat)
