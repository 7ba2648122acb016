"""Rollouts: drawn, stored, scored, and laid out for training."""

from opd_jax.rollout.jax_engine import Generated, Request, make_sampler, sample
from opd_jax.rollout.rows import make_rows
from opd_jax.rollout.store import Rollout, RolloutStore, Score

__all__ = [
    "Generated",
    "Request",
    "Rollout",
    "RolloutStore",
    "Score",
    "make_rows",
    "make_sampler",
    "sample",
]
