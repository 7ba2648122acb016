"""Responses that end at a string: found on the host, between steps, in the text itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from opd_jax.errors import InputError

# (ids [R] of a response so far, how many of them were looked at before) -> length at which it ends, if any
FindStop = Callable[[np.ndarray, int], int | None]


def stop_finder(stop: Sequence[str], text: Callable[[np.ndarray], str]) -> FindStop:
    """What finds the token that completes one of the strings: the first at which the text contains it.

    Looked for in text, not in token ids, because a string may be spelt by tokens in many ways, may begin
    in the middle of one, and may end in the middle of another. Text is taken to grow with its tokens.

    Args:
      stop: the strings.
      text: of token ids ``[R]``, for example by `opd_jax.tasks.decode_response`.

    Raises:
      InputError: a string is empty.
    """
    if not all(stop):
        raise InputError(f"a stop string must have a character: got {list(stop)}; drop the empty one")
    longest = max(map(len, stop), default=0)

    def find(ids: np.ndarray, before: int) -> int | None:
        # As much of what was looked at before as a string may have begun in. Three more characters, because
        # a cut through the bytes of one decodes to as many that are not there.
        start = before
        while start and len(text(ids[start:before])) < longest + 3:
            start = max(0, start - longest)
        whole = text(ids[start:])
        if not any(string in whole for string in stop):
            return None
        for length in range(before + 1, len(ids)):
            part = text(ids[start:length])
            if any(string in part for string in stop):
                return length
        return len(ids)

    return find
