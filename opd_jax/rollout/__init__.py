"""Rollouts: drawn, stored, scored, and laid out for training."""

from opd_jax.rollout.engine import Engine, Generated, Request, in_order
from opd_jax.rollout.jax_engine import JaxEngine, sample
from opd_jax.rollout.objects import break_lock
from opd_jax.rollout.rows import make_rows
from opd_jax.rollout.slots import make_sampler
from opd_jax.rollout.stops import stop_finder
from opd_jax.rollout.store import Rollout, RolloutStore, Score

__all__ = [
    "Engine",
    "Generated",
    "JaxEngine",
    "Request",
    "Rollout",
    "RolloutStore",
    "Score",
    "break_lock",
    "in_order",
    "make_rows",
    "make_sampler",
    "sample",
    "stop_finder",
]
