"""Settings of the compiler, to be made before JAX is first used."""

from __future__ import annotations

import os


def sum_in_one_order() -> None:
    """Let a CPU add up the terms of a matrix product in one order, whatever the size of the product.

    XLA's fused kernels for CPUs choose the order by shape, and a step of decoding then differs from the
    same position in a whole row by rounding, which a trained model can turn into 1e-5 nats. Without
    them log-probs from cached decoding and from a whole row agree to the bit; sampling is slower by a
    third and training faster by a fifth. Other backends ignore the setting, and one that the user made
    is left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_cpu_experimental_ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_experimental_ynn_fusion_type=".strip()
