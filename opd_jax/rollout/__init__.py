"""Rollouts: drawn, stored, scored, and laid out for training."""

from opd_jax.rollout.engine import Engine, Generated, Request
from opd_jax.rollout.jax_engine import make_sampler, sample
from opd_jax.rollout.rows import make_rows
from opd_jax.rollout.storage import break_lock
from opd_jax.rollout.store import Rollout, RolloutStore, Score

__all__ = [
    "Engine",
    "Generated",
    "Request",
    "Rollout",
    "RolloutStore",
    "Score",
    "break_lock",
    "make_rows",
    "make_sampler",
    "sample",
]
