"""What a rollout is, and how rollouts are columns of a parquet file.

Ragged columns are lists: ``[R]`` a row, or ``[R, K]`` as lists of lists. A teacher's hidden states, which
parquet has no type for, are the bytes of a row's ``[R, D]`` bfloat16 array, in C order and little-endian:
``np.frombuffer(cell, ml_dtypes.bfloat16).reshape(R, -1)``.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opd_jax.errors import InputError
from opd_jax.tasks import is_unicode

SCHEMA_VERSION = 3
_STAMP = b"opd_jax"  # key of a file's metadata: what the file says of itself, as JSON


@dataclasses.dataclass(frozen=True)
class Score:
    """What scoring attaches to a rollout of R tokens; nats, at the sampling temperature.

    Columns that only some losses and weights ask for are None where they were not scored.
    """

    old_logprobs: np.ndarray  # [R] by the trainer's own computation
    teacher_logprobs: np.ndarray  # [R] of the sampled tokens
    teacher_topk_ids: np.ndarray  # [R, K] best first
    teacher_topk_logprobs: np.ndarray  # [R, K] raw, not renormalised
    teacher_outside_mass: np.ndarray  # [R] probability the K leave out
    teacher_entropy: np.ndarray | None = None  # [R] of its whole distribution; no server tells it
    again_logprobs: np.ndarray | None = None  # [R] `old`, read a second time by another batching
    reference_logprobs: np.ndarray | None = None  # [R] under the student before training
    student_topk_ids: np.ndarray | None = None  # [R, K] of the behaviour policy, best first
    student_topk_logprobs: np.ndarray | None = None  # [R, K] under it
    student_topk_teacher_logprobs: np.ndarray | None = None  # [R, K] under the teacher
    teacher_hidden: np.ndarray | None = None  # [R, D] bfloat16: see `opd_jax.rollout.score.full_logprobs`


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One response to one prompt, with the log-probs it was sampled at."""

    round: int
    problem: str  # id of the problem; rollouts of one problem in one round are a group
    sample: int  # which rollout of that problem, over the whole run
    prompt_ids: np.ndarray  # [P] int32
    response_ids: np.ndarray  # [R] int32, the end-of-text token included
    behaviour_logprobs: np.ndarray  # [R] float32, raw, by the engine that sampled, at its temperature
    truncated: bool
    reward: float
    score: Score | None = None


_SCALARS = {
    "round": pa.int32(),
    "problem": pa.string(),
    "sample": pa.int32(),
    "truncated": pa.bool_(),
    "reward": pa.float32(),
}
# Columns, by where they stand.
ROLLOUT = [field.name for field in dataclasses.fields(Rollout) if field.name != "score"]
SCORE = [field.name for field in dataclasses.fields(Score)]
HIDDEN = "teacher_hidden"
GROUP_BYTES = 2**20  # of one row group of a shard, about
_LIMIT = 2**31  # integers are stored as int32
_LOGPROB_SLACK = 0.5  # nats above 0 that rounding of large logits to bfloat16 accounts for


def check_rollout(rollout: Rollout, where: str) -> None:
    """Refuse a rollout that could not be stored as it is or trained on; ``where`` names it.

    Raises:
      InputError: its prompt or response is empty, a per-token column is not as long as the response, or has
        other axes than `Rollout` and `Score` say, a number is not finite or not of its kind, a log-prob is
        above 0, or the problem is no text.
    """
    _check_scalars(rollout, where)
    length = len(rollout.response_ids)
    if not length or not len(rollout.prompt_ids):
        raise InputError(
            f"a prompt and a response must have at least one token: {where} has "
            f"{len(rollout.prompt_ids)} and {length}; drop that row"
        )
    columns = {"behaviour_logprobs": rollout.behaviour_logprobs}
    if rollout.score:
        columns.update({name: column for name, column in vars(rollout.score).items() if column is not None})
    for name, ids in (("prompt_ids", rollout.prompt_ids), ("response_ids", rollout.response_ids)):
        _check_array(name, ids, where)
    for name, column in columns.items():
        _check_array(name, column, where)
        if len(column) != length:
            raise InputError(
                f"a per-token column must be as long as its response: {where} has {length} tokens "
                f"and {len(column)} {name}; drop that row"
            )
        if not np.all(np.isfinite(column)):
            raise InputError(
                f"stored numbers must be finite: {where} has NaN or infinity in {name}; score it again"
            )
        if name.endswith("logprobs") and np.max(column, initial=0) > _LOGPROB_SLACK:
            raise InputError(
                f"a log-prob must not be above 0: {where} has {float(np.max(column)):g} in {name}; store "
                "log-probs in nats, not probabilities"
            )


def check_alike(rollouts: Sequence[Rollout]) -> None:
    """Refuse rollouts that cannot share the columns of a file.

    Raises:
      InputError: some have a column of scores that others have not, or have another number of ids in it.
    """
    first = _shapes(rollouts[0])
    for rollout in rollouts:
        shapes = _shapes(rollout)
        if shapes != first:
            name = min(name for name in {**shapes, **first} if shapes.get(name) != first.get(name))
            raise InputError(
                f"rollouts that are stored together have the same columns: {name} of problem "
                f"{rollout.problem!r} is {shapes.get(name)}, of problem {rollouts[0].problem!r} "
                f"{first.get(name)}; score them alike, or append them apart"
            )


def _shapes(rollout: Rollout) -> dict[str, str]:
    columns = vars(rollout.score) if rollout.score else {}
    return {
        name: f"[{', '.join(map(str, ('R', *np.shape(column)[1:])))}]"
        for name, column in columns.items()
        if column is not None
    }


def _check_scalars(rollout: Rollout, where: str) -> None:
    for name in ("round", "sample"):
        value = getattr(rollout, name)
        if not isinstance(value, numbers.Integral) or not 0 <= int(value) < _LIMIT:
            raise InputError(
                f"rounds and samples are counted from 0 to 2**31 - 1: {where} has {name} {value!r}; "
                "number them so"
            )
    if not isinstance(rollout.reward, numbers.Real) or not math.isfinite(rollout.reward):
        raise InputError(
            f"a reward must be a finite number: {where} has {rollout.reward!r}; grade it again, or drop it"
        )
    if not isinstance(rollout.problem, str) or not is_unicode(rollout.problem):
        raise InputError(
            f"a problem must be named in text that UTF-8 has: {where} has {rollout.problem!r}; name it so"
        )


def _check_array(name: str, values: np.ndarray, where: str) -> None:
    """Its axes; of ids that they are integers that a file can hold, too."""
    axes = 2 if "topk" in name or name == HIDDEN else 1
    if np.ndim(values) != axes:
        raise InputError(
            f"a column must have the axes that `Score` and `Rollout` say: {where} has {name} of shape "
            f"{list(np.shape(values))}, not of {axes} axes; give it so"
        )
    if name.endswith("_ids") and np.size(values):
        ids = np.asarray(values)
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= _LIMIT:
            found = ids.dtype if ids.dtype.kind not in "iu" else f"{ids.min()} to {ids.max()}"
            raise InputError(
                f"ids must be whole numbers from 0 to 2**31 - 1: {where} has {found} in {name}; use the ids "
                "of a tokenizer"
            )


def encode(rollouts: Sequence[Rollout], says: Mapping[str, Any]) -> bytes:
    """Rollouts as a parquet file that says of itself what ``says`` holds, as JSON values."""
    score = rollouts[0].score
    columns = {name: _column(name, [getattr(r, name) for r in rollouts]) for name in ROLLOUT}
    for name in SCORE if score is not None else ():
        if getattr(score, name) is not None:
            columns[name] = _column(name, [getattr(r.score, name) for r in rollouts])
    table = pa.table(columns).replace_schema_metadata({_STAMP: json.dumps(says, sort_keys=True)})
    file = io.BytesIO()
    # A row group is the least that can be read, and so what one rollout costs a reader that shuffles.
    size = max(1, GROUP_BYTES * len(rollouts) // table.nbytes)
    # Dictionaries are for what repeats; of numbers they made files half as large again, and slower to read.
    pq.write_table(table, file, row_group_size=size, use_dictionary=["problem"], write_page_checksum=True)
    return file.getvalue()


def decode(data: bytes) -> list[Rollout]:
    """The rollouts of a parquet file whose digest was compared: its pages are not looked at again.

    Raises:
      ValueError: it is no such file.
    """
    try:
        # Without threads, some of which would now and then outlive the interpreter and abort it.
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        names = [name for name in (*ROLLOUT, *SCORE) if name in table.column_names]
        columns = {name: values_of(name, table.column(name).combine_chunks()) for name in names}
        scored = "old_logprobs" in columns
        if HIDDEN in columns:
            pairs = zip(columns[HIDDEN], columns["response_ids"], strict=True)
            columns[HIDDEN] = [hidden.reshape(len(ids), -1) for hidden, ids in pairs]
        return [
            Rollout(
                **{name: columns[name][row] for name in ROLLOUT},
                score=Score(**{name: columns[name][row] for name in SCORE if name in columns})
                if scored
                else None,
            )
            for row in range(table.num_rows)
        ]
    except (pa.ArrowException, OSError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(str(error)) from None


def said_by(data: bytes) -> dict[str, Any]:
    """What a parquet file says of itself; nothing where it is no file of a store."""
    try:
        metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
        return dict(json.loads(metadata.get(_STAMP, b"{}")))
    except (pa.ArrowException, OSError, ValueError, TypeError):
        return {}


def _column(name: str, values: Sequence[Any]) -> pa.Array:
    if name in _SCALARS:
        return pa.array(values, _SCALARS[name])
    if name == HIDDEN:
        return pa.array([np.asarray(v, ml_dtypes.bfloat16).tobytes() for v in values], pa.large_binary())
    flat = np.concatenate([np.asarray(value, _dtype(name)) for value in values])
    inner = pa.array(flat.ravel())
    if flat.ndim == 2:
        inner = pa.ListArray.from_arrays(np.arange(len(flat) + 1, dtype=np.int32) * flat.shape[1], inner)
    ends = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, inner)


def values_of(name: str, column: Any) -> Sequence[Any]:
    """A column, one value a row: a plain one, or an array ``[R]`` or ``[R, K]``."""
    if name in _SCALARS:
        return column.to_pylist()
    if name == HIDDEN:
        return [np.frombuffer(cell, ml_dtypes.bfloat16) for cell in column.to_pylist()]
    flat, lengths = column.flatten(), column.value_lengths().to_numpy()
    shape: tuple[int, ...] = (-1,)
    if pa.types.is_list(flat.type):
        [k] = set(flat.value_lengths().to_numpy().tolist()) or {0}
        flat, shape = flat.flatten(), (-1, k)
    joined = flat.to_numpy().astype(_dtype(name), copy=False).reshape(shape)
    return np.split(joined, np.cumsum(lengths)[:-1])


def _dtype(name: str) -> Any:
    return np.int32 if name.endswith("_ids") else np.float32
