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
from opd_jax.keys import derived_seed
from opd_jax.rollout.engine import Generated, Request
from opd_jax.rollout.servers import Call, Failure, Servers

COMPLETIONS = "/v1/completions"
NOTHING = -9999.0  # what OpenAI-compatible servers write for minus infinity and NaN
SLACK = 1e-3  # nats that rounding may lift a log-prob above 0


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

    name = "server"
    logprob_temperature = 1.0

    def draw(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generated]]:
        """Yield ``(index of a request, what was drawn)`` as they are finished.

        Raises:
          InputError: a prompt is empty or too long; a server refused, answered wrongly, or not at all.
            What was finished until then has been yielded.
        """
        for request in requests:
            if not 1 <= len(request.prompt_ids) <= self.max_prompt:
                raise InputError(
                    f"a prompt must have 1 to {self.max_prompt} tokens: one has {len(request.prompt_ids)}; "
                    "raise sampling.max_prompt or drop that problem"
                )
        return self.servers.run([self._call(request) for request in requests])

    def _call(self, request: Request) -> Call:
        prompt = np.asarray(request.prompt_ids).tolist()
        body = {
            "prompt": prompt,
            "temperature": self.temperature,
            "top_p": self.top_p,
            **({"top_k": self.top_k} if self.top_k else {}),
            "max_tokens": self.max_response,
            "logprobs": 0,
            "return_token_ids": True,
            "seed": derived_seed(self.seed, "sample", request.problem, request.sample),
            "stop_token_ids": list(self.ends),
            "logit_bias": {str(id_): -100 for id_ in (*self.banned, *range(self.usable, self.vocabulary))},
        }
        return Call(COMPLETIONS, named(self.model, body), functools.partial(self._read, prompt))

    def _read(self, prompt: list[int], url: str, answer: Any) -> Generated:
        choice = choice_of(url, answer, prompt)
        ids, logprobs = tokens_of(url, choice)
        finish = choice.get("finish_reason")
        if finish == "abort":
            raise Failure(f"{url} broke off a response")
        if not 1 <= len(ids) <= self.max_response:
            raise wrong(url, f"{len(ids)} tokens for a limit of {self.max_response}", "restart it")
        if ids.min() < 0 or ids.max() >= self.usable:
            raise wrong(
                url,
                f"id {ids.min() if ids.min() < 0 else ids.max()} where {self.usable} ids mean something",
                "serve the run's own student there",
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
        if not ended and len(ids) < self.max_response:
            raise wrong(
                url,
                f"a response cut off at {len(ids)} of {self.max_response} tokens",
                "raise its --max-model-len",
            )
        return Generated(ids, logprobs, truncated=not ended)


def named(model: str, body: dict[str, Any]) -> dict[str, Any]:
    """A request's body with the model's name, where it has one."""
    return {"model": model, **body} if model else body


def wrong(url: str, what: str, remedy: str) -> InputError:
    """The error for an answer that cannot be used."""
    return InputError(f"a server's answer must be one that can be trusted: {url} gave {what}; {remedy}")


def choice_of(url: str, answer: Any, prompt: list[int]) -> dict[str, Any]:
    """The one choice of an answer.

    Raises:
      InputError: there is not one, or it is one to another prompt.
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
      InputError: they are not there, not as many as each other, or not log-probs.
    """
    try:
        ids = np.asarray(choice["token_ids"], np.int32)
        logprobs = np.asarray(choice["logprobs"]["token_logprobs"], np.float32)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise wrong(url, "no token_ids or no token_logprobs", "use a server that returns both") from None
    if ids.ndim != 1 or ids.shape != logprobs.shape:
        raise wrong(url, f"{ids.size} tokens and {logprobs.size} log-probs", "restart it")
    check_logprobs(url, logprobs)
    return ids, logprobs


def check_logprobs(url: str, logprobs: np.ndarray) -> None:
    """Refuse NaN, infinity, what servers write in their place, and numbers above 0."""
    bad = ~((logprobs > NOTHING) & (logprobs <= SLACK))
    if bad.any():
        raise wrong(url, f"{logprobs[bad][0]} as a log-prob", "check the weights that it serves")
