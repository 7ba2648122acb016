"""The first half of collecting a round: rollouts from the present student, graded and stored."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import grain
import numpy as np

from opd_jax.config import Config
from opd_jax.interrupt import Interrupted, Stop
from opd_jax.keys import derived_seed, stream
from opd_jax.processes import first_alone, is_first, wait_for_all
from opd_jax.rollout.engine import Request, in_order
from opd_jax.rollout.store import Rollout, RolloutStore
from opd_jax.tasks import Problem, decode_response, grade, prompt_ids
from opd_jax.train.choices import needs_groups
from opd_jax.train.engines import engine_of
from opd_jax.train.identity import params_digest
from opd_jax.train.run import Run
from opd_jax.train.serving import server_engine

Found = TypeVar("Found")
SECONDS = 5.0  # after which what servers have finished is stored


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

    Whenever ``sampling.slots`` of them are drawn they are stored, those of servers every few seconds; what
    a process that was killed had stored is not drawn again.
    """
    round_, config = len(run.rollouts.rounds), run.config
    run.make_room("policy")
    draws = draws_of_round(config, run.problems, round_)
    # A sum over all devices, so all processes take part.
    made_by = {"policy": params_digest(run.state.params), "update": int(run.state.update)}
    with writing(run.rollouts):
        rollouts = found_by_all(lambda: run.rollouts.pending(round_, **made_by), f"rollouts of {round_}")
        done = {(rollout.problem, rollout.sample) for rollout in rollouts}
        left = [(problem, number) for problem, number in draws if (problem.id, number) not in done]
        patience = SECONDS if config.engine.kind == "server" else math.inf
        for finished in batches(_drawn(run, round_, left, stop), config.sampling.slots, patience):
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


def batches(drawn: Iterator[Found], size: int, patience: float) -> Iterator[list[Found]]:
    """What is drawn ``size`` at a time, or what came within so many seconds.

    What was finished before an engine failed, or was interrupted, comes out first.
    """
    batch: list[Found] = []
    began = time.monotonic()
    try:
        for one in drawn:
            batch.append(one)
            if len(batch) == size or time.monotonic() - began > patience:
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


def _drawn(run: Run, round_: int, draws: Sequence[tuple[Problem, int]], stop: Stop) -> Iterator[Rollout]:
    """Graded rollouts of the present student, as they are finished."""
    if not draws:
        return
    asked = {problem.id: problem.prompt for problem, _ in draws}
    prompts = {name: prompt_ids(run.tokenizer, text, run.config.problems) for name, text in asked.items()}
    requests = [Request(prompts[problem.id], problem.key, number) for problem, number in draws]
    if run.config.engine.kind == "server":
        drawn = server_engine(run, stop).draw(requests)
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
