"""Drift-gated on-policy distillation of language models in JAX.

Start at `opd_jax.method.objective`, which is the paper (arXiv 2606.24084) on one page, and at
`opd_jax.train.loop`, which is the road of a round.
"""
