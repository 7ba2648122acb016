"""Scores from OpenAI-compatible HTTP servers: what a model says of given tokens, at temperature 1.

vLLM answers a request for ``prompt_logprobs`` with the likeliest ids at every position of the prompt and
the token that stands there. The entropy of the whole distribution is not to be had, nor, but from GPU
builds, the log-probs of given ids.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from opd_jax.errors import InputError
from opd_jax.model.vocab import TopK
from opd_jax.rollout.server import COMPLETIONS, check_logprobs, choice_of, named, wrong
from opd_jax.rollout.servers import Call, Refused, Servers
from opd_jax.types import Rows

_CAP = re.compile(r"max allowed: (\d+)")


def teacher_topk(servers: Servers, model: str, rows: Rows, k: int, *, usable: int) -> TopK:
    """The ``k`` likeliest ids at every position of the mask, beside the target, as servers see them.

    Args:
      servers: that serve the teacher.
      model: the name that they serve it by; empty where they serve but one.
      rows: ``[B, T]``, a sequence a row.
      k: K.
      usable: ids from here on are vocabulary padding.

    Returns:
      `opd_jax.model.vocab.TopK`, zero off the mask, without entropy.

    Raises:
      InputError: a server allows fewer ids than ``k``, refused, answered wrongly, or not at all.
    """
    shape = rows.mask.shape
    sampled, ids = np.zeros(shape, np.float32), np.zeros((*shape, k), np.int32)
    logprobs = np.zeros((*shape, k), np.float32)
    calls = []
    for row in range(shape[0]):
        length = int(np.sum(rows.sequence_ids[row] > 0))
        text = [int(rows.tokens[row, 0]), *np.asarray(rows.targets[row, :length]).tolist()]
        first = int(np.argmax(rows.mask[row])) + 1  # the response's first token, of the text
        calls.append(score_call(model, text, k, first=first, usable=usable))
    try:
        for row, found in servers.run(calls):
            on = rows.mask[row]
            sampled[row, on], ids[row, on], logprobs[row, on] = found
    except Refused as refused:
        cap = _CAP.search(refused.reason)
        if not cap:
            raise
        raise InputError(
            f"a server gives as many log-probs as its --max-logprobs allows: {refused.url} allows {cap[1]}, "
            f"loss.top_k asks for {k}; start it with --max-logprobs {k}, or lower loss.top_k"
        ) from None
    return TopK(jnp.asarray(sampled), jnp.asarray(ids), jnp.asarray(logprobs), None)


def score_call(model: str, text: list[int], k: int, *, first: int, usable: int) -> Call:
    """The request for what a model says of ``text[first:]``, its R last tokens.

    It reads as log-probs ``[R]``, likeliest ids ``[R, K]`` and theirs ``[R, K]``.
    """
    body = {
        "prompt": text,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": k,
        "return_token_ids": True,
    }
    read = functools.partial(_read, text, k, first, usable)
    return Call(COMPLETIONS, named(model, body), read)


def _read(
    text: list[int], k: int, first: int, usable: int, url: str, answer: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    told = choice_of(url, answer, text).get("prompt_logprobs")
    if not isinstance(told, list) or len(told) != len(text):
        count = len(told) if isinstance(told, list) else "no"
        raise wrong(url, f"{count} prompt_logprobs for {len(text)} tokens", "use a server that gives them")
    sampled, likeliest = [], []
    for position in range(first, len(text)):
        try:
            here = {int(id_): float(entry["logprob"]) for id_, entry in told[position].items()}
            sampled.append(here[text[position]])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise wrong(
                url, f"no log-prob of the token at {position}", "use a server that gives it"
            ) from None
        likeliest.append(sorted(here.items(), key=lambda one: (-one[1], one[0]))[:k])
        if len(likeliest[-1]) < k:
            raise wrong(url, f"{len(here)} of {k} likeliest ids", "raise its --max-logprobs")
    best = np.asarray(likeliest, np.float64).reshape(len(sampled), k, 2)
    ids, logprobs = best[..., 0].astype(np.int32), best[..., 1].astype(np.float32)
    check_logprobs(url, np.append(logprobs, sampled))
    if k and (ids.min() < 0 or ids.max() >= usable):
        raise wrong(
            url,
            f"id {ids.max()} among the {k} likeliest where {usable} ids mean something",
            "lower loss.top_k, or drop engine.teacher_urls and score the teacher here",
        )
    return np.asarray(sampled, np.float32), ids, logprobs
