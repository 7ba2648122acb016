"""The first half of collecting a round: rollouts from the present student, graded and stored."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import grain
import numpy as np

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted, Stop, never
from opd_jax.keys import derived_seed, stream
from opd_jax.processes import agreed, first_alone, is_first, wait_for_all
from opd_jax.rollout.engine import Request
from opd_jax.rollout.schema import check_rollout
from opd_jax.rollout.scratch import Arrays, Scratch, clear_work
from opd_jax.rollout.store import Rollout, RolloutStore
from opd_jax.tasks import Problem, decode_response, grade, prompt_ids
from opd_jax.train.choices import needs_groups
from opd_jax.train.engines import engine_of
from opd_jax.train.identity import note_policy, params_digest
from opd_jax.train.run import Run
from opd_jax.train.serving import server_engine

Found = TypeVar("Found")
Draws = Sequence[tuple[Problem, int]]  # of a round: each problem, and which sample of it
SECONDS = 5.0  # after which what is finished is kept
SHARD_ROWS = 256  # of a round in one file


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


def check_shape(store: RolloutStore, round_: int, rollouts: Sequence[Rollout], config: Config) -> None:
    """Refuse a round of another size: its minibatches would be of some rollouts, or of other groups.

    Raises:
      InputError: it is not ``sampling.samples`` rollouts each of ``sampling.prompts`` problems.
    """
    prompts, samples = config.sampling.prompts, config.sampling.samples
    groups = [{one.problem for one in rollouts[at : at + samples]} for at in range(0, len(rollouts), samples)]
    if len(rollouts) != prompts * samples or any(len(group) != 1 for group in groups):
        raise InputError(
            f"a round has sampling.prompts x sampling.samples rollouts, {prompts} x {samples} here: round "
            f"{round_} of {store.path} has {len(rollouts)} of {len({one.problem for one in rollouts})} "
            "problems; give the settings that it was drawn with"
        )


def sample_round(run: Run, stop: Stop) -> None:
    """Draw the next round's rollouts with the present student, grade and store them.

    Responses that are finished are kept every few seconds, and not drawn again after a kill. Once all are
    there, they are written in the order of their draws: the files do not tell how often a run was stopped.
    """
    round_, config = len(run.rollouts.rounds), run.config
    run.make_room("policy")
    draws = draws_of_round(config, run.problems, round_)
    # A sum over all devices, so all processes take part.
    made_by = {"policy": params_digest(run.state.params), "update": int(run.state.update)}
    asked = [[problem.id, number] for problem, number in draws]
    with writing(run.rollouts):
        place = run.rollouts.place
        # Of a process that was killed as it wrote them; and what cannot be added is not drawn.
        first_alone(lambda: run.rollouts.discard(round_))
        first_alone(lambda: note_policy(run.policies_file, made_by))
        if round_:  # of a process that was killed after it sealed
            first_alone(lambda: clear_work(place, round_ - 1))
        scratch = Scratch(place, round_, {"about": run.rollouts.about, **made_by, "draws": asked})
        prompts = _prompts(run, draws)
        pieces = found_by_all(scratch.found, f"rollouts of {round_}").values()
        drawn = {index: one for piece in pieces for index, one in _unpacked(piece, round_, draws, prompts)}
        for finished in batches(_drawn(run, round_, draws, prompts, drawn, stop), len(draws), SECONDS):
            for index, rollout in finished:
                check_rollout(rollout, f"rollout {index} of round {round_}")
            first_alone(functools.partial(scratch.keep, f"drawn-{finished[0][0]:05d}", _packed(finished)))
            drawn |= dict(finished)
            if stop():
                raise Interrupted
        rollouts = [drawn[index] for index in range(len(draws))]

        def store() -> None:
            for start in range(0, len(rollouts), SHARD_ROWS):
                run.rollouts.append(rollouts[start : start + SHARD_ROWS], **made_by)
            run.rollouts.seal(
                round_,
                **made_by,
                reward=float(np.mean([rollout.reward for rollout in rollouts])),
                truncated=float(np.mean([rollout.truncated for rollout in rollouts])),
            )
            clear_work(place, round_)

        first_alone(store)


def _packed(finished: Sequence[tuple[int, Rollout]]) -> Arrays:
    """Rollouts, and which draws of the round they are, as one piece of work."""
    rollouts = [one for _, one in finished]
    return {
        "draw": np.array([index for index, _ in finished]),
        "length": np.array([len(one.response_ids) for one in rollouts]),
        "ids": np.concatenate([one.response_ids for one in rollouts]),
        "logprobs": np.concatenate([one.behaviour_logprobs for one in rollouts]),
        "truncated": np.array([one.truncated for one in rollouts]),
        "reward": np.array([one.reward for one in rollouts]),
    }


def _unpacked(
    piece: Arrays, round_: int, draws: Draws, prompts: Mapping[str, np.ndarray]
) -> Iterator[tuple[int, Rollout]]:
    ends = np.cumsum(piece["length"])[:-1]
    ids, logprobs = (np.split(piece[name], ends) for name in ("ids", "logprobs"))
    told = zip(piece["draw"], ids, logprobs, piece["truncated"], piece["reward"], strict=True)
    for index, own_ids, own_logprobs, truncated, reward in told:
        problem, number = draws[index]
        prompt = prompts[problem.id]
        drawn = own_ids, own_logprobs, bool(truncated), float(reward)
        yield int(index), Rollout(round_, problem.id, number, prompt, *drawn)


def batches(drawn: Iterator[Found], size: int, patience: float) -> Iterator[list[Found]]:
    """What is drawn ``size`` at a time, or what came within so many seconds.

    What was finished before an engine failed, or was interrupted, comes out first.
    """
    batch: list[Found] = []
    began = time.monotonic()
    # Clocks differ, and all processes have to go on with the same.
    late = agreed(lambda: time.monotonic() - began > patience) if patience < math.inf else never
    try:
        for one in drawn:
            batch.append(one)
            if len(batch) == size or late():
                yield batch
                batch, began = [], time.monotonic()
    except GeneratorExit:  # nobody listens any more
        raise
    except BaseException:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _drawn(
    run: Run,
    round_: int,
    draws: Draws,
    prompts: Mapping[str, np.ndarray],
    done: Collection[int],
    stop: Stop,
) -> Iterator[tuple[int, Rollout]]:
    """Graded rollouts of the present student, all but those that are done, as they are finished."""
    left = [index for index in range(len(draws)) if index not in done]
    if not left:
        return
    requests = [
        Request(prompts[problem.id], problem.key, number) for problem, number in (draws[i] for i in left)
    ]
    if run.config.engine.kind == "server":
        drawn = server_engine(run, stop).draw(requests)
    else:
        root = stream(run.config.seed, "sample")
        drawn = engine_of(run, "student", run.config.sampling, root, stop).draw(requests)
    for index, generated in drawn:
        problem, number = draws[left[index]]
        text = decode_response(run.tokenizer, generated.ids)
        yield (
            left[index],
            Rollout(
                round=round_,
                problem=problem.id,
                sample=number,
                prompt_ids=prompts[problem.id],
                response_ids=generated.ids,
                behaviour_logprobs=generated.logprobs,
                truncated=generated.truncated,
                reward=float(grade(text, problem.answer)),
            ),
        )


def _prompts(run: Run, draws: Draws) -> dict[str, np.ndarray]:
    """The prompts of a round, as tokens, by their problem."""
    asked = {problem.id: problem.prompt for problem, _ in draws}
    return {name: prompt_ids(run.tokenizer, text, run.config.problems) for name, text in asked.items()}


@contextlib.contextmanager
def writing(store: RolloutStore) -> Iterator[None]:
    """The store's lock, for the process that writes."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(store)

        first_alone(lock)
        yield


def found_by_all(read: Callable[[], Found], what: str) -> Found:
    """What lies on the disk, for all processes alike: the first reads before the others, and none writes."""
    found: list[Found] = []
    first_alone(lambda: found.append(read()))
    if not is_first():
        found.append(read())
    wait_for_all(f"all found {what}")
    return found[0]
