"""How the rollouts of a minibatch lie in rows: one in each, or packed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd_jax.config import Config
from opd_jax.rollout.rows import Packing, lengths_of, pack
from opd_jax.rollout.store import Rollout

SHAPES = 8  # numbers of rows that packed minibatches may have, so that as many programs are compiled


def layout(config: Config, chosen: np.ndarray, rollouts: Sequence[Rollout], width: int) -> Packing:
    """Rows of a minibatch: which rollouts of the round lie in them, and how many in each.

    With ``schedule.rows: packed`` the number of rows is what `pack` needs, rounded up to one of at most
    `SHAPES` numbers that split over micro-batches and devices; the last rows may be empty.

    Args:
      config: schedule and mesh.
      chosen: indices of the minibatch's rollouts.
      rollouts: of the whole round.
      width: T.
    """
    if config.schedule.rows == "padded":
        return Packing(chosen, np.ones(len(chosen), int))
    members = [rollouts[index] for index in chosen]
    lengths = lengths_of([r.prompt_ids for r in members], [r.response_ids for r in members])
    mesh = config.mesh
    unit = config.schedule.microbatches * mesh.data * mesh.fsdp * mesh.expert
    step = unit * -(-len(chosen) // (SHAPES * unit))
    needed = len(pack(lengths, width).counts)
    order, counts = pack(lengths, width, min(-(-needed // step) * step, len(chosen)))
    return Packing(chosen[order], counts)


def parts_of(whole: Packing, count: int) -> list[Packing]:
    """The micro-batches of a minibatch, as the step splits its rows: rows a, a + count, ... are part a."""
    rows = np.split(whole.order, np.cumsum(whole.counts)[:-1])
    return [
        Packing(np.concatenate(rows[part::count]).astype(int), whole.counts[part::count])
        for part in range(count)
    ]
