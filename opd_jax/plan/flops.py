"""Floating-point operations of a program, counted on its jaxpr.

The compiler's own count visits the body of a loop once and knows nothing of a kernel. Here a scan counts
as often as it runs, and an attention kernel by its formula. Only matrix products are counted: everything
else is small beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax

from opd_jax.model.sharding import RULES

_EXPERTS = RULES["experts"]


def program_flops(function: Callable[..., Any], *args: Any) -> int:
    """Matrix-product FLOPs of one call over all devices; a multiply and an add are two.

    The body of a loop whose length only the data knows counts once: for a sampler that is prefill and
    one token.

    Args:
      function: what is called; may be jitted, may hold shard_map, scan, remat and custom derivatives.
      args: arrays or ShapeDtypeStructs, and what a jitted function takes as static.
    """
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return _jaxpr_flops(jitted.trace(*args).jaxpr.jaxpr, 1)


def _jaxpr_flops(jaxpr: Any, expert_ways: int) -> int:
    return sum(_equation_flops(equation, expert_ways) for equation in jaxpr.eqns)


def _equation_flops(equation: Any, expert_ways: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_flops(equation)
    if name in ("ragged_dot", "ragged_dot_general"):
        return _ragged_dot_flops(equation, expert_ways)
    if name == "pallas_call":
        return _splash_flops(equation)
    if name in _CUDNN_PRODUCTS:
        return _cudnn_flops(equation)
    if _UNKNOWN.match(name):
        called = params.get("target_name") or params.get("call_target_name")
        raise NotImplementedError(
            f"operations of {name}{f' ({called})' if called else ''} are not known; count them in plan.flops"
        )
    if name == "cond":
        return max(_jaxpr_flops(branch.jaxpr, expert_ways) for branch in params["branches"])
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times, expert_ways = math.prod(params["mesh"].shape.values()), params["mesh"].shape.get(_EXPERTS, 1)
    return times * sum(_jaxpr_flops(inner, expert_ways) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(part, "jaxpr", part)
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found


def _dot_flops(equation: Any) -> int:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    shared = math.prod(left[axis] for axis in contracted)
    batched = math.prod(left[axis] for axis in batch)
    return 2 * math.prod(left) * math.prod(right) // (shared * batched)


def _ragged_dot_flops(equation: Any, expert_ways: int) -> int:
    """Of the rows that are served, each through one expert.

    A device is given the rows of all that share an expert axis, and serves its part of them. The gradient in
    the weights is compiled as a dense product for every expert of the device, and is counted like that.
    """
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    if len(right) == 3:  # [m, k] x [E, k, n] -> [m, n]
        return 2 * math.prod(left) * out[-1] // expert_ways
    return 2 * math.prod(left) * right[-1] * out[0]  # [m, k] x [m, n] -> [E, k, n]


# What computes products that its equation does not show.
_UNKNOWN = re.compile(
    r"ffi_call|tpu_custom_call|mosaic_gpu|triton_kernel|dot_product_attention|scaled_(?:matmul|dot)|"
    r"conv_general_dilated"
)

# Matrix products over the scores of an attention kernel, by what its name begins with: the forward pass
# makes scores and output; the backward passes make scores and their gradient again, and from them the
# gradient of queries, or those of keys and values.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def _splash_flops(equation: Any) -> int:
    """``products * 2 B N (T^2 / 2) H``: a causal kernel leaves out what lies above the diagonal."""
    name = str(equation.params["name"])
    products = next((count for start, count in _PRODUCTS.items() if name.startswith(start)), None)
    if products is None:
        raise NotImplementedError(f"operations of the kernel {name} are not known; add them to _PRODUCTS")
    shapes = [variable.aval.shape for variable in equation.invars]
    # The queries, [B, N, T, H]; a batch of one row has lost its axis.
    *rows, length, width = max((shape for shape in shapes if len(shape) > 2), key=math.prod)
    return products * math.prod(rows) * length * length * width


# Forward scores and output; backward scores again, their gradient, and those of queries, keys and values.
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def _cudnn_flops(equation: Any) -> int:
    """``products * 2 B N T S H``, half of it where a causal mask leaves out what is above the diagonal."""
    params = equation.params
    if params["layout"] != 0 or params["sliding_window_length"]:
        raise NotImplementedError(
            "operations of cuDNN attention are known of [B, T, N, H] and without a window; count others here"
        )
    query, key = (variable.aval.shape for variable in equation.invars[:2])
    causal = "CAUSAL" in params["mask_type"].name
    products = _CUDNN_PRODUCTS[equation.primitive.name]
    return products * 2 * math.prod(query) * int(key[1]) // (2 if causal else 1)
