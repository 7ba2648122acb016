"""The optimizer: AdamW behind a global gradient-norm clip."""

from __future__ import annotations

import jax
import optax


def make_optimizer(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay after clipping the gradient's global norm.

    Weight decay spares vectors (norm scales), which have no direction to shrink.
    """

    def matrices(params: optax.Params) -> optax.Params:
        # Stacked norms are [L, D] or [L, H]: told apart by name, not by rank.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not str(getattr(path[-1], "key", path[-1])).endswith("norm"), params
        )

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=matrices),
    )
