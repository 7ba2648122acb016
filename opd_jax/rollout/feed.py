"""Rollouts from disk in shuffled packed batches, of a store that is larger than memory.

The order is a function of the seed alone, and a position in it is a few numbers: saved beside a training
state, it lets a feed go on with the very next batch.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from opd_jax.errors import InputError
from opd_jax.keys import derived_seed
from opd_jax.rollout.rows import Packing, pack
from opd_jax.rollout.source import RolloutSource

Put = Callable[[Any, int], Packing]  # of lengths and a width


class Fed(NamedTuple):
    """One batch, and what lies in it."""

    numbers: np.ndarray  # [n] int: rollouts of the source, row by row from left to right
    counts: np.ndarray  # [B] int: how many of them each row holds
    width: int  # T
    batch: Any  # what was made of them


class _Pile(NamedTuple):
    """A host's part of a batch before it is read."""

    numbers: list[int]
    counts: np.ndarray
    width: int
    like: int  # a rollout of the whole batch, which any part has the shapes of


def packed_batches(
    source: RolloutSource,
    make: Callable[..., Any],
    *,
    seed: int,
    rows: int,
    widths: Sequence[int],
    window: int = 512,
    epochs: int | None = None,
    host: int = 0,
    hosts: int = 1,
    threads: int = 2,
    put: Put = pack,
) -> grain.IterDataset:
    """All rollouts of a source in shuffled batches of packed rows.

    Every epoch has an order of its own. Rollouts are packed within windows of that order, each into rows of
    the narrowest width that holds it, and the batches of a window come shuffled. The last rows of a window
    may be empty. A window is numbers and lengths: of the rollouts themselves only those of one batch are in
    memory.

    Several hosts read together what one host would read that has as many times the rows and the window:
    each plans the windows of all, which takes lengths alone, and reads every ``hosts``-th row of a batch. So
    their batches have one shape at every step and end together. A host that gets none of the rows of a
    window's last batch of a width has zeros for it, as in other empty rows.

    The iterator's ``get_state`` is a JSON value, the same on every host; ``set_state`` with it, in another
    process too, goes on with the batch that would have come next. Give the dataset to
    `grain.experimental.ThreadPrefetchIterDataset` to make batches beside what uses them.

    Args:
      source: of the rollouts; the same for every host.
      make: ``make(rollouts, width, counts=counts)``, a tree of arrays, for example
        `opd_jax.rollout.score.batch_of`, or `rows_of` for rollouts without scores.
      seed: of the order.
      rows: B of a host's batch of the widest rows; one of narrower rows has as many more as fit in its place.
      widths: T, one program each for what uses the batches.
      window: rollouts that are packed together, for each host.
      epochs: passes over the source; endless by default.
      host, hosts: which part of every batch is read: `jax.process_index` of `jax.process_count`.
      threads: that read the rollouts of a batch; 0 for none.
      put: which rollouts share a row; `opd_jax.rollout.rows.one_each` where none may.

    Returns:
      A `grain.IterDataset` of `Fed`.

    Raises:
      InputError: there is nothing to read, or a size is not positive; later, a rollout is longer than the
        widest rows, a shard was changed or cannot be read, or a state is of another feed, or none.
    """
    if not 0 <= host < hosts or len(source) < hosts:
        raise InputError(
            f"every host must have rollouts to read: host {host} of {hosts}, {len(source)} rollouts; count "
            "hosts from 0, and name shards that hold rollouts"
        )
    if not widths or min(rows, window, *widths) < 1:
        raise InputError(
            f"rows, window and one or more widths must be positive: got rows {rows}, window {window}, "
            f"widths {list(widths)}; give positive numbers"
        )
    widths, window = sorted(widths), window * hosts
    about = {
        "seed": seed,
        "shards": _digest(source),
        "hosts": hosts,
        "rows": rows,
        "widths": widths,
        "window": window,
        "put": put.__name__,
    }

    def piles(index: int, numbers: np.ndarray) -> list[_Pile]:
        order = np.random.default_rng(derived_seed(seed, "window", index))
        return _piles(source, [int(n) for n in numbers], rows, widths, put, order, host, hosts)

    order = grain.MapDataset.range(len(source)).shuffle(seed=derived_seed(seed, "feed"))
    windows = order.repeat(epochs).batch(window, batch_fn=np.asarray).map_with_index(piles)
    here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return _Feed(windows.to_iter_dataset(here), source, make, threads, about)


def _piles(
    source: RolloutSource,
    numbers: list[int],
    rows: int,
    widths: list[int],
    put: Put,
    order: np.random.Generator,
    host: int,
    hosts: int,
) -> list[_Pile]:
    """A host's part of the batches of a window, which all hosts plan alike."""
    lengths = np.array([source.length(number) for number in numbers])
    bucket = np.searchsorted(widths, lengths)
    for index in np.flatnonzero(bucket == len(widths)):
        raise InputError(
            f"a rollout must fit in a row: rollout {numbers[index]} takes {lengths[index]} positions, the "
            f"widest rows have {widths[-1]}; add a width"
        )
    found = []
    for width in widths:
        members = np.flatnonzero(bucket == widths.index(width))
        packing = put(lengths[members], width)
        held = np.split(members[packing.order], np.cumsum(packing.counts)[:-1])
        held = [held[row] for row in order.permutation(len(held))] if len(members) else []
        count = rows * (widths[-1] // width)
        for at in range(0, len(held), count * hosts):
            batch = held[at : at + count * hosts]
            part = batch[host::hosts]
            counts = [len(row) for row in part] + [0] * (count - len(part))
            inside = [numbers[i] for row in part for i in row]
            found.append(_Pile(inside, np.array(counts), width, numbers[batch[0][0]]))
    return [found[index] for index in order.permutation(len(found))]


def _digest(source: RolloutSource) -> str:
    shards = json.dumps([[shard["sha256"], shard["rows"]] for shard in source.shards])
    return hashlib.sha256(shards.encode()).hexdigest()[:16]


class _Feed(grain.IterDataset):
    """Batches out of windows, one at a time."""

    def __init__(
        self,
        windows: grain.IterDataset,
        source: RolloutSource,
        make: Callable[..., Any],
        threads: int,
        about: dict[str, Any],
    ) -> None:
        super().__init__(windows)
        self._given = source, make, threads, about

    def __iter__(self) -> grain.DatasetIterator:
        return _FeedIterator(iter(self._parent), *self._given)


class _FeedIterator(grain.DatasetIterator):
    def __init__(
        self,
        windows: Any,
        source: RolloutSource,
        make: Callable[..., Any],
        threads: int,
        about: dict[str, Any],
    ) -> None:
        super().__init__(windows)
        self._source, self._make, self._about = source, make, about
        self._map: Callable[..., Any] = ThreadPoolExecutor(threads).map if threads else map
        self._window, self._done = self._parent.get_state(), 0  # state before the window; its batches done
        self._piles: list[_Pile] = []

    def __next__(self) -> Fed:
        while self._done == len(self._piles):
            before = self._parent.get_state()
            self._piles = next(self._parent)
            self._window, self._done = before, 0
        pile = self._piles[self._done]
        batch = self._made(pile)
        self._done += 1  # what could not be read is still to come
        return Fed(np.array(pile.numbers, int), pile.counts, pile.width, batch)

    def _made(self, pile: _Pile) -> Any:
        if pile.numbers:
            rollouts = list(self._map(self._source.__getitem__, pile.numbers))
            return self._make(rollouts, pile.width, counts=pile.counts)
        # How many columns there are, and how deep, is read off a rollout that another host has.
        alone = np.eye(1, len(pile.counts), dtype=int)[0]
        like = self._make([self._source[pile.like]], pile.width, counts=alone)
        return jax.tree.map(np.zeros_like, like)

    def get_state(self) -> dict[str, Any]:
        return {"window": self._window, "batches": self._done, "of": self._about}

    def set_state(self, state: dict[str, Any]) -> None:
        try:
            of, batches = dict(state["of"]), operator.index(state["batches"])
            window = {name: operator.index(value) for name, value in dict(state["window"]).items()}
        except (KeyError, TypeError, ValueError):
            raise _no_position(state) from None
        for name, value in self._about.items():
            saved = of.get(name)
            if saved != value:
                raise InputError(
                    f"a position is one of the feed it was saved in: its {name} was {saved!r}, here it is "
                    f"{value!r}; feed as before, or begin anew"
                )
        try:
            self._parent.set_state(window)
        except (IndexError, KeyError, TypeError):
            raise _no_position(state) from None
        piles: list[_Pile] = next(self._parent, []) if batches else []
        if not 0 <= batches <= len(piles):
            raise _no_position(state)
        self._window, self._done, self._piles = window, batches, piles


def _no_position(state: Any) -> InputError:
    told = json.dumps(state, default=repr)
    return InputError(
        f"a position is what get_state of a feed has told: {told[:200]} is none; give that, or begin anew"
    )
