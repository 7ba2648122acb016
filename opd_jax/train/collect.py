"""The first half of a round: sample rollouts from the student, and score them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import grain
import jax
import numpy as np

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.keys import derived_seed, stream
from opd_jax.model.sharding import batch_sharding
from opd_jax.rollout.jax_engine import Request, make_sampler, sample
from opd_jax.rollout.score import (
    attach,
    check_rollouts,
    make_old_scorer,
    make_teacher_scorer,
    mismatch,
    rows_of,
)
from opd_jax.rollout.store import Rollout
from opd_jax.tasks import Problem, decode_response, encode_prompt, grade
from opd_jax.train.interrupt import Interrupted, Stop
from opd_jax.train.metrics import append_timing
from opd_jax.train.run import Run, params_digest


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
    on rows of the same composition.
    """
    count = config.sampling.prompts * config.sampling.samples
    seed = derived_seed(config.seed, "minibatches", round_)
    order = grain.MapDataset.range(count).shuffle(seed=seed)
    shuffled = np.array([order[index] for index in range(count)])
    return shuffled.reshape(config.schedule.minibatches, -1)


def sample_round(run: Run, stop: Stop) -> None:
    """Draw the next round's rollouts with the present student, grade and store them."""
    began, round_, config = time.monotonic(), len(run.rollouts.rounds), run.config
    draws = draws_of_round(config, run.problems, round_)
    prompts = {problem.id: encode_prompt(run.tokenizer, problem.prompt) for problem, _ in draws}
    generated = sample(
        make_sampler(
            run.model,
            slots=config.sampling.slots,
            max_prompt=config.sampling.max_prompt,
            max_response=config.sampling.max_response,
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            usable=len(run.tokenizer),
        ),
        run.state.params,
        [Request(prompts[problem.id], problem.key, number) for problem, number in draws],
        stream(config.seed, "sample"),
        slots=config.sampling.slots,
        max_prompt=config.sampling.max_prompt,
    )
    rollouts = []
    for (problem, number), drawn in zip(draws, generated, strict=True):
        if stop():
            raise Interrupted
        text = decode_response(run.tokenizer, drawn.ids)
        rollouts.append(
            Rollout(
                round=round_,
                problem=problem.id,
                sample=number,
                prompt_ids=prompts[problem.id],
                response_ids=drawn.ids,
                behaviour_logprobs=drawn.logprobs,
                truncated=drawn.truncated,
                reward=float(grade(text, problem.answer)),
            )
        )
    run.rollouts.append(rollouts)
    run.rollouts.seal(
        round_,
        update=int(run.state.update),
        policy=params_digest(run.state.params),
        reward=float(np.mean([rollout.reward for rollout in rollouts])),
        truncated=float(np.mean([rollout.truncated for rollout in rollouts])),
    )
    append_timing(run.timings_file, "sample", round_, began)


def score_round(run: Run, stop: Stop) -> None:
    """Attach `old` and the teacher's signal to the newest round of rollouts."""
    began, round_, config = time.monotonic(), len(run.scored.rounds), run.config
    if run.rollouts.shard(round_)["policy"] != params_digest(run.state.params):
        raise InputError(
            f"old log-probs are read by the policy that sampled: the student in {run.folder} is not "
            f"the one that drew round {round_}; restore its checkpoint, or start a new run folder"
        )
    rollouts = run.rollouts.read(round_)
    teacher_config, teacher = run.teacher
    check_rollouts(rollouts, {"student": run.model.vocab_size, "teacher": teacher_config.vocab_size})
    temperature = config.sampling.temperature
    score_old = make_old_scorer(run.model, temperature=temperature)
    score_teacher = make_teacher_scorer(teacher_config, k=config.loss.top_k, temperature=temperature)
    scored: dict[int, Rollout] = {}
    for chosen in minibatch_plan(config, round_):
        if stop():
            raise Interrupted
        members = [rollouts[index] for index in chosen]
        rows = rows_of(members, run.width)
        placed = jax.device_put(rows, batch_sharding(run.mesh))
        old = jax.device_get(score_old(run.state.params, placed))
        signal = jax.device_get(score_teacher(teacher, placed))
        scored.update(zip(chosen.tolist(), attach(members, rows, old, signal), strict=True))
    in_order = [scored[index] for index in range(len(rollouts))]
    run.scored.append(in_order)
    run.scored.seal(round_, mismatch=mismatch(in_order))
    append_timing(run.timings_file, "score", round_, began)
