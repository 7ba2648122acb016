"""Rollouts from OpenAI-compatible HTTP servers, vLLM first: token ids in, token ids and log-probs out.

A server's log-probs are those of temperature 1 and come before truncation (vLLM's ``raw_logprobs``),
whatever temperature the tokens were drawn at. Every rollout is a request of its own with a seed of its
own, from (seed, problem, sample), so that drawing can go on at the prompt where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from opd_jax.errors import InputError
from opd_jax.interrupt import Stop, never
from opd_jax.keys import derived_seed
from opd_jax.rollout.engine import Generated, Request
from opd_jax.rollout.server_post import Failure, Wrong
from opd_jax.rollout.servers import Call, Servers

COMPLETIONS = "/v1/completions"
NOTHING = -9999.0  # what OpenAI-compatible servers write for minus infinity and NaN
SLACK = 1e-3  # nats that rounding may lift a log-prob above 0
# Less than any token has that was drawn at a temperature up to 1; in proportion above. In float32 exp(-104)
# is 0 and never drawn, and a ban takes 100 off an id that is likelier.
LEAST = -1000.0
# What a server's own defaults may hold, a model's generation config among them, at values that do nothing.
NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "watermarking": False,
}


@dataclasses.dataclass(frozen=True)
class ServerEngine:
    """An `Engine` that asks servers."""

    servers: Servers
    model: str  # the name that they serve the policy by; empty where they serve but one
    seed: int
    temperature: float
    top_p: float
    max_prompt: int  # tokens
    max_response: int
    ends: tuple[int, ...]  # ids that end a response
    usable: int  # ids from here on are vocabulary padding and never drawn
    vocabulary: int  # ids that the model has logits for
    top_k: int = 0  # 0 for all
    banned: tuple[int, ...] = ()  # ids that are never drawn, beside the padding
    stop: Stop = never  # asked while requests are in flight

    name = "server"
    logprob_temperature = 1.0

    def draw(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generated]]:
        """Yield ``(index of a request, what was drawn)`` as they are finished.

        Closing breaks off what is in flight.

        Raises:
          InputError: a prompt is empty or too long, or a limit is out of range; a server refused, answered
            wrongly, or not at all. What was finished until then has been yielded.
          Interrupted: ``stop`` turned true. What was finished until then has been yielded.
        """
        for request in requests:
            if not 1 <= len(request.prompt_ids) <= self.max_prompt:
                raise InputError(
                    f"a prompt must have 1 to {self.max_prompt} tokens: one has {len(request.prompt_ids)}; "
                    "raise sampling.max_prompt or drop that problem"
                )
            if not 1 <= self._limit(request) <= self.max_response:
                raise InputError(
                    f"a response's limit must be 1 to {self.max_response} tokens: one is "
                    f"{self._limit(request)}; raise sampling.max_response or lower that limit"
                )
        return self.servers.run([self._call(request) for request in requests], self.stop)

    def _limit(self, request: Request) -> int:
        return self.max_response if request.max_response is None else request.max_response

    def _seed(self, request: Request) -> int:
        root = (self.seed, "sample") if request.seed is None else (request.seed, "request")
        return derived_seed(*root, request.problem, request.sample)

    def _call(self, request: Request) -> Call:
        prompt, limit = np.asarray(request.prompt_ids).tolist(), self._limit(request)
        body = {
            "prompt": prompt,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or -1,  # which vLLM of any version takes for all
            **NEUTRAL,
            "max_tokens": limit,
            "logprobs": 0,
            "return_token_ids": True,
            "seed": self._seed(request),
            "stop_token_ids": list(self.ends),
            "logit_bias": {str(id_): -100 for id_ in (*self.banned, *range(self.usable, self.vocabulary))},
        }
        return Call(COMPLETIONS, named(self.model, body), functools.partial(self._read, prompt, limit))

    def _read(self, prompt: list[int], limit: int, url: str, answer: Any) -> Generated:
        choice = choice_of(url, answer, prompt)
        ids, logprobs = tokens_of(url, choice)
        finish = choice.get("finish_reason")
        if finish == "abort":
            raise Failure(f"{url} broke off a response")
        if not 1 <= len(ids) <= limit:
            raise wrong(url, f"{len(ids)} tokens for a limit of {limit}", "restart it")
        if ids.min() < 0 or ids.max() >= self.usable:
            raise wrong(
                url,
                f"id {ids.min() if ids.min() < 0 else ids.max()} where {self.usable} ids mean something",
                "serve the run's own student there",
            )
        if (banned := ids[np.isin(ids, self.banned)]).size:
            raise wrong(
                url,
                f"id {banned[0]}, which it was told never to draw",
                "use a server that keeps to logit_bias",
            )
        if (least := logprobs.min()) < LEAST * max(1.0, self.temperature):
            raise wrong(
                url,
                f"{least} as the log-prob of a token that it drew at temperature {self.temperature:g}",
                "check the weights that it serves",
            )
        ended = bool(np.isin(ids[-1], self.ends))
        if (
            finish not in ("stop", "length")
            or (finish == "stop") != ended
            or np.isin(ids[:-1], self.ends).any()
        ):
            raise wrong(
                url,
                f"finish_reason {finish!r} with a response whose last id is {ids[-1]}, where "
                f"{list(self.ends)} end one",
                "start it with --generation-config vllm",
            )
        if not ended and len(ids) < limit:
            raise wrong(
                url,
                f"a response cut off at {len(ids)} of {limit} tokens",
                "raise its --max-model-len",
            )
        return Generated(ids, logprobs, truncated=not ended)


def named(model: str, body: dict[str, Any]) -> dict[str, Any]:
    """A request's body with the model's name, where it has one."""
    return {"model": model, **body} if model else body


def wrong(url: str, what: str, remedy: str) -> Wrong:
    """The error for an answer that cannot be used."""
    return Wrong(f"a server's answer must be one that can be trusted: {url} gave {what}; {remedy}")


def choice_of(url: str, answer: Any, prompt: list[int]) -> dict[str, Any]:
    """The one choice of an answer.

    Raises:
      Wrong: there is not one, or it is one to another prompt.
    """
    try:
        [choice] = answer["choices"]
        echo = choice["prompt_token_ids"]
    except (KeyError, TypeError, ValueError):
        raise wrong(url, "no choice with prompt_token_ids", "use a server that returns token ids") from None
    if echo != prompt:
        raise wrong(url, "an answer to another prompt", "look for a proxy or a tokenizer between")
    return choice


def tokens_of(url: str, choice: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ids ``[R]`` int32 and log-probs ``[R]`` float32 of what was generated.

    Raises:
      Wrong: they are not there, not as many as each other, or no ids and no log-probs.
    """
    try:
        told = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        ids, logprobs = np.asarray(told[0], np.int32), np.asarray(told[1], np.float32)
        # numpy makes an id of 1.9 and of "1", and a log-prob of "-0.1"; null is NaN to it.
        odd = {type(one) for one in told[0]} - {int} | {type(one) for one in told[1]} & {str, bool}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise wrong(url, "no token_ids or no token_logprobs", "use a server that returns both") from None
    if odd:
        names = ", ".join(sorted(kind.__name__ for kind in odd))
        raise wrong(url, f"token_ids or token_logprobs that are no numbers ({names})", "restart it")
    if ids.ndim != 1 or ids.shape != logprobs.shape:
        raise wrong(url, f"{ids.size} tokens and {logprobs.size} log-probs", "restart it")
    check_logprobs(url, logprobs)
    return ids, logprobs


def check_logprobs(url: str, logprobs: np.ndarray) -> None:
    """Refuse NaN, infinity, what servers write in their place, and numbers above 0."""
    bad = ~((logprobs > NOTHING) & (logprobs <= SLACK))
    if bad.any():
        raise wrong(url, f"{logprobs[bad][0]} as a log-prob", "check the weights that it serves")
