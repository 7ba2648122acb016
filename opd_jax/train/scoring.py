"""The second half of collecting a round: old log-probs and the teacher's signal for its rollouts."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted, Stop
from opd_jax.model.kernels import FUSED
from opd_jax.model.sharding import on_mesh
from opd_jax.processes import first_alone
from opd_jax.rollout.rows import Packing, lengths_of, spread
from opd_jax.rollout.score import (
    Scorer,
    attach,
    check_rollouts,
    columns_of,
    make_ids_scorer,
    make_scorer,
    make_topk_scorer,
    mismatch,
    null_drift,
    rows_of,
)
from opd_jax.rollout.scratch import Arrays, Scratch, clear_work
from opd_jax.rollout.store import Rollout
from opd_jax.train.choices import stored_extras
from opd_jax.train.collect import (
    SHARD_ROWS,
    check_shape,
    draws_of_round,
    found_by_all,
    minibatch_plan,
    writing,
)
from opd_jax.train.identity import params_digest
from opd_jax.train.layout import layout, parts_of
from opd_jax.train.run import Run
from opd_jax.train.serving import teacher_by_servers
from opd_jax.types import Rows


class Part(NamedTuple):
    """Rollouts that a model reads at once."""

    packing: Packing  # which, and how many in each row
    width: int  # T


class Work(NamedTuple):
    """A round that is being scored."""

    rollouts: Sequence[Rollout]
    extras: Collection[str]  # columns that only some losses and weights ask for
    columns: Sequence[dict[str, Any]]  # what is known of each rollout so far, by the names of `Score`
    stop: Stop


def score_round(run: Run, stop: Stop) -> None:
    """Attach `old`, the teacher's signal and what else the config asks for to the newest rollouts.

    One model reads all rows before the next one does, so that they need not be in memory together. What a
    model says of a part is kept as soon as it is said, and not asked again after a kill; the scored
    rollouts are written, in the order they were drawn, once all is known.
    """
    round_, config = len(run.scored.rounds), run.config
    told = run.rollouts.shard(round_)
    if told["policy"] != params_digest(run.state.params):
        raise InputError(
            f"old log-probs are read by the policy that sampled: the student in {run.folder} is not "
            f"the one that drew round {round_} of {run.rollouts.path}; score it in the run that drew it, or "
            "restore that student's checkpoint"
        )
    rollouts = _as_drawn(run, round_)
    vocabularies = {"student": run.model.vocab_size, "teacher": run.teacher_model.vocab_size}
    check_rollouts(rollouts, vocabularies)
    extras = stored_extras(config)
    as_trained = [Part(p, run.width) for p in parts_of_round(config, round_, rollouts, run.width)]
    stages = {
        "policy": (_by_policy, as_trained),
        "reference": (_by_reference, as_trained if "reference" in extras else []),
        "teacher": _teacher_stage(run, rollouts, as_trained),
    }
    made_of = {
        "about": run.scored.about,
        "rollouts": [shard["sha256"] for shard in told["shards"]],
        "parts": {
            name: [[*(part.tolist() for part in packing), width] for packing, width in parts]
            for name, (_, parts) in stages.items()
        },
        "extras": sorted(extras),
        "student_k": config.loss.student_k,
    }
    work = Work(rollouts, extras, [{} for _ in rollouts], stop)
    with writing(run.scored):
        place = run.scored.place
        if round_:  # of a process that was killed after it sealed
            first_alone(lambda: clear_work(place, round_ - 1))
        scratch = Scratch(place, round_, made_of)
        found = found_by_all(scratch.found, f"scores of {round_}")
        for name, (read, parts) in stages.items():
            left = []
            for index, part in enumerate(parts):
                if (piece := found.pop(f"{name}-{index:05d}", None)) is None:
                    left.append(index)
                else:
                    _share_out(piece, part, work)
            if not left:
                continue
            if stop():
                raise Interrupted
            for index, piece in read(run, work, [parts[i] for i in left]):
                first_alone(functools.partial(scratch.keep, f"{name}-{left[index]:05d}", piece))
                _share_out(piece, parts[left[index]], work)
                if stop():
                    raise Interrupted

        def store() -> None:
            _store_scores(run, round_, work)
            clear_work(place, round_)

        first_alone(store)


def _as_drawn(run: Run, round_: int) -> list[Rollout]:
    """The rollouts of a round in the order of its draws, in whatever order they were finished."""
    config, rollouts = run.config, run.rollouts.read(round_)
    draws = draws_of_round(config, run.problems, round_)
    place = {(problem.id, number): index for index, (problem, number) in enumerate(draws)}
    rollouts.sort(key=lambda rollout: place.get((rollout.problem, rollout.sample), len(place)))
    check_shape(run.rollouts, round_, rollouts, config)
    return rollouts


def parts_of_round(config: Config, round_: int, rollouts: Sequence[Rollout], width: int) -> list[Packing]:
    """Which rollouts are computed together, in scoring as in training: the micro-batches of a round."""
    return [
        part
        for chosen in minibatch_plan(config, round_)
        for part in parts_of(layout(config, chosen, rollouts, width), config.schedule.microbatches)
    ]


def parts_by_length(lengths: np.ndarray, rows: int, width: int, unit: int = FUSED) -> list[Part]:
    """Sequences of like length together, a row each: for a model that only reads them.

    Rows are as wide as the longest of a part needs, but of few widths: T, half of it, a quarter, ...,
    rounded up to whole units.

    Args:
      lengths: positions of each sequence, at most T.
      rows: B, of every part; the number of sequences is a multiple of it.
      width: T.
      unit: positions that kernels read at once.

    >>> [(part.packing.order.tolist(), part.width) for part in parts_by_length([3, 9, 2, 16], 2, 16, unit=4)]
    [([3, 1], 16), ([0, 2], 4)]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    parts = []
    for chosen in order.reshape(-1, rows):
        narrow = width
        while lengths[chosen[0]] <= (half := -(-narrow // (2 * unit)) * unit) < narrow:
            narrow = half
        parts.append(Part(Packing(chosen, np.ones(rows, int)), narrow))
    return parts


def _teacher_stage(run: Run, rollouts: Sequence[Rollout], as_trained: list[Part]) -> tuple[Any, list[Part]]:
    """Who reads for the teacher, and in which parts."""
    if run.config.engine.teacher_urls:  # they batch by themselves
        alone = np.ones(1, int)
        return _by_servers, [Part(Packing(np.array([i]), alone), run.width) for i in range(len(rollouts))]
    if run.config.schedule.rows == "packed":
        return _by_teacher, as_trained
    lengths = lengths_of([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    rows = len(as_trained[0].packing.counts)
    return _by_teacher, parts_by_length(lengths, rows, run.width)


def _rows(work: Work, part: Part) -> Rows:
    chosen = [work.rollouts[index] for index in part.packing.order]
    return rows_of(chosen, part.width, part.packing.counts)


def _share_out(piece: Arrays, part: Part, work: Work) -> None:
    """Give each rollout of a part what was said of its tokens."""
    ends = np.cumsum([len(work.rollouts[index].response_ids) for index in part.packing.order])
    for name, values in piece.items():
        for index, own in zip(part.packing.order, np.split(values, ends[:-1]), strict=True):
            work.columns[index][name] = own


def _store_scores(run: Run, round_: int, work: Work) -> None:
    """Write the scored rollouts of a round, and seal it."""
    alike = [known.pop("alike") for known in work.columns if "alike" in known]
    scored = attach(work.rollouts, work.columns)
    run.scored.discard(round_)  # of a process that was killed here; all of it is in hand
    for start in range(0, len(scored), SHARD_ROWS):
        run.scored.append(scored[start : start + SHARD_ROWS])
    run.scored.seal(
        round_,
        extras=sorted(work.extras),
        mismatch=mismatch(scored, alike or None),
        null_drift=null_drift(scored),
    )


# Stages. Each reads parts, and yields of each its number and, by the names of `Score`, arrays [tokens, ...].

Said = Iterator[tuple[int, Arrays]]


def _by_policy(run: Run, work: Work, parts: Sequence[Part]) -> Said:
    """What the policy that sampled says of its own tokens."""
    run.make_room("policy")
    temperature = run.config.sampling.temperature
    score = make_scorer(run.model, temperature=temperature)
    # A sampler's log-probs may be of another temperature; they are compared with the trainer's at that one.
    samplers = run.scored.about["behaviour_logprob_temperature"]
    for index, part in enumerate(parts):
        rows = _rows(work, part)
        placed = on_mesh(rows, run.mesh)
        found: dict[str, Any] = {"old_logprobs": score(run.policy, placed)}
        if samplers != temperature:
            found["alike"] = make_scorer(run.model, temperature=samplers)(run.policy, placed)
        if "again" in work.extras:
            found["again_logprobs"] = _again(run, rows, score)
        if "student_topk" in work.extras:
            score_topk = make_topk_scorer(
                run.model, k=run.config.loss.student_k, temperature=temperature, usable=_usable(run)
            )
            student = score_topk(run.policy, placed)
            found |= {"student_topk_ids": student.ids, "student_topk_logprobs": student.logprobs}
        yield index, _of_tokens(found, rows)


def _by_reference(run: Run, work: Work, parts: Sequence[Part]) -> Said:
    """What the student before training says of them."""
    run.make_room("base")
    score = make_scorer(run.model, temperature=run.config.sampling.temperature)
    for index, part in enumerate(parts):
        rows = _rows(work, part)
        yield index, _of_tokens({"reference_logprobs": score(run.base, on_mesh(rows, run.mesh))}, rows)


def _by_teacher(run: Run, work: Work, parts: Sequence[Part]) -> Said:
    """The teacher's signal."""
    run.make_room("teacher")
    temperature = run.config.sampling.temperature
    score = make_topk_scorer(
        run.teacher_model,
        k=run.config.loss.top_k,
        temperature=temperature,
        usable=_usable(run),
        hidden="teacher_hidden" in work.extras,
    )
    for index, part in enumerate(parts):
        rows = _rows(work, part)
        placed = on_mesh(rows, run.mesh)
        found = columns_of(score(run.teacher, placed))
        if "student_topk" in work.extras:
            score_ids = make_ids_scorer(run.teacher_model, temperature=temperature)
            ids = spread([work.columns[i]["student_topk_ids"] for i in part.packing.order], rows.mask)
            found["student_topk_teacher_logprobs"] = score_ids(run.teacher, placed, on_mesh(ids, run.mesh))
        yield index, _of_tokens(found, rows)


def _by_servers(run: Run, work: Work, parts: Sequence[Part]) -> Said:
    """The teacher's signal from its servers, a rollout a part, as they are finished."""
    rows = rows_of([work.rollouts[part.packing.order[0]] for part in parts], run.width)
    yield from teacher_by_servers(run, rows, usable=_usable(run), stop=work.stop)


def _of_tokens(found: dict[str, Any], rows: Rows) -> Arrays:
    return {name: values[rows.mask] for name, values in jax.device_get(found).items()}


def _usable(run: Run) -> int:
    """Only ids that every model knows and the tokenizer means something by."""
    return min(run.usable, run.model.vocab_size, run.teacher_model.vocab_size)


def _again(run: Run, rows: Rows, score: Scorer) -> np.ndarray:
    """The log-probs that `score` gives for the same rows in halves and in reverse order."""
    count = len(rows.tokens)
    ways = run.config.mesh.data * run.config.mesh.fsdp * run.config.mesh.expert
    size = count // 2 if count % 2 == 0 and (count // 2) % ways == 0 else count
    backwards = jax.tree.map(lambda x: x[::-1], rows)
    parts = [
        score(run.policy, on_mesh(jax.tree.map(lambda x, at=at: x[at : at + size], backwards), run.mesh))
        for at in range(0, count, size)
    ]
    return np.concatenate(jax.device_get(parts))[::-1]
