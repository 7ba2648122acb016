"""What inference servers do for a run: they draw with its student, and score for its teacher."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from opd_jax.config import EngineConfig
from opd_jax.errors import InputError
from opd_jax.interrupt import Stop, never
from opd_jax.model.hf_load import check_folder
from opd_jax.model.sharding import on_mesh
from opd_jax.rollout.rows import gather, make_rows
from opd_jax.rollout.score import make_scorer
from opd_jax.rollout.server import ServerEngine
from opd_jax.rollout.server_refresh import Probe, refresh
from opd_jax.rollout.server_score import teacher_rows
from opd_jax.rollout.servers import Servers
from opd_jax.tasks import prompt_ids
from opd_jax.train.engines import banned_ids
from opd_jax.train.export import write_policy
from opd_jax.train.run import Run
from opd_jax.types import Rows


def server_engine(run: Run, stop: Stop = never) -> ServerEngine:
    """What draws with the student as it is now: its weights are on the servers before a first request.

    It asks ``stop`` while requests are in flight.

    Raises:
      InputError: the run is of many processes, or asks for what servers cannot do.
    """
    if jax.process_count() > 1:
        raise InputError(
            f"servers draw for a run of one process: this one has {jax.process_count()}; sample with one "
            "process, or use engine.kind=jax"
        )
    sampling, engine = run.config.sampling, run.config.engine
    folder = run.folder / "policy"
    write_policy(run, folder)
    check_folder(folder)
    prepare = functools.partial(refresh, folder=folder, model=engine.model, probe=probe_of(run))
    return ServerEngine(
        servers=Servers(engine.urls, **_limits(engine), prepare=prepare),
        model=engine.model,
        seed=run.config.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_prompt=sampling.max_prompt,
        max_response=sampling.max_response,
        ends=tuple(run.stop_ids),
        usable=run.usable,
        banned=banned_ids(run),
        vocabulary=run.model.vocab_size,
        stop=stop,
    )


def probe_of(run: Run) -> Probe:
    """The run's first prompts, end to end, with what the student as it is now says of them."""
    sampling, config = run.config.sampling, run.config
    prompts = [prompt_ids(run.tokenizer, problem.prompt, config.problems) for problem in run.problems[:16]]
    text = np.concatenate(prompts)[: max(2, sampling.max_prompt)].tolist()
    ways = config.mesh.data * config.mesh.fsdp * config.mesh.expert  # rows split over so many devices
    rows = make_rows([text[:1]] * ways, [text[1:]] * ways, run.width)
    read = make_scorer(run.model, temperature=1.0)(run.policy, on_mesh(rows, run.mesh))
    return Probe(
        text,
        gather(jax.device_get(read), rows.mask)[0],
        tolerance=config.engine.tolerance,
        drawn=max(1, min(16, sampling.max_response - 1)),
    )


def teacher_by_servers(
    run: Run, rows: Rows, *, usable: int, stop: Stop = never
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The teacher's signal from ``engine.teacher_urls``, row by row as it comes.

    Its entropy stays unknown. It asks ``stop`` while requests are in flight.

    Yields:
      The number of a row, and columns of `Score` by name, ``[R]`` and ``[R, K]``.
    """
    engine = run.config.engine
    told = teacher_rows(
        _teachers(engine),
        engine.teacher_model,
        rows,
        run.config.loss.top_k,
        usable=usable,
        vocabulary=run.teacher_model.vocab_size,
        stop=stop,
    )
    names = "teacher_logprobs", "teacher_topk_ids", "teacher_topk_logprobs"
    for row, columns in told:
        yield row, dict(zip(names, columns, strict=True))


@functools.lru_cache(maxsize=1)
def _teachers(engine: EngineConfig) -> Servers:
    """One for all rounds: a server that stalled in one is set aside in the next, too."""
    return Servers(engine.teacher_urls, **_limits(engine))


def _limits(engine: EngineConfig) -> dict[str, Any]:
    return {"concurrency": engine.concurrency, "timeout": engine.timeout, "attempts": engine.attempts}
