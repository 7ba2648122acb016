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
from jax.sharding import Mesh, NamedSharding

from opd_jax.config import Config
from opd_jax.model import Qwen3Config, param_shardings, parameter_table
from opd_jax.model.lora import lora_table, on_top
from opd_jax.model.parameters import Table, abstract_params
from opd_jax.model.sharding import RULES, Rules, batch_sharding
from opd_jax.plan.collectives import collective_bytes
from opd_jax.plan.flops import program_flops
from opd_jax.plan.topology import uncached
from opd_jax.rollout.score import make_ids_scorer, make_scorer, make_topk_scorer
from opd_jax.rollout.slots import Group, Sampler, State, make_sampler, placement
from opd_jax.train.choices import stored_extras
from opd_jax.train.computing import adapter_of, row_width, teacher_rules
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
    flops: int  # on one device, of matrix products; of sample, those of one token a slot
    traffic: dict[str, int]  # bytes received, by kind of collective; of sample likewise
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
    elsewhere = bool(config.engine.teacher_urls)  # servers hold the teacher
    taught = _placed(parameter_table(teacher), teacher, mesh, compute, teacher_rules(config))
    extras = stored_extras(config)
    # An adapter stands on the student before training, which is then there already.
    base = _placed(table, student, mesh, "float32") if "reference" in extras and not adapter else {}
    kinds = {
        "student": bytes_on_device((state.params, frozen)),
        "optimizer": bytes_on_device((state.opt_state, state.update)),
        "teacher": 0 if elsewhere else bytes_on_device(taught),
        **({"base": bytes_on_device(base)} if base else {}),
    }

    def beside(*read: str) -> dict[str, int]:
        return {kind: size for kind, size in kinds.items() if together and kind not in read}

    sampling, schedule = config.sampling, config.schedule
    width = row_width(sampling, mesh.devices.flat[0].platform)
    # With schedule.rows: packed this is the most that there can be, when no two rollouts fit in a row.
    rows = sampling.prompts * sampling.samples // schedule.minibatches // schedule.microbatches
    temperature = sampling.temperature
    sampler = make_sampler(
        student,
        slots=sampling.slots,
        max_prompt=sampling.max_prompt,
        max_response=sampling.max_response,
        temperature=temperature,
        top_p=sampling.top_p,
        usable=usable,
        top_k=sampling.top_k,
        stop_ids=(student.eos_token_id, *sampling.stop_ids),
    )
    slots, group = abstract_slots(sampler, mesh)
    known = min(usable, teacher.vocab_size)
    score = make_scorer(student, temperature=temperature)
    topk = make_topk_scorer(
        teacher,
        k=config.loss.top_k,
        temperature=temperature,
        usable=known,
        hidden=config.store.teacher_hidden,
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
    read, reads_teacher = {"student": kinds["student"]}, {"teacher": kinds["teacher"]}
    drawing = {**read, "cache": bytes_on_device(slots)}
    empty = jax.ShapeDtypeStruct((sampling.slots,), jnp.bool_)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    minibatch = abstract_batch(config, rows * schedule.microbatches, width, mesh)
    part = abstract_batch(config, rows, width, mesh).rows
    more = []
    if "student_topk" in extras:
        likeliest = make_topk_scorer(student, k=config.loss.student_k, temperature=temperature, usable=known)
        of_ids = make_ids_scorer(teacher, temperature=temperature)
        ids = (taught, part, abstract_batch(config, rows, width, mesh).signal.student_ids)
        more = [
            _compile("score student's ids", likeliest, (policy, part), read, beside("student"), mesh),
        ]
        if not elsewhere:
            more.append(_compile("teacher of those ids", of_ids, ids, reads_teacher, beside("teacher"), mesh))
    if base:
        reads_base = {"base": kinds["base"]}
        more.append(_compile("score reference", score, (base, part), reads_base, beside("base"), mesh))
    drawn_here, taught_here = [], []
    if config.engine.kind == "jax":
        # The cache as full as it gets; while it is not, `JaxEngine` has programs that attend over less of it.
        steps = (policy, slots, empty, count, count, sampler.blocks(sampler.cache_slots))
        drawn_here = [
            _compile("prefill", sampler.fill, (policy, slots, group), drawing, beside("student"), mesh),
            _compile("sample", sampler.advance, steps, drawing, beside("student"), mesh),
        ]
    if not elsewhere:
        taught_here = [
            _compile("score teacher", topk, (taught, part), reads_teacher, beside("teacher"), mesh)
        ]
    return [
        *drawn_here,
        _compile("score old", score, (policy, part), read, beside("student"), mesh),
        *more,
        *taught_here,
        _compile(
            "train",
            step,
            (state, minibatch, frozen),
            {"student": kinds["student"], "optimizer": kinds["optimizer"]},
            beside("student", "optimizer"),
            mesh,
        ),
    ]


def abstract_slots(sampler: Sampler, mesh: Mesh) -> tuple[State, Group]:
    """Shapes and placement of a sampler's slots, and shapes of the prompts read into them at a time."""
    with jax.set_mesh(mesh):
        state, size = jax.eval_shape(sampler.begin), sampler.group
    state = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        state,
        placement(state),
    )
    each = jax.ShapeDtypeStruct((size,), jnp.int32)
    prompts = jax.ShapeDtypeStruct((size, sampler.max_prompt), jnp.int32)
    roots = jax.ShapeDtypeStruct((size, 2), jnp.uint32)
    return state, Group(prompts, each, each, each, each, each, roots)


def abstract_batch(config: Config, rows: int, width: int, mesh: Mesh) -> Batch:
    """Shapes and placement of one minibatch, with the columns that the config makes a store hold."""

    def array(dtype: Any, *last: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, width, *last), dtype, sharding=batch_sharding(mesh))

    k, extras = config.loss.top_k, stored_extras(config)
    ids, nats = array(jnp.int32), array(jnp.float32)
    of_student: dict[str, Any] = {}
    if "student_topk" in extras:
        chosen = array(jnp.float32, config.loss.student_k)
        of_student = {"student_old": chosen, "student_teacher": chosen}
        of_student["student_ids"] = array(jnp.int32, config.loss.student_k)
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
            again=nats if "again" in extras else None,
            reference=nats if "reference" in extras else None,
            **of_student,
        ),
    )


def bytes_on_device(tree: Any) -> int:
    """Bytes that placed abstract arrays take on each device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _placed(table: Table, model: Qwen3Config, mesh: Mesh, dtype: str, rules: Rules = RULES) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_params(table, jnp.dtype(dtype)),
        param_shardings(model, mesh, rules),
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
    with jax.set_mesh(mesh), uncached(mesh.devices.flat):
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
