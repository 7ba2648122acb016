"""The JAX sampler as an engine: a fixed number of slots, refilled as rollouts finish.

Rollouts are decoded together in compiled programs of fixed shapes (`opd_jax.rollout.slots`). No row sees
another, and its random keys come from (seed, problem, sample, position), so a rollout's tokens do not
depend on what shares the slots with it, nor on the order in which slots are refilled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted, Stop, never
from opd_jax.keys import stream
from opd_jax.rollout.engine import Generated, Request, in_order
from opd_jax.rollout.slots import Group, Sampler
from opd_jax.rollout.stops import FindStop
from opd_jax.types import Params

Array = jax.Array

# Between looks of the host: what is finished is handed over, and strings that end a response are found.
STEPS = 64


class JaxEngine:
    """Draws rollouts with parameters that lie on the devices.

    Args:
      sampler: from `make_sampler`.
      params: of the model that acts.
      root: key of the stream, see `opd_jax.keys.stream`.
      find_stop: from `stop_finder`, where strings end a response too.
      stop: asked while it draws.
    """

    name = "jax"

    def __init__(
        self,
        sampler: Sampler,
        params: Params,
        root: Array,
        *,
        find_stop: FindStop | None = None,
        stop: Stop = never,
    ) -> None:
        self.sampler, self.params, self.find_stop, self.stop = sampler, params, find_stop, stop
        self.root = np.asarray(jax.random.key_data(root))
        self.logprob_temperature = sampler.temperature or 1.0

    def draw(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generated]]:
        """Yield ``(index of a request, what was drawn)`` for each, as they are finished.

        A response ends with a stop id, with the token that completes a stop string, or at its limit; only
        the last counts as truncated.

        Raises:
          InputError: a prompt is empty or longer than the sampler's, or a limit is out of range.
          Interrupted: ``stop`` turned true. What was finished until then has been yielded.
        """
        sampler = self.sampler
        self._check(requests)
        waiting = list(range(len(requests)))[::-1]
        inside: dict[int, int] = {}  # slot -> request
        drawn: dict[int, int] = {}  # slot -> response tokens, in which no stop string ends
        finished: list[tuple[int, Generated]] = []
        if not requests:
            return
        state = sampler.begin()
        while waiting or inside:
            while waiting and sampler.slots - len(inside) >= min(sampler.refill, len(waiting)):
                group = self._group(requests, waiting, inside)
                state = sampler.fill(self.params, state, group)
            enough = min(sampler.refill, len(waiting)) if waiting else sampler.slots
            empty = np.array([slot not in inside for slot in range(sampler.slots)])
            ends = (len(requests[index].prompt_ids) + drawn.get(slot, 0) for slot, index in inside.items())
            blocks = sampler.blocks(max(ends) + STEPS - 1)
            until = np.int32(STEPS), np.int32(enough)
            state, told = sampler.advance(self.params, state, empty, *until, blocks)
            yield from finished  # while the devices are at work
            progress = jax.device_get(told)
            finished = []
            for slot in list(inside):
                length, done = int(progress.drawn[slot]), bool(progress.done[slot])
                before, cut = drawn.pop(slot, 0), None
                if self.find_stop:
                    cut = self.find_stop(progress.tokens[slot, :length], before)
                if cut is None and not done:
                    drawn[slot] = length
                    continue
                ids = progress.tokens[slot, : cut or length].copy()
                logprobs = progress.logprobs[slot, : cut or length].copy()
                truncated = cut is None and int(ids[-1]) not in sampler.stop_ids
                finished.append((inside.pop(slot), Generated(ids, logprobs, truncated)))
            if self.stop():
                yield from finished
                raise Interrupted
        yield from finished

    def _check(self, requests: Sequence[Request]) -> None:
        most = self.sampler.max_prompt
        for request in requests:
            if not 1 <= len(request.prompt_ids) <= most:
                raise InputError(
                    f"a prompt must have 1 to {most} tokens: one has {len(request.prompt_ids)}; "
                    "raise sampling.max_prompt or drop that problem"
                )
            limit = self._limit(request)
            if not 1 <= limit <= self.sampler.max_response:
                raise InputError(
                    f"a response's limit must be 1 to {self.sampler.max_response} tokens: one is {limit}; "
                    "raise sampling.max_response or lower that limit"
                )

    def _limit(self, request: Request) -> int:
        return self.sampler.max_response if request.max_response is None else request.max_response

    def _group(self, requests: Sequence[Request], waiting: list[int], inside: dict[int, int]) -> Group:
        """The next prompts for free slots, taken off ``waiting`` and noted in ``inside``."""
        sampler, size, ways = self.sampler, self.sampler.group, self.sampler.ways
        share, each = size // ways, sampler.slots // ways
        group = Group(
            prompts=np.zeros((size, sampler.max_prompt), np.int32),
            slots=np.full(size, each, np.int32),
            lengths=np.ones(size, np.int32),
            limits=np.ones(size, np.int32),
            problems=np.zeros(size, np.int32),
            samples=np.zeros(size, np.int32),
            roots=np.zeros((size, *self.root.shape), self.root.dtype),
        )
        for way in range(ways):
            free = [slot for slot in range(each) if way * each + slot not in inside]
            for place, slot in zip(range(way * share, (way + 1) * share), free, strict=False):
                if not waiting:
                    break
                inside[way * each + slot] = waiting[-1]
                request = requests[waiting.pop()]
                length = len(request.prompt_ids)
                group.prompts[place, :length] = request.prompt_ids
                group.slots[place], group.lengths[place] = slot, length
                group.limits[place] = self._limit(request)
                group.problems[place], group.samples[place] = request.problem, request.sample
                group.roots[place] = self._root(request)
        return group

    def _root(self, request: Request) -> np.ndarray:
        if request.seed is None:
            return self.root
        return np.asarray(jax.random.key_data(stream(request.seed, "request")))


def sample(sampler: Sampler, params: Params, requests: Sequence[Request], root: Array) -> Iterator[Generated]:
    """What `JaxEngine` draws, in the order of the requests."""
    return in_order(JaxEngine(sampler, params, root).draw(requests))
