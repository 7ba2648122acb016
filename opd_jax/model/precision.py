"""What a matrix product of float32 numbers is computed in."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp


def exact_products(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """Products of float32 traced within are computed in float32; those of other dtypes are left alone.

    By default a TPU multiplies float32 in bfloat16 and a GPU from Ampere on in TensorFloat-32, of 10 bits.
    Sampler and trainer multiply in other shapes and sum in other orders, and products so coarse bring
    log-probs of one policy 1e-2 nats apart where float32 brings them 3e-5 (the lab's student on an H100):
    a gate would read that as drift. Whoever takes a gradient enters it too: a kernel with a backward pass of
    its own (splash) is turned back after the model's functions have returned. Who sets
    ``JAX_DEFAULT_MATMUL_PRECISION`` is obeyed.
    """
    asked = jax.default_matmul_precision.value  # of the environment, too
    if jnp.dtype(dtype) != jnp.float32 or asked is not None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = jax.default_matmul_precision("float32")
    return context
