"""From ragged token lists to the rows a model reads, and back.

The one place where inputs and targets are shifted against each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd_jax.errors import InputError
from opd_jax.types import Rows, TokenIds


def make_rows(prompts: Sequence[TokenIds], responses: Sequence[TokenIds], width: int) -> Rows:
    """Lay out each prompt and its response in a row of ``width`` positions, padded on the right.

    A prompt of P and a response of R tokens fill P + R - 1 positions, of which the last R predict
    the response; the first response token is predicted at position P - 1.

    Args:
      prompts, responses: token ids of B sequences, each at least one token long.
      width: T.

    Returns:
      `Rows` of NumPy arrays ``[B, T]``.

    Raises:
      InputError: a prompt or response is empty, or a sequence is longer than the row.
    """
    shape = (len(prompts), width)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask, sequence_ids = np.zeros(shape, bool), np.zeros(shape, np.int32)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if not len(prompt) or not len(response):
            raise InputError(
                f"a prompt and a response must have at least one token: row {row} has "
                f"{len(prompt)} and {len(response)}; drop that row"
            )
        length = len(prompt) + len(response) - 1
        if length > width:
            raise InputError(
                f"prompt and response must fit in a row: row {row} takes {length} positions of "
                f"{width}; raise sampling.max_prompt or sampling.max_response"
            )
        text = np.concatenate([prompt, response]).astype(np.int32)
        tokens[row, :length], targets[row, :length] = text[:-1], text[1:]
        mask[row, len(prompt) - 1 : length] = True
        sequence_ids[row, :length] = 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), shape) * (sequence_ids > 0)
    return Rows(tokens, targets, mask, sequence_ids, positions.astype(np.int32))


def spread(values: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Place per-token values of each response at its masked positions; zero elsewhere.

    Args:
      values: B arrays ``[R, ...]``, R being the number of true positions in that row of the mask.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T, ...]``.
    """
    joined = np.concatenate([np.asarray(value) for value in values])
    out = np.zeros((*mask.shape, *joined.shape[1:]), joined.dtype)
    out[mask] = joined
    return out


def gather(values: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """The inverse of `spread`: each row's masked values, in order."""
    return [row[keep] for row, keep in zip(np.asarray(values), np.asarray(mask), strict=True)]
