"""The first half of a round: sample rollouts from the student, and score them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import grain
import jax
import numpy as np

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted, Stop
from opd_jax.keys import derived_seed, stream
from opd_jax.model.sharding import on_mesh
from opd_jax.processes import first_alone, is_first, wait_for_all
from opd_jax.rollout.engine import Request, in_order
from opd_jax.rollout.rows import Packing, gather, spread
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
from opd_jax.rollout.scratch import Scratch, clear_work
from opd_jax.rollout.store import Rollout, RolloutStore
from opd_jax.tasks import Problem, decode_response, grade, prompt_ids
from opd_jax.train.choices import needs_groups, stored_extras
from opd_jax.train.engines import engine_of
from opd_jax.train.identity import params_digest
from opd_jax.train.layout import layout, parts_of
from opd_jax.train.run import Run
from opd_jax.train.serving import server_engine, teacher_by_servers
from opd_jax.types import Rows

Found = TypeVar("Found")
SHARD_ROWS = 256  # of a scored round in one file


def draws_of_round(config: Config, problems: Sequence[Problem], round_: int) -> list[tuple[Problem, int]]:
    """The (problem, sample number) pairs of a round: prompts in shuffled order, epoch after epoch."""
    seed = derived_seed(config.seed, "prompts")
    order = grain.MapDataset.range(len(problems)).shuffle(seed=seed).repeat()
    prompts, samples = config.sampling.prompts, config.sampling.samples
    draws = []
    for index in range(round_ * prompts, (round_ + 1) * prompts):
        epoch = index // len(problems)
        # A problem that comes again is drawn afresh, not with the keys of its first visit.
        numbers = range(epoch * samples, (epoch + 1) * samples)
        draws += [(problems[order[index]], number) for number in numbers]
    return draws


def minibatch_plan(config: Config, round_: int) -> np.ndarray:
    """Which rollouts of a round form which minibatch: ``[minibatches, rows]`` indices.

    Formed once a round and used for scoring and in every pass, so that `old` and `cur` are computed
    on rows of the same composition. The rollouts of a prompt share a minibatch where something asked for
    compares them with each other, and are spread over all of them elsewhere.
    """
    prompts, samples = config.sampling.prompts, config.sampling.samples
    together = samples if needs_groups(config) else 1
    count = prompts * samples // together
    seed = derived_seed(config.seed, "minibatches", round_)
    order = grain.MapDataset.range(count).shuffle(seed=seed)
    drawn = np.array([order[index] for index in range(count)])
    shuffled = drawn[:, None] * together + np.arange(together)
    return shuffled.reshape(config.schedule.minibatches, -1)


def sample_round(run: Run, stop: Stop) -> None:
    """Draw the next round's rollouts with the present student, grade and store them.

    Whenever ``sampling.slots`` of them are drawn they are stored; what a process that was killed had stored
    is not drawn again.
    """
    round_, config = len(run.rollouts.rounds), run.config
    run.make_room("policy")
    draws = draws_of_round(config, run.problems, round_)
    # A sum over all devices, so all processes take part.
    made_by = {"policy": params_digest(run.state.params), "update": int(run.state.update)}
    with _writing(run.rollouts):
        rollouts = _found(lambda: run.rollouts.pending(round_, **made_by), f"rollouts of {round_}")
        done = {(rollout.problem, rollout.sample) for rollout in rollouts}
        left = [(problem, number) for problem, number in draws if (problem.id, number) not in done]
        for finished in _batches(_drawn(run, round_, left), config.sampling.slots):
            first_alone(functools.partial(run.rollouts.append, finished, **made_by))
            rollouts += finished
            if stop():
                raise Interrupted
        first_alone(
            functools.partial(
                run.rollouts.seal,
                round_,
                **made_by,
                reward=float(np.mean([rollout.reward for rollout in rollouts])),
                truncated=float(np.mean([rollout.truncated for rollout in rollouts])),
            )
        )


def _batches(drawn: Iterator[Rollout], size: int) -> Iterator[list[Rollout]]:
    """Rollouts ``size`` at a time; what was finished before an engine failed comes out first."""
    batch: list[Rollout] = []
    try:
        for rollout in drawn:
            batch.append(rollout)
            if len(batch) == size:
                yield batch
                batch = []
    except InputError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _drawn(run: Run, round_: int, draws: Sequence[tuple[Problem, int]]) -> Iterator[Rollout]:
    """Graded rollouts of the present student, as they are finished."""
    if not draws:
        return
    asked = {problem.id: problem.prompt for problem, _ in draws}
    prompts = {name: prompt_ids(run.tokenizer, text, run.config.problems) for name, text in asked.items()}
    requests = [Request(prompts[problem.id], problem.key, number) for problem, number in draws]
    if run.config.engine.kind == "server":
        drawn = server_engine(run).draw(requests)
    else:
        # In order: then the files are the same whether or not a process was killed meanwhile.
        engine = engine_of(run, "student", run.config.sampling, stream(run.config.seed, "sample"))
        drawn = enumerate(in_order(engine.draw(requests)))
    for index, generated in drawn:
        problem, number = draws[index]
        text = decode_response(run.tokenizer, generated.ids)
        yield Rollout(
            round=round_,
            problem=problem.id,
            sample=number,
            prompt_ids=prompts[problem.id],
            response_ids=generated.ids,
            behaviour_logprobs=generated.logprobs,
            truncated=generated.truncated,
            reward=float(grade(text, problem.answer)),
        )


@contextlib.contextmanager
def _writing(store: RolloutStore) -> Iterator[None]:
    """The store's lock, for the process that writes."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(store)

        first_alone(lock)
        yield


def _found(read: Callable[[], Found], what: str) -> Found:
    """What lies on the disk, for all processes alike: the first reads before the others, and none writes."""
    found: list[Found] = []
    first_alone(lambda: found.append(read()))
    if not is_first():
        found.append(read())
    wait_for_all(f"all found {what}")
    return found[0]


def score_round(run: Run, stop: Stop) -> None:
    """Attach `old`, the teacher's signal and what else the config asks for to the newest rollouts.

    One model reads all rows before the next one does, so that they need not be in memory together. What a
    model says of a micro-batch is kept as soon as it is said, and not asked again after a kill; the scored
    rollouts are written, in the order they were drawn, once all is known.
    """
    round_, config = len(run.scored.rounds), run.config
    told = run.rollouts.shard(round_)
    if told["policy"] != params_digest(run.state.params):
        raise InputError(
            f"old log-probs are read by the policy that sampled: the student in {run.folder} is not "
            f"the one that drew round {round_}; restore its checkpoint, or start a new run folder"
        )
    rollouts = _as_drawn(run, round_)
    vocabularies = {"student": run.model.vocab_size, "teacher": run.teacher_model.vocab_size}
    check_rollouts(rollouts, vocabularies)
    extras = stored_extras(config)
    parts = parts_of_round(config, round_, rollouts, run.width)
    rows = [
        rows_of([rollouts[index] for index in chosen], run.width, counts=counts) for chosen, counts in parts
    ]
    made_of = {
        "about": run.scored.about,
        "rollouts": [shard["sha256"] for shard in told["shards"]],
        "parts": [[part.tolist() for part in pair] for pair in parts],
        "extras": sorted(extras),
        "student_k": config.loss.student_k,
    }
    columns: list[dict[str, Any]] = [{} for _ in parts]
    with _writing(run.scored):
        place = run.scored.place
        if round_:  # of a process that was killed after it sealed
            first_alone(lambda: clear_work(place, round_ - 1))
        work = Scratch(place, round_, made_of)
        pieces = _found(work.found, f"scores of {round_}")
        for stage, read in _STAGES.items():
            for index, (part, known) in enumerate(zip(rows, columns, strict=True)):
                if (piece := pieces.pop(f"{stage}-{index:05d}", None)) is None:
                    if stop():
                        raise Interrupted
                    said = read(run, part, extras, known)
                    piece = {name: values[part.mask] for name, values in said.items()}
                    if piece:
                        first_alone(functools.partial(work.keep, f"{stage}-{index:05d}", piece))
                known |= {name: spread([values], part.mask) for name, values in piece.items()}

        def store() -> None:
            _store_scores(run, round_, rollouts, parts, rows, columns, extras)
            clear_work(place, round_)

        first_alone(store)


def _as_drawn(run: Run, round_: int) -> list[Rollout]:
    """The rollouts of a round in the order of its draws, in whatever order they were finished."""
    config, rollouts = run.config, run.rollouts.read(round_)
    if len(rollouts) != config.sampling.prompts * config.sampling.samples:
        raise InputError(
            f"a round has sampling.prompts x sampling.samples rollouts: round {round_} of "
            f"{run.rollouts.path} has {len(rollouts)}; restore it from a copy"
        )
    draws = draws_of_round(config, run.problems, round_)
    place = {(problem.id, number): index for index, (problem, number) in enumerate(draws)}
    return sorted(rollouts, key=lambda rollout: place.get((rollout.problem, rollout.sample), len(place)))


def _store_scores(
    run: Run,
    round_: int,
    rollouts: Sequence[Rollout],
    parts: Sequence[Packing],
    rows: Sequence[Rows],
    columns: Sequence[dict[str, Any]],
    extras: Collection[str],
) -> None:
    """Write the scored rollouts of a round, and seal it."""
    scored: dict[int, Rollout] = {}
    alike: dict[int, np.ndarray] = {}
    for (chosen, _), part, known in zip(parts, rows, columns, strict=True):
        if "alike" in known:
            each = gather(known.pop("alike"), part.mask, part.sequence_ids)
            alike.update(zip(chosen.tolist(), each, strict=True))
        rounded = attach([rollouts[index] for index in chosen], part, known)
        scored.update(zip(chosen.tolist(), rounded, strict=True))
    in_order = [scored[index] for index in range(len(rollouts))]
    run.scored.discard(round_)  # of a process that was killed here; all of it is in hand
    for start in range(0, len(in_order), SHARD_ROWS):
        run.scored.append(in_order[start : start + SHARD_ROWS])
    run.scored.seal(
        round_,
        extras=sorted(extras),
        mismatch=mismatch(in_order, [alike[index] for index in sorted(alike)] or None),
        null_drift=null_drift(in_order),
    )


def _by_policy(run: Run, rows: Rows, extras: Collection[str], known: dict[str, Any]) -> dict[str, Any]:
    """What the policy that sampled says of its own tokens."""
    run.make_room("policy")
    temperature = run.config.sampling.temperature
    score, placed = make_scorer(run.model, temperature=temperature), on_mesh(rows, run.mesh)
    found: dict[str, Any] = {"old_logprobs": score(run.policy, placed)}
    # A sampler's log-probs may be of another temperature; they are compared with the trainer's at that one.
    samplers = run.about["behaviour_logprob_temperature"]
    if samplers != temperature:
        found["alike"] = make_scorer(run.model, temperature=samplers)(run.policy, placed)
    if "again" in extras:
        found["again_logprobs"] = _again(run, rows, score)
    if "student_topk" in extras:
        score_topk = make_topk_scorer(
            run.model, k=run.config.loss.student_k, temperature=temperature, usable=_usable(run)
        )
        student = score_topk(run.policy, placed)
        found |= {"student_topk_ids": student.ids, "student_topk_logprobs": student.logprobs}
    return jax.device_get(found)


def _by_reference(run: Run, rows: Rows, extras: Collection[str], known: dict[str, Any]) -> dict[str, Any]:
    """What the student before training says of them."""
    if "reference" not in extras:
        return {}
    run.make_room("base")
    score = make_scorer(run.model, temperature=run.config.sampling.temperature)
    return {"reference_logprobs": jax.device_get(score(run.base, on_mesh(rows, run.mesh)))}


def _by_teacher(run: Run, rows: Rows, extras: Collection[str], known: dict[str, Any]) -> dict[str, Any]:
    """The teacher's signal."""
    if run.config.engine.teacher_urls:
        return jax.device_get(columns_of(teacher_by_servers(run, rows, usable=_usable(run))))
    run.make_room("teacher")
    temperature, placed = run.config.sampling.temperature, on_mesh(rows, run.mesh)
    score = make_topk_scorer(
        run.teacher_model,
        k=run.config.loss.top_k,
        temperature=temperature,
        usable=_usable(run),
        hidden="teacher_hidden" in extras,
    )
    found = columns_of(score(run.teacher, placed))
    if "student_topk" in extras:
        score_ids = make_ids_scorer(run.teacher_model, temperature=temperature)
        ids = on_mesh(known["student_topk_ids"], run.mesh)
        found["student_topk_teacher_logprobs"] = score_ids(run.teacher, placed, ids)
    return jax.device_get(found)


_STAGES = {"policy": _by_policy, "reference": _by_reference, "teacher": _by_teacher}


def _usable(run: Run) -> int:
    """Only ids that every model knows and the tokenizer means something by."""
    return min(run.usable, run.model.vocab_size, run.teacher_model.vocab_size)


def parts_of_round(config: Config, round_: int, rollouts: Sequence[Rollout], width: int) -> list[Packing]:
    """Which rollouts are computed together, in scoring as in training: the micro-batches of a round."""
    return [
        part
        for chosen in minibatch_plan(config, round_)
        for part in parts_of(layout(config, chosen, rollouts, width), config.schedule.microbatches)
    ]


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
