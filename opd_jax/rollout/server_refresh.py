"""New weights for servers between rounds, through a checkpoint folder, each change proved by a probe.

vLLM must run with ``VLLM_SERVER_DEV_MODE=1`` and see the folder under the same path. A folder that it
cannot read ends its engine, and one that lacks a tensor is answered by 200 and a wrong model: hence the
check of the folder before, and the probe after.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path

import numpy as np

from opd_jax.errors import InputError
from opd_jax.rollout.server import COMPLETIONS, choice_of, named, tokens_of
from opd_jax.rollout.server_post import Failure, Post, Refused
from opd_jax.rollout.server_score import score_call

PATIENCE = 5.0  # seconds for a paused server to hear that it is to go on, after something failed


@dataclasses.dataclass(frozen=True)
class Probe:
    """A text whose log-probs tell one policy from another."""

    text: list[int]  # P ids, at least two
    expected: np.ndarray  # [P - 1] log-probs of all but the first, by the trainer, at temperature 1
    tolerance: float  # nats, of the mean |difference|
    drawn: int = 16  # further tokens, drawn to compare a server with itself


async def refresh(url: str, post: Post, folder: Path, model: str, probe: Probe) -> None:
    """Load the weights of a folder into one server, and prove that it answers by them.

    Requests in flight are finished first, by the old weights, and caches emptied. Whatever comes, Ctrl-C
    and time limits too, the server is told to go on.

    Args:
      url, post: of the server, as `opd_jax.rollout.servers` gives them.
      folder: checkpoint folder, checked by the caller.
      model: the name that the policy is served by.
      probe: by the new weights.

    Raises:
      InputError: the server cannot be refreshed, or its log-probs are not those of the new weights.
      Failure: it broke off or was busy meanwhile.
    """
    try:
        await _pause(url, post)
        await _load(url, post, folder)
        await post("/resume", None)
    except (Exception, asyncio.CancelledError):
        await _let_go(post)
        raise
    await prove(url, post, model, probe)


async def _pause(url: str, post: Post) -> None:
    try:
        await post("/pause?mode=wait", None)
    except Refused as refused:
        raise InputError(
            f"a server must take new weights: {url} answered {refused.status} to /pause ({refused.reason}); "
            "start it with VLLM_SERVER_DEV_MODE=1"
        ) from None


async def _load(url: str, post: Post, folder: Path) -> None:
    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
    try:
        await post("/collective_rpc", reload)
    except (Refused, Failure) as error:
        # vLLM says 500 of a folder that it cannot read, and may die of it; else it is gone or busy.
        if isinstance(error, Failure) and error.status != 500:
            raise
        raise InputError(
            f"a server must take new weights: {url} could not load {folder.resolve()} ({error}); it must see "
            "that folder under the same path; then restart it"
        ) from None


async def _let_go(post: Post) -> None:
    """Tell a server to go on, if it hears."""
    with contextlib.suppress(InputError, Failure, TimeoutError):
        async with asyncio.timeout(PATIENCE):
            await post("/resume", None)


async def prove(url: str, post: Post, model: str, probe: Probe) -> None:
    """Compare a server's log-probs with the trainer's, and with themselves.

    Tokens are drawn after the probe's text, at another temperature and truncated, and then read as part
    of a prompt: both ways must give one log-prob, which they do not where a server reports log-probs
    after truncation or reads a cache of older weights.

    Raises:
      InputError: they differ by more than the tolerance.
    """
    draw = {
        "prompt": probe.text,
        "max_tokens": probe.drawn,
        "temperature": 2.0,
        "top_p": 0.9,
        "logprobs": 0,
        "return_token_ids": True,
        "seed": 0,
    }
    choice = choice_of(url, await post(COMPLETIONS, named(model, draw)), probe.text)
    ids, drawn = tokens_of(url, choice)
    text = [*probe.text, *ids.tolist()]
    call = score_call(model, text, 0, first=1, usable=0, vocabulary=0)
    told, _, _ = call.read(url, await post(call.path, call.body))
    known = len(probe.expected)
    _compare(
        url,
        told[:known],
        probe,
        "the trainer's",
        "serve the run's own student there, and see that "
        "nothing else changes its weights; engine.tolerance says what rounding may cost",
    )
    _compare(
        url,
        told[known:],
        dataclasses.replace(probe, expected=drawn),
        "its own for tokens that it drew",
        "start it with --logprobs-mode raw_logprobs, and restart it to empty its caches",
    )


def _compare(url: str, told: np.ndarray, probe: Probe, whose: str, remedy: str) -> None:
    difference = float(np.mean(np.abs(told - probe.expected))) if len(told) else 0.0
    if not difference <= probe.tolerance:
        raise InputError(
            f"a server must speak for the present weights: the log-probs of {url} on a probe differ from "
            f"{whose} by {difference:.2g} nats on average, {probe.tolerance:g} allowed; {remedy}"
        )
