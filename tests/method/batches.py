"""Batches of one shape for the tests of the method, and functions compiled once for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType, Mesh, PartitionSpec

SHAPE = ROWS, LENGTH = 4, 12
WIDE = 8, 16  # rows for eight devices
K, V = 3, 7
SPLIT = PartitionSpec("rows")

few = settings(max_examples=20, deadline=None, derandomize=True)
fewer = settings(few, max_examples=6)  # of each of many choices, all of which are then made
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def floats(low: float, high: float, shape: tuple[int, ...] = SHAPE) -> st.SearchStrategy[np.ndarray]:
    """Arrays of the numbers that break things: ends, zeros, repeats."""
    return arrays(np.float32, shape, elements=st.floats(low, high, width=32, allow_subnormal=False))


def typical(low: float, high: float, shape: tuple[int, ...] = SHAPE) -> st.SearchStrategy[np.ndarray]:
    """Arrays without ties."""
    return st.integers(0, 2**32 - 1).map(
        lambda seed: np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)
    )


nats = floats(-4, 0) | typical(-4, 0)
support = floats(-4, 0, (*SHAPE, K)) | typical(-4, 0, (*SHAPE, K))
wild = floats(-1e4, 1e4)
masks = arrays(bool, SHAPE)


@st.composite
def packings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A mask with holes and the ids of the sequences that share its rows, 0 on the padding at the end."""
    starts = draw(masks) & draw(masks) & (np.arange(LENGTH) > 0)
    ends = draw(arrays(np.int32, (ROWS, 1), elements=st.integers(0, LENGTH)))
    ids = np.where(np.arange(LENGTH) < ends, 1 + np.cumsum(starts, axis=1), 0).astype(np.int32)
    return draw(masks) & (ids > 0), ids


@functools.cache
def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function under jit, once for all tests that call it with these options."""
    return jax.jit(functools.partial(function, **options))


def fields(seed: int = 0, shape: tuple[int, int] = SHAPE, k: int = K) -> dict[str, np.ndarray]:
    """A typical batch by the names of `opd_jax.method.family`: a row a sequence, ragged, with holes."""
    rng = np.random.default_rng(seed)

    def logprobs() -> np.ndarray:
        logits = rng.normal(size=(*shape, V))
        return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)

    def entropy(log_p: np.ndarray) -> np.ndarray:
        return -(np.exp(log_p) * log_p).sum(-1)

    student, teacher = logprobs(), logprobs()
    ids = {"student": np.argsort(-student)[..., :k], "teacher": np.argsort(-teacher)[..., :k]}
    sampled = rng.integers(V, size=(*shape, 1))
    cur, tea = (np.take_along_axis(x, sampled, -1)[..., 0] for x in (student, teacher))
    cur_on_support = np.take_along_axis(student, ids["student"], -1)
    length = rng.integers(shape[1] // 2, shape[1] + 1, size=(shape[0], 1))
    row = np.ones(shape, np.int32) * np.arange(shape[0])[:, None]
    return {
        "mask": (np.arange(shape[1]) < length) & (rng.random(shape) < 0.8),
        "cur": cur,
        "old": cur + rng.normal(scale=0.5, size=shape).astype(np.float32),
        "tea": tea,
        "ref": cur + rng.normal(scale=0.5, size=shape).astype(np.float32),
        "entropy": entropy(student),
        "teacher_entropy": entropy(teacher),
        "kl": (np.exp(student) * (student - teacher)).sum(-1),
        "student_logits": student + 1,
        "teacher_logits": teacher - 1,
        "base": tea - cur,
        "gold": -cur,
        "kl_to_reference": abs(cur),
        "student_logprobs_on_support": np.take_along_axis(student, ids["teacher"], -1),
        "teacher_logprobs_on_support": np.take_along_axis(teacher, ids["teacher"], -1),
        "student_logits_on_support": np.take_along_axis(student, ids["teacher"], -1) + 1,
        "cur_on_support": cur_on_support,
        "old_on_support": cur_on_support + rng.normal(scale=0.3, size=(*shape, k)).astype(np.float32),
        "tea_on_support": np.take_along_axis(teacher, ids["student"], -1),
        "student_ids": ids["student"].astype(np.int32),
        "teacher_ids": ids["teacher"].astype(np.int32),
        "reward": (row % 3 == 0).astype(np.float32),
        "group": row // 4,
        "staleness": row % 2,
        "noise": rng.random(shape).astype(np.float32),
        "step": np.int32(3),
    }


@functools.cache
def wide_batch() -> dict[str, np.ndarray]:
    """A batch to be cut up: with features for a policy, ends of lines, a row of padding."""
    batch = fields(7, WIDE)
    rng = np.random.default_rng(8)
    batch["features"] = rng.normal(size=(*WIDE, 3)).astype(np.float32)
    batch["line"] = rng.random(WIDE) < 0.3
    batch["mask"][5] = False
    batch["group"] = np.arange(WIDE[0])[:, None] % 2 * np.ones((1, WIDE[1]), int)
    del batch["step"]
    return batch


def mesh(n: int) -> Mesh:
    return jax.make_mesh((n,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
