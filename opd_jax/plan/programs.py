"""The programs of a run, compiled for devices without filling them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax.config import Config
from opd_jax.model import Qwen3Config, param_shardings, parameter_table
from opd_jax.model.lora import lora_table, on_top
from opd_jax.model.parameters import Table, abstract_params
from opd_jax.model.sharding import batch_sharding
from opd_jax.plan.collectives import collective_bytes
from opd_jax.plan.flops import program_flops
from opd_jax.rollout.jax_engine import make_sampler
from opd_jax.rollout.score import make_scorer, make_topk_scorer
from opd_jax.train.computing import adapter_of, row_width
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.step import abstract_state, make_train_step, state_shardings
from opd_jax.types import Batch, Rows, Signal


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program; sizes are bytes on one device."""

    name: str
    arguments: dict[str, int]  # what it reads, by kind
    beside: dict[str, int]  # what lies on the device while it runs, and is not read
    temporary: int
    output: int  # that is not written over an argument
    code: int
    flops: int  # on one device, of matrix products; a sampler's are those of the prompt and one token
    traffic: dict[str, int]  # bytes received, by kind of collective; a sampler's likewise
    seconds: float  # to compile
    error: str = ""  # why it did not compile

    @property
    def total(self) -> int:
        parts = sum(self.arguments.values()) + sum(self.beside.values())
        return parts + self.temporary + self.output + self.code


def compile_programs(
    config: Config, student: Qwen3Config, teacher: Qwen3Config, mesh: Mesh, usable: int | None = None
) -> list[Program]:
    """Compile a run's sampler, scorers and train step.

    Args:
      config: the run.
      student, teacher: as `opd_jax.train.computing.computed` returns them for this mesh.
      mesh: of real or abstract devices.
      usable: ids that the tokenizer knows, all of the student's where nobody says.
    """
    usable = usable or student.vocab_size
    compute, together = config.model.compute_dtype, config.model.residency == "together"
    adapter = adapter_of(config)
    optimizer = make_optimizer(**dataclasses.asdict(config.optimizer))
    table = parameter_table(student)
    trained = lora_table(student, adapter) if adapter else table
    shardings = state_shardings(trained, optimizer, mesh)
    state = abstract_state(trained, optimizer, shardings)
    frozen = _placed(table, student, mesh, compute) if adapter else {}
    policy = on_top(frozen, state.params)
    taught = _placed(parameter_table(teacher), teacher, mesh, compute)
    kinds = {
        "student": bytes_on_device((state.params, frozen)),
        "optimizer": bytes_on_device((state.opt_state, state.update)),
        "teacher": bytes_on_device(taught),
    }

    def beside(*read: str) -> dict[str, int]:
        return {kind: size for kind, size in kinds.items() if together and kind not in read}

    sampling, schedule = config.sampling, config.schedule
    width = row_width(sampling, mesh.devices.flat[0].platform)
    rows = sampling.prompts * sampling.samples // schedule.minibatches // schedule.microbatches
    temperature = sampling.temperature
    draws = [jax.ShapeDtypeStruct((sampling.slots,), jnp.int32)] * 3
    prompts = jax.ShapeDtypeStruct((sampling.slots, sampling.max_prompt), jnp.int32)
    root = jax.ShapeDtypeStruct((2,), jnp.uint32)
    sampler = make_sampler(
        student,
        slots=sampling.slots,
        max_prompt=sampling.max_prompt,
        max_response=sampling.max_response,
        temperature=temperature,
        top_p=sampling.top_p,
        usable=usable,
    )
    topk = make_topk_scorer(
        teacher,
        k=config.loss.top_k,
        temperature=temperature,
        usable=min(usable, teacher.vocab_size),
    )
    step = make_train_step(
        student,
        config,
        optimizer,
        np.zeros(student.vocab_size, bool),
        shardings,
        mesh,
        param_shardings(student, mesh) if frozen else None,
    )
    read = {"student": kinds["student"]}
    minibatch = abstract_batch(config, rows * schedule.microbatches, width, mesh)
    part = abstract_batch(config, rows, width, mesh).rows
    return [
        _compile("sample", sampler, (policy, prompts, *draws, root), read, beside("student"), mesh),
        _compile(
            "score old",
            make_scorer(student, temperature=temperature),
            (policy, part),
            read,
            beside("student"),
            mesh,
        ),
        _compile(
            "score teacher", topk, (taught, part), {"teacher": kinds["teacher"]}, beside("teacher"), mesh
        ),
        _compile(
            "train",
            step,
            (state, minibatch, frozen),
            {"student": kinds["student"], "optimizer": kinds["optimizer"]},
            beside("student", "optimizer"),
            mesh,
        ),
    ]


def abstract_batch(config: Config, rows: int, width: int, mesh: Mesh) -> Batch:
    """Shapes and placement of one minibatch."""

    def array(dtype: Any, *last: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, width, *last), dtype, sharding=batch_sharding(mesh))

    k = config.loss.top_k
    ids, nats = array(jnp.int32), array(jnp.float32)
    return Batch(
        rows=Rows(tokens=ids, targets=ids, mask=array(jnp.bool_), sequence_ids=ids, positions=ids),
        signal=Signal(
            old=nats,
            teacher=nats,
            teacher_entropy=nats,
            support_ids=array(jnp.int32, k),
            support_logprobs=array(jnp.float32, k),
            reward=nats,
            group=ids,
            staleness=nats,
        ),
    )


def bytes_on_device(tree: Any) -> int:
    """Bytes that placed abstract arrays take on each device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _placed(table: Table, model: Qwen3Config, mesh: Mesh, dtype: str) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_params(table, jnp.dtype(dtype)),
        param_shardings(model, mesh),
    )


def _compile(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    read: dict[str, int],
    beside: dict[str, int],
    mesh: Mesh,
) -> Program:
    began = time.monotonic()
    with jax.set_mesh(mesh):
        flops = program_flops(function, *args) // mesh.size
        try:
            compiled = function.lower(*args).compile()  # type: ignore[attr-defined]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Program(name, read, beside, 0, 0, 0, flops, {}, time.monotonic() - began, _why(str(error)))
    memory = compiled.memory_analysis()
    return Program(
        name,
        {**read, "batch": max(memory.argument_size_in_bytes - sum(read.values()), 0)},
        beside,
        memory.temp_size_in_bytes,
        max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        memory.generated_code_size_in_bytes,
        flops,
        collective_bytes(compiled.as_text()),
        time.monotonic() - began,
    )


def _why(error: str) -> str:
    """The compiler's sentence on what was used of what there is."""
    size = r"[\d.]+\w+"
    found = re.search(
        rf"Used {size} of {size} \w+|HLO \w+ \({size}\) exceeds available \w+ \({size}\)", error
    )
    return found[0] if found else " ".join(error.split())[:120]
