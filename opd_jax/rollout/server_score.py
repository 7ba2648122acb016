"""Scores from OpenAI-compatible HTTP servers: what a model says of given tokens, at temperature 1.

vLLM answers a request for ``prompt_logprobs`` with the likeliest ids at every position of the prompt and
the token that stands there. The entropy of the whole distribution is not to be had, nor, but from GPU
builds, the log-probs of given ids.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from opd_jax.errors import InputError
from opd_jax.interrupt import Stop, never
from opd_jax.rollout.server import COMPLETIONS, check_logprobs, choice_of, named, wrong
from opd_jax.rollout.server_post import Refused
from opd_jax.rollout.servers import Call, Servers
from opd_jax.types import Rows

MOST = 1.01  # probability that ids may have together, where a server rounds theirs
# Log-probs [R] of a row's targets, likeliest ids [R, K] and theirs [R, K], over the R tokens of its mask.
Told = tuple[np.ndarray, np.ndarray, np.ndarray]
_CAP = re.compile(r"max allowed: (\d+)")


def teacher_rows(
    servers: Servers,
    model: str,
    rows: Rows,
    k: int,
    *,
    usable: int,
    vocabulary: int,
    stop: Stop = never,
) -> Iterator[tuple[int, Told]]:
    """Yield ``(row, what servers say of its mask)`` as rows are finished, in any order.

    Where vocabulary padding is among the likeliest, which a server cannot be told to leave out, so many
    more are asked for. Closing breaks off what is in flight.

    Args:
      servers: that serve the teacher.
      model: the name that they serve it by; empty where they serve but one.
      rows: ``[B, T]``, a sequence a row.
      k: K.
      usable: ids from here on are vocabulary padding.
      vocabulary: ids that the teacher has logits for.
      stop: asked while requests are in flight.

    Raises:
      InputError: a server allows fewer ids than needed, refused, answered wrongly, or not at all.
      Interrupted: ``stop`` turned true.
    """
    left = list(range(len(rows.mask)))
    for asked in (k, k + max(0, vocabulary - usable)):
        calls = [_row_call(model, rows, row, k, asked, usable, vocabulary) for row in left]
        short = []
        for index, found in _within_cap(servers, calls, k, asked, stop):
            if found is None:
                short.append(left[index])
            else:
                yield left[index], found
        left = sorted(short)


def _row_call(model: str, rows: Rows, row: int, k: int, asked: int, usable: int, vocabulary: int) -> Call:
    length = int(np.sum(rows.sequence_ids[row] > 0))
    text = [int(rows.tokens[row, 0]), *np.asarray(rows.targets[row, :length]).tolist()]
    first = int(np.argmax(rows.mask[row])) + 1  # the response's first token, of the text
    return score_call(model, text, k, first=first, usable=usable, vocabulary=vocabulary, asked=asked)


def _within_cap(
    servers: Servers, calls: list[Call], k: int, asked: int, stop: Stop
) -> Iterator[tuple[int, Told | None]]:
    try:
        yield from servers.run(calls, stop)
    except Refused as refused:
        cap = _CAP.search(refused.reason)
        if not cap:
            raise
        padding = f" and {asked - k} ids of vocabulary padding" if asked > k else ""
        raise InputError(
            f"a server gives as many log-probs as its --max-logprobs allows: {refused.url} allows {cap[1]}, "
            f"loss.top_k asks for {k}{padding}; start it with --max-logprobs {asked}, or lower loss.top_k"
        ) from None


def score_call(
    model: str,
    text: list[int],
    k: int,
    *,
    first: int,
    usable: int,
    vocabulary: int,
    asked: int | None = None,
) -> Call:
    """The request for what a model says of ``text[first:]``, its R last tokens.

    It reads as log-probs ``[R]``, likeliest ids ``[R, K]`` and theirs ``[R, K]``; as None where fewer than
    K of the ``asked`` likeliest are usable.
    """
    asked = k if asked is None else asked
    body = {
        "prompt": text,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": asked,
        "return_token_ids": True,
    }
    read = functools.partial(_read, text, k, asked, first, usable, vocabulary)
    return Call(COMPLETIONS, named(model, body), read)


def _read(
    text: list[int],
    k: int,
    asked: int,
    first: int,
    usable: int,
    vocabulary: int,
    url: str,
    answer: Any,
) -> Told | None:
    told = choice_of(url, answer, text).get("prompt_logprobs")
    if not isinstance(told, list) or len(told) != len(text):
        count = len(told) if isinstance(told, list) else "no"
        raise wrong(url, f"{count} prompt_logprobs for {len(text)} tokens", "use a server that gives them")
    sampled, likeliest = [], []
    for position in range(first, len(text)):
        try:
            here = {int(id_): float(entry["logprob"]) for id_, entry in told[position].items()}
            sampled.append(here[text[position]])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            raise wrong(
                url, f"no log-prob of the token at {position}", "use a server that gives it"
            ) from None
        logprobs = np.fromiter(here.values(), np.float32)
        check_logprobs(url, logprobs)
        if (mass := float(np.exp(logprobs).sum())) > MOST:
            raise wrong(url, f"ids of {mass:.3g} in probability together", "check the weights that it serves")
        # The token itself is there even where it is none of the likeliest.
        best = sorted(here.items(), key=lambda one: (-one[1], one[0]))[:asked]
        if len(best) < asked:
            raise wrong(url, f"{len(best)} of {asked} likeliest ids", "raise its --max-logprobs")
        if outside := [id_ for id_, _ in best if not 0 <= id_ < vocabulary]:
            raise wrong(url, f"id {outside[0]} where there are {vocabulary}", "serve the run's teacher there")
        likeliest.append([one for one in best if one[0] < usable][:k])
    if any(len(best) < k for best in likeliest):
        return None
    pairs = np.asarray(likeliest, np.float64).reshape(len(sampled), k, 2)
    return np.asarray(sampled, np.float32), pairs[..., 0].astype(np.int32), pairs[..., 1].astype(np.float32)
