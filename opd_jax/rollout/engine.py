"""What draws rollouts: the one interface of the JAX sampler and of inference servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from opd_jax.types import TokenIds


@dataclasses.dataclass(frozen=True)
class Request:
    """One rollout to draw."""

    prompt_ids: TokenIds
    problem: int  # 31-bit key of the problem
    sample: int  # which rollout of that problem, over the whole run
    max_response: int | None = None  # tokens, at most the engine's own limit, which holds where this is None
    seed: int | None = None  # of this request's draws; the engine's where it is None


@dataclasses.dataclass(frozen=True)
class Generated:
    """One rollout drawn."""

    ids: np.ndarray  # [R] int32, the end-of-text token included where one came
    logprobs: np.ndarray  # [R] float32, raw: before any truncation, at the engine's `logprob_temperature`
    truncated: bool  # the limit came before the end of text


class Engine(Protocol):
    """Draws responses with the policy that it was given."""

    @property
    def name(self) -> str:
        """What a store says its rollouts were drawn by."""
        ...

    @property
    def logprob_temperature(self) -> float:
        """That its log-probs are of; a server's are those of temperature 1."""
        ...

    def draw(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generated]]:
        """Yield ``(index of a request, what was drawn)`` for each, as they are finished, in any order."""
        ...


def in_order(drawn: Iterator[tuple[int, Generated]]) -> Iterator[Generated]:
    """What an engine drew in the order of the requests; what comes early waits for its turn."""
    waiting: dict[int, Generated] = {}
    following = 0
    for index, generated in drawn:
        waiting[index] = generated
        while following in waiting:
            yield waiting.pop(following)
            following += 1
