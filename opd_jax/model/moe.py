"""Mixture of experts: a router sends each token to its k best experts, and none is dropped.

Tokens are sorted by expert and multiplied in one ragged product a projection, so that an expert may get
any number of them. Over the mesh, experts lie on ``expert`` and each expert's width on ``tensor``: rows
of the devices that share an expert axis are gathered, every device serves those routed to the experts it
holds, and the sum over devices brings the parts home.

An exchange of only the routed rows (`jax.lax.ragged_all_to_all`) would not move less here: of a token over
n expert shards it moves up to ``k (1 - 1/n)`` rows where the gather moves ``n - 1``, so that it gains only
beyond n = k, which is 8 in the published models; and where none may be dropped, its buffer has to
hold the worst case, as many rows as the gather brings.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from opd_jax.model.config import Qwen3Config
from opd_jax.model.sharding import RULES, can_split, partition
from opd_jax.types import Params


@struct.dataclass
class Routing:
    """What a layer's router did; summed over tokens, so that parts add up."""

    tokens: jax.Array  # [E] float32: routed to each expert, of the tokens that are no padding
    entropy: jax.Array  # scalar float32: of the router's distribution, nats, summed over the same tokens
    count: jax.Array  # scalar float32: how many they are


def experts(x: jax.Array, layer: Params, valid: jax.Array, config: Qwen3Config) -> tuple[jax.Array, Routing]:
    """The experts' share of a layer: ``sum_{e in top k} p_e down_e(silu(gate_e(x)) * up_e(x))``.

    ``p`` is the softmax over all experts, and divided by its sum over the chosen k where the model's
    ``norm_topk_prob`` says so.

    Args:
      x: ``[B, T, D]`` after the norm.
      layer: ``router [D, E]``, ``expert_gate`` and ``expert_up [E, D, F]``, ``expert_down [E, F, D]``.
      valid: ``[B, T]`` bool, false at padding; padding is computed but not counted.
      config: dimensions.

    Returns:
      ``[B, T, D]`` in the dtype of ``x``, and the routing.
    """
    weights = {name: layer[name] for name in ("router", "expert_gate", "expert_up", "expert_down")}
    if not can_split(x.shape[0]):
        return _local(x, weights, valid, config, None, None)
    rows, wide = partition("batch", "length", "width"), partition("experts", "embed", "mlp")
    expert, fsdp, tensor = RULES["experts"], RULES["embed"], RULES["mlp"]

    def on_device(x: jax.Array, weights: Params, valid: jax.Array) -> tuple[jax.Array, Routing]:
        whole = {
            "router": weights["router"],
            "expert_gate": jax.lax.all_gather(weights["expert_gate"], fsdp, axis=1, tiled=True),
            "expert_up": jax.lax.all_gather(weights["expert_up"], fsdp, axis=1, tiled=True),
            "expert_down": jax.lax.all_gather(weights["expert_down"], fsdp, axis=2, tiled=True),
        }
        out, routing = _local(x, whole, valid, config, expert, tensor)
        return out, jax.lax.psum(routing, RULES["batch"])

    return jax.shard_map(
        on_device,
        in_specs=(
            rows,
            {
                "router": PartitionSpec(),
                "expert_gate": wide,
                "expert_up": wide,
                "expert_down": partition("experts", "mlp", "embed"),
            },
            partition("batch", "length"),
        ),
        out_specs=(rows, PartitionSpec()),
    )(x, weights, valid)


def routing_readings(routing: Routing) -> dict[str, tuple[jax.Array, jax.Array]]:
    """How a model's routers spread the tokens, as (sum, count), from the routing of its layers.

    ``router_entropy`` is a token's mean over layers, in nats. ``router_imbalance`` is ``E sum_e f_e^2``
    of the share f of tokens that each expert gets, mean over layers: 1 when all get the same, E when one
    gets everything. ``router_largest`` is the largest ``E f_e`` of any layer; ``router_idle`` the share of
    experts that no token went to.
    """
    one, number = jnp.ones(()), routing.tokens.shape[-1]
    share = routing.tokens / jnp.maximum(jnp.sum(routing.tokens, axis=-1, keepdims=True), 1.0)
    return {
        "router_entropy": (jnp.mean(routing.entropy), routing.count[0]),
        "router_imbalance": (jnp.mean(number * jnp.sum(share**2, axis=-1)), one),
        "router_largest": (jnp.max(number * share), one),
        "router_idle": (jnp.mean(routing.tokens == 0), one),
    }


def _local(
    x: jax.Array,
    weights: Params,
    valid: jax.Array,
    config: Qwen3Config,
    expert: Any,
    tensor: Any,
) -> tuple[jax.Array, Routing]:
    """One device's rows through all experts, of which it holds some (``expert``) in part (``tensor``)."""
    b, t, d = x.shape
    flat = x.reshape(b * t, d)
    chosen, share, routing = route(flat, weights["router"], valid.reshape(-1), config)
    here = weights["expert_gate"].shape[0]
    first = 0
    if expert is not None:
        flat, chosen, share = (
            jax.lax.all_gather(part, expert, axis=0, tiled=True) for part in (flat, chosen, share)
        )
        first = jax.lax.axis_index(expert) * here
    out = serve(flat, chosen - first, share, weights)
    if expert is not None:
        out = jax.lax.psum(out, tensor)
        out = jax.lax.psum_scatter(out, expert, scatter_dimension=0, tiled=True)
    return out.astype(x.dtype).reshape(b, t, d), routing


def route(
    x: jax.Array, router: jax.Array, valid: jax.Array, config: Qwen3Config
) -> tuple[jax.Array, jax.Array, Routing]:
    """Which experts each token goes to, and with what weight, in float32.

    Args:
      x: ``[N, D]``, N tokens.
      router: ``[D, E]``.
      valid: ``[N]`` bool, the tokens to count.
      config: dimensions.

    Returns:
      ``[N, k]`` int32 experts, ``[N, k]`` float32 weights, and the routing.
    """
    score = jnp.einsum("nd,de->ne", x, router, preferred_element_type=jnp.float32)
    probability = jax.nn.softmax(score, axis=-1)
    share, chosen = jax.lax.top_k(probability, config.num_experts_per_tok)
    if config.norm_topk_prob:
        share = share / jnp.sum(share, axis=-1, keepdims=True)
    counted = valid.astype(jnp.float32)
    hits = jnp.sum(jax.nn.one_hot(chosen, config.num_experts) * counted[:, None, None], axis=(0, 1))
    entropy = -jnp.sum(probability * jax.nn.log_softmax(score, axis=-1), axis=-1)
    routing = Routing(hits, jnp.sum(entropy * counted), jnp.sum(counted))
    return chosen.astype(jnp.int32), share, jax.lax.stop_gradient(routing)


def serve(x: jax.Array, chosen: jax.Array, share: jax.Array, weights: Params) -> jax.Array:
    """The weighted sum over those of each token's experts that are here.

    Args:
      x: ``[N, D]``.
      chosen: ``[N, k]`` int32; experts held here count from 0, any other number is another device's.
      share: ``[N, k]`` float32.
      weights: ``expert_gate``, ``expert_up`` ``[E, D, F]`` and ``expert_down [E, F, D]`` of E experts.

    Returns:
      ``[N, D]`` float32.
    """
    n, k = chosen.shape
    here = weights["expert_gate"].shape[0]
    owner = jnp.where((chosen >= 0) & (chosen < here), chosen, here).reshape(-1)
    # Sorted by expert, with what belongs to others at the end, in no group of the ragged products.
    order = jnp.argsort(owner, stable=True)
    token = order // k
    sizes = jnp.bincount(owner, length=here + 1)[:here].astype(jnp.int32)
    mine = (jnp.arange(n * k) < jnp.sum(sizes))[:, None]
    rows = jnp.where(mine, x[token], 0)
    gate = jax.lax.ragged_dot(rows, weights["expert_gate"], sizes)
    up = jax.lax.ragged_dot(rows, weights["expert_up"], sizes)
    out = jax.lax.ragged_dot(
        jax.nn.silu(gate) * up, weights["expert_down"], sizes, preferred_element_type=jnp.float32
    )
    # Rows behind the last group are not defined by the product: select, do not multiply.
    out = jnp.where(mine, out * share.reshape(-1)[order][:, None], 0)
    return jnp.zeros(x.shape, jnp.float32).at[token].add(out)
