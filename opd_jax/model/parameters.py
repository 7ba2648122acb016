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


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One weight as it is stored: ``[L, inputs..., outputs...]``, the layer axis only in a stack.

    Hugging Face stores a projection as one matrix per layer, outputs first; ``inputs`` counts the
    axes that must move behind the others to get there, and 0 means the layouts agree.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # a logical name per dimension; `sharding.RULES` places them on the mesh
    name: str  # in a Hugging Face checkpoint; "{layer}" marks a stacked parameter
    scale: float | None = None  # standard deviation at initialisation; None starts at one
    inputs: int = 0

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    @property
    def stacks(self) -> int:
        """How many leading axes are stacks: one for each placeholder in the name, in order."""
        return self.name.count("{")


def parameter_table(config: Qwen3Config) -> dict[Path, Parameter]:
    """Every parameter of a Qwen3, by its path in the nested dict of arrays."""
    L, D, F = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    N, M, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layer = "model.layers.{layer}."
    # Residual branches start small enough that the sum over layers keeps unit scale.
    branch = 1.0 / math.sqrt(2 * L)

    table: dict[Path, Parameter] = {
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
        ("layers", "gate"): Parameter(
            (L, D, F), ("layers", "embed", "mlp"), layer + "mlp.gate_proj.weight", D**-0.5, 1
        ),
        ("layers", "up"): Parameter(
            (L, D, F), ("layers", "embed", "mlp"), layer + "mlp.up_proj.weight", D**-0.5, 1
        ),
        ("layers", "down"): Parameter(
            (L, F, D),
            ("layers", "mlp", "embed"),
            layer + "mlp.down_proj.weight",
            branch * F**-0.5,
            1,
        ),
        ("norm",): Parameter((D,), ("norm",), "model.norm.weight"),
    }
    if not config.tie_word_embeddings:
        table[("head",)] = Parameter((D, config.vocab_size), ("embed", "vocab"), "lm_head.weight", D**-0.5, 1)
    return table


def parameter_count(config: Qwen3Config) -> int:
    """Number of parameters, from the table, without allocating any."""
    return sum(math.prod(parameter.shape) for parameter in parameter_table(config).values())


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
