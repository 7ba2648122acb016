"""The engine that a run's config names, and what servers do for a run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from opd_jax.errors import InputError
from opd_jax.keys import stream
from opd_jax.model.hf_load import check_folder
from opd_jax.model.sharding import on_mesh
from opd_jax.model.vocab import TopK
from opd_jax.rollout.engine import Engine, Generated, Request
from opd_jax.rollout.jax_engine import Sampler, make_sampler, sample
from opd_jax.rollout.rows import gather, make_rows
from opd_jax.rollout.score import make_scorer, rows_of
from opd_jax.rollout.server import ServerEngine
from opd_jax.rollout.server_refresh import Probe, refresh
from opd_jax.rollout.server_score import teacher_topk
from opd_jax.rollout.servers import Servers
from opd_jax.rollout.store import Rollout
from opd_jax.tasks import encode_prompt
from opd_jax.train.export import write_policy
from opd_jax.train.run import Run
from opd_jax.types import Params, Rows


@dataclasses.dataclass(frozen=True)
class JaxEngine:
    """The JAX sampler as an `Engine`."""

    sampler: Sampler
    params: Params
    root: jax.Array
    slots: int
    max_prompt: int
    logprob_temperature: float

    name = "jax"

    def draw(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generated]]:
        """Yield ``(index of a request, what was drawn)``, in order."""
        return enumerate(
            sample(
                self.sampler, self.params, requests, self.root, slots=self.slots, max_prompt=self.max_prompt
            )
        )


def engine_of(run: Run) -> Engine:
    """What draws with the student as it is now; servers are given its weights before their first request."""
    run.make_room("policy")
    return _server_engine(run) if run.config.engine.kind == "server" else _jax_engine(run)


def _jax_engine(run: Run) -> JaxEngine:
    sampling = run.config.sampling
    sampler = make_sampler(
        run.model,
        slots=sampling.slots,
        max_prompt=sampling.max_prompt,
        max_response=sampling.max_response,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        usable=run.usable,
    )
    root = stream(run.config.seed, "sample")
    return JaxEngine(sampler, run.policy, root, sampling.slots, sampling.max_prompt, sampling.temperature)


def _server_engine(run: Run) -> ServerEngine:
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
        servers=_servers(run, engine.urls, prepare),
        model=engine.model,
        seed=run.config.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_prompt=sampling.max_prompt,
        max_response=sampling.max_response,
        eos=run.model.eos_token_id,
        usable=run.usable,
        vocabulary=run.model.vocab_size,
    )


def _servers(run: Run, urls: Sequence[str], prepare: Any = None) -> Servers:
    engine = run.config.engine
    return Servers(
        urls,
        concurrency=engine.concurrency,
        timeout=engine.timeout,
        attempts=engine.attempts,
        prepare=prepare,
    )


def probe_of(run: Run) -> Probe:
    """The run's first prompts, end to end, with what the student as it is now says of them."""
    sampling, config = run.config.sampling, run.config
    prompts = [encode_prompt(run.tokenizer, problem.prompt) for problem in run.problems[:16]]
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


def like_with_like(run: Run, rollouts: Sequence[Rollout], parts: Sequence[np.ndarray]) -> Sequence[Rollout]:
    """Scored rollouts whose `old` is read at the temperature that their behaviour log-probs are of.

    It is the same one but where servers drew at another than 1: for the mismatch metric, not for training.
    ``parts`` says which are read together.
    """
    stored = run.rollouts.about_store.get("logprob_temperature", run.config.sampling.temperature)
    if stored == run.config.sampling.temperature:
        return rollouts
    run.make_room("policy")
    scorer, alike = make_scorer(run.model, temperature=float(stored)), list(rollouts)
    for chosen in parts:
        rows = rows_of([rollouts[index] for index in chosen], run.width)
        read = jax.device_get(scorer(run.policy, on_mesh(rows, run.mesh)))
        for index, old in zip(chosen, gather(read, rows.mask), strict=True):
            score = rollouts[index].score
            assert score is not None
            alike[index] = dataclasses.replace(
                rollouts[index], score=dataclasses.replace(score, old_logprobs=old)
            )
    return alike


def teacher_by_servers(run: Run, rows: Rows, *, usable: int) -> TopK:
    """The teacher's signal from ``engine.teacher_urls``; its entropy stays unknown."""
    engine = run.config.engine
    servers = _servers(run, engine.teacher_urls)
    return teacher_topk(
        servers,
        engine.teacher_model,
        rows,
        run.config.loss.top_k,
        usable=usable,
        vocabulary=run.teacher_model.vocab_size,
    )
