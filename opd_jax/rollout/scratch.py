"""Finished pieces of work that is not finished yet, kept so that a killed process loses none.

A piece is a dict of arrays, as an ``.npz`` file in a folder that other tools pass by. Its name says which
piece it is, what it was made of, and vouches for what it holds.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from opd_jax.rollout.storage import Place, digest_of, is_whole, part_name

Arrays = dict[str, np.ndarray]
_NARROW = ".bfloat16"  # which .npz does not know: its bits are kept, and the name says so


class Scratch:
    """Pieces of the work on one round.

    Args:
      place: where the store lies that the work is for; whoever keeps a piece holds its lock.
      round_: which round.
      made_of: what the pieces depend on, as JSON values; those of other work are left alone.
    """

    def __init__(self, place: Place, round_: int, made_of: Mapping[str, Any]) -> None:
        self._place, self._folder = place, f".work-{round_:05d}"
        self._made_of = digest_of(json.dumps(made_of, sort_keys=True).encode())[:16]

    def keep(self, piece: str, arrays: Arrays) -> None:
        """Write a piece; it is on disk, whole, when this returns."""
        file = io.BytesIO()
        np.savez(file, **dict(_bits(name, array) for name, array in arrays.items()))  # type: ignore[arg-type]
        data = file.getvalue()
        name = f"{self._folder}/{part_name(f'{piece}-{self._made_of}', data, '.npz')}"
        self._place.remove(name)  # one of that name is not whole, or it would have been found
        self._place.create(name, data)

    def found(self) -> dict[str, Arrays]:
        """The pieces that are whole; one that is not is as if it had never been."""
        pieces = {}
        for name in self._place.names(self._folder):
            piece, _, made_of = name.rpartition("/")[2].rpartition("-")[0].rpartition("-")
            if made_of != self._made_of:
                continue
            data, _ = self._place.read(name)
            if is_whole(name, data):
                with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                    pieces[piece] = dict(_numbers(name, array) for name, array in arrays.items())
        return pieces


def clear_work(place: Place, round_: int) -> None:
    """Take away the pieces of a round, once what they were for is sealed."""
    for name in place.names(f".work-{round_:05d}"):
        place.remove(name)


def _bits(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    narrow = array.dtype == ml_dtypes.bfloat16
    return (name + _NARROW, array.view(np.uint16)) if narrow else (name, array)


def _numbers(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    narrow = name.endswith(_NARROW)
    return (name.removesuffix(_NARROW), array.view(ml_dtypes.bfloat16)) if narrow else (name, array)
