"""What draws rollouts with the models of a run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax

from opd_jax.config import EvaluationConfig, SamplingConfig
from opd_jax.errors import InputError
from opd_jax.interrupt import Stop, never
from opd_jax.model.config_json import read_stop_ids
from opd_jax.rollout import JaxEngine, make_sampler, stop_finder
from opd_jax.tasks import decode_response
from opd_jax.tasks.vocabulary import special_ids, unused_ids
from opd_jax.train.run import Run

Who = Literal["student", "base", "teacher"]


def engine_of(
    run: Run,
    who: Who,
    drawing: SamplingConfig | EvaluationConfig,
    root: jax.Array,
    stop: Stop = never,
) -> JaxEngine:
    """The JAX sampler of one of a run's models.

    Args:
      run: the run.
      who: the ``student`` as it is now, the ``base`` it began as, or the ``teacher``.
      drawing: temperature, top-p and top-k; all else is as in sampling.
      root: key of the stream.
      stop: asked while it draws.

    Raises:
      InputError: an id in ``sampling.stop_ids`` is outside the vocabulary.
    """
    sampling, teacher = run.config.sampling, who == "teacher"
    model = run.teacher_model if teacher else run.model
    folder = run.teacher_folder if teacher else run.student_folder
    check_ids(run)
    ends = (*read_stop_ids(folder), *sampling.stop_ids)
    sampler = make_sampler(
        model,
        slots=sampling.slots,
        max_prompt=sampling.max_prompt,
        max_response=sampling.max_response,
        temperature=drawing.temperature,
        top_p=drawing.top_p,
        top_k=drawing.top_k,
        usable=run.usable,
        stop_ids=ends,
        banned=banned_ids(run, ends),
    )
    params = {"student": lambda: run.policy, "base": lambda: run.base, "teacher": lambda: run.teacher}[who]()
    text = functools.partial(decode_response, run.tokenizer)
    find_stop = stop_finder(sampling.stop, text) if sampling.stop else None
    return JaxEngine(sampler, params, root, find_stop=find_stop, stop=stop)


def check_ids(run: Run) -> None:
    """Refuse listed ids that no token has.

    Raises:
      InputError: one in ``sampling.stop_ids`` or ``loss.special_ids`` is outside the vocabulary.
    """
    for what, name, listed in (
        ("a stop id", "sampling.stop_ids", run.config.sampling.stop_ids),
        ("a special token", "loss.special_ids", run.config.loss.special_ids),
    ):
        for id_ in listed:
            if not 0 <= id_ < run.usable:
                raise InputError(
                    f"{what} must be in the vocabulary: {name} has {id_}, the tokenizer {run.usable} ids; "
                    "correct it"
                )


def banned_ids(run: Run, ends: Sequence[int] | None = None) -> tuple[int, ...]:
    """Ids that are never drawn: those that mean nothing, and special ones where the config says so.

    ``ends`` are those that end a response, the student's by default.
    """
    ends = run.stop_ids if ends is None else ends
    specials = special_ids(run.tokenizer, ends) if run.config.sampling.ban_special else ()
    return (*unused_ids(run.tokenizer), *specials)
