"""The first half of a round: sample rollouts from the student, and score them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import grain
import jax
import numpy as np

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted, Stop
from opd_jax.keys import derived_seed
from opd_jax.model.sharding import on_mesh
from opd_jax.processes import is_first, wait_for_all
from opd_jax.rollout.engine import Request
from opd_jax.rollout.score import (
    Scorer,
    attach,
    check_rollouts,
    make_ids_scorer,
    make_scorer,
    make_topk_scorer,
    mismatch,
    null_drift,
    rows_of,
)
from opd_jax.rollout.store import Rollout
from opd_jax.tasks import Problem, decode_response, encode_prompt, grade
from opd_jax.train.choices import needs_groups, wanted_extras
from opd_jax.train.engines import engine_of, like_with_like, teacher_by_servers
from opd_jax.train.identity import params_digest
from opd_jax.train.run import Run
from opd_jax.types import Rows


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
    """Draw the next round's rollouts with the present student, grade and store them."""
    round_, config = len(run.rollouts.rounds), run.config
    draws = draws_of_round(config, run.problems, round_)
    prompts = {problem.id: encode_prompt(run.tokenizer, problem.prompt) for problem, _ in draws}
    requests = [Request(prompts[problem.id], problem.key, number) for problem, number in draws]
    finished: dict[int, Rollout] = {}
    for index, drawn in engine_of(run).draw(requests):
        if stop():
            raise Interrupted
        problem, number = draws[index]
        text = decode_response(run.tokenizer, drawn.ids)
        finished[index] = Rollout(
            round=round_,
            problem=problem.id,
            sample=number,
            prompt_ids=prompts[problem.id],
            response_ids=drawn.ids,
            behaviour_logprobs=drawn.logprobs,
            truncated=drawn.truncated,
            reward=float(grade(text, problem.answer)),
        )
    rollouts = [finished[index] for index in range(len(draws))]
    policy = params_digest(run.state.params)  # a sum over all devices, so all processes take part
    if is_first():
        run.rollouts.append(rollouts)
        run.rollouts.seal(
            round_,
            update=int(run.state.update),
            policy=policy,
            reward=float(np.mean([rollout.reward for rollout in rollouts])),
            truncated=float(np.mean([rollout.truncated for rollout in rollouts])),
        )
    wait_for_all(f"sampled {round_}")


def score_round(run: Run, stop: Stop) -> None:
    """Attach `old`, the teacher's signal and what else the config asks for to the newest rollouts.

    One model reads all rows before the next one does, so that they need not be in memory together.
    """
    round_, config = len(run.scored.rounds), run.config
    if run.rollouts.shard(round_)["policy"] != params_digest(run.state.params):
        raise InputError(
            f"old log-probs are read by the policy that sampled: the student in {run.folder} is not "
            f"the one that drew round {round_}; restore its checkpoint, or start a new run folder"
        )
    rollouts = run.rollouts.read(round_)
    if len(rollouts) != config.sampling.prompts * config.sampling.samples:
        raise InputError(
            f"a round has sampling.prompts x sampling.samples rollouts: round {round_} of "
            f"{run.rollouts.path} has {len(rollouts)}; restore it from a copy"
        )
    vocabularies = {"student": run.model.vocab_size, "teacher": run.teacher_model.vocab_size}
    check_rollouts(rollouts, vocabularies)
    extras = set(wanted_extras(config))
    if config.log.diagnose_every:
        extras.add("again")  # for the null reading, which is left out where a round lacks it
    parts = parts_of_round(config, round_)
    rows = [rows_of([rollouts[index] for index in chosen], run.width) for chosen in parts]
    columns: list[dict[str, Any]] = [{} for _ in parts]
    for read in (_by_policy, _by_reference, _by_teacher):
        for part, told in zip(rows, columns, strict=True):
            if stop():
                raise Interrupted
            told |= read(run, part, extras, told)
    scored: dict[int, Rollout] = {}
    for chosen, part, told in zip(parts, rows, columns, strict=True):
        rounded = attach([rollouts[index] for index in chosen], part, **told)
        scored.update(zip(chosen.tolist(), rounded, strict=True))
    in_order = [scored[index] for index in range(len(rollouts))]
    if is_first():
        run.scored.append(in_order)
        run.scored.seal(
            round_,
            extras=sorted(extras),
            mismatch=mismatch(like_with_like(run, in_order, parts)),
            null_drift=null_drift(in_order),
        )
    wait_for_all(f"scored {round_}")


def _by_policy(run: Run, rows: Rows, extras: Collection[str], told: dict[str, Any]) -> dict[str, Any]:
    """What the policy that sampled says of its own tokens."""
    run.make_room("policy")
    temperature = run.config.sampling.temperature
    score, placed = make_scorer(run.model, temperature=temperature), on_mesh(rows, run.mesh)
    found: dict[str, Any] = {"old": score(run.policy, placed)}
    if "again" in extras:
        found["again_logprobs"] = _again(run, rows, score)
    if "student_topk" in extras:
        score_topk = make_topk_scorer(
            run.model, k=run.config.loss.student_k, temperature=temperature, usable=_usable(run)
        )
        student = score_topk(run.policy, placed)
        found |= {"student_topk_ids": student.ids, "student_topk_logprobs": student.logprobs}
    return jax.device_get(found)


def _by_reference(run: Run, rows: Rows, extras: Collection[str], told: dict[str, Any]) -> dict[str, Any]:
    """What the student before training says of them."""
    if "reference" not in extras:
        return {}
    run.make_room("base")
    score = make_scorer(run.model, temperature=run.config.sampling.temperature)
    return {"reference_logprobs": jax.device_get(score(run.base, on_mesh(rows, run.mesh)))}


def _by_teacher(run: Run, rows: Rows, extras: Collection[str], told: dict[str, Any]) -> dict[str, Any]:
    """The teacher's signal."""
    if run.config.engine.teacher_urls:
        return {"teacher": jax.device_get(teacher_by_servers(run, rows, usable=_usable(run)))}
    run.make_room("teacher")
    temperature, placed = run.config.sampling.temperature, on_mesh(rows, run.mesh)
    score = make_topk_scorer(
        run.teacher_model, k=run.config.loss.top_k, temperature=temperature, usable=_usable(run)
    )
    found: dict[str, Any] = {"teacher": score(run.teacher, placed)}
    if "student_topk" in extras:
        score_ids = make_ids_scorer(run.teacher_model, temperature=temperature)
        ids = on_mesh(told["student_topk_ids"], run.mesh)
        found["student_topk_teacher_logprobs"] = score_ids(run.teacher, placed, ids)
    return jax.device_get(found)


def _usable(run: Run) -> int:
    """Only ids that every model knows and the tokenizer means something by."""
    return min(run.usable, run.model.vocab_size, run.teacher_model.vocab_size)


def parts_of_round(config: Config, round_: int) -> list[np.ndarray]:
    """Which rollouts are computed together, in scoring as in training: the micro-batches of a round."""
    count = config.schedule.microbatches
    return [chosen[part::count] for chosen in minibatch_plan(config, round_) for part in range(count)]


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
