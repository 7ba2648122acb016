"""The published Qwen3 models by name.

Values are those of the ``config.json`` in each ``Qwen/Qwen3-*`` repository.
"""

from __future__ import annotations

import dataclasses

from opd_jax.errors import InputError
from opd_jax.model.config import Qwen3Config


def _qwen3(width: int, mlp: int, layers: int, heads: int, *, tied: bool = False, kv: int = 8) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=128,
        tie_word_embeddings=tied,
    )


def _experts(dense: Qwen3Config, expert_mlp: int) -> Qwen3Config:
    return dataclasses.replace(
        dense,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=expert_mlp,
        norm_topk_prob=True,
    )


_SIZES = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _experts(_qwen3(2048, 6144, 48, 32, kv=4), 768),
    "qwen3-235b-a22b": _experts(_qwen3(4096, 12288, 94, 64, kv=4), 1536),
}
_BASE = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-30b-a3b")
_JULY_2025_THETA = {"qwen3-4b": 5e6, "qwen3-30b-a3b": 1e7, "qwen3-235b-a22b": 5e6}

PRESETS: dict[str, Qwen3Config] = dict(_SIZES)
PRESETS |= {
    f"{name}-base": dataclasses.replace(_SIZES[name], eos_token_id=151_643, max_position_embeddings=32_768)
    for name in _BASE
}
PRESETS |= {
    f"{name}-{kind}-2507": dataclasses.replace(
        _SIZES[name], rope_theta=theta, max_position_embeddings=262_144
    )
    for name, theta in _JULY_2025_THETA.items()
    for kind in ("instruct", "thinking")
}


def preset(name: str) -> Qwen3Config:
    """The configuration of a published Qwen3, for example ``preset("qwen3-1.7b")``.

    Raises:
      InputError: no Qwen3 of that name was published.
    """
    try:
        return PRESETS[name.lower()]
    except KeyError:
        raise InputError(
            f"a preset must be a published Qwen3: got {name!r}; use one of {', '.join(PRESETS)}"
        ) from None
