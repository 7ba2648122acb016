"""Where everything of a train step lies on the devices of three topologies that nobody here owns.

    python -m tests.golden.shardings      writes tests/golden/*.json anew; read the difference first

Parameters and optimizer slots are those of the state. Activations are what `constrain` pins in the whole
step, forward and backward, and what the functions of one device's part take and give in the forward pass
(backward it is the same, and residuals that differ between versions of jax).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from opd_jax.config import Config
from opd_jax.model import parameter_table, preset, token_logprobs
from opd_jax.model.sharding import MESH_AXES, partition
from opd_jax.plan.programs import abstract_batch
from opd_jax.rollout.slots import Group, make_sampler
from opd_jax.settings import load_config
from opd_jax.train.optimizer import make_optimizer
from opd_jax.train.step import abstract_state, make_train_step, state_shardings

FOLDER = Path(__file__).parent
LENGTH = 256  # positions of a row: no sharding depends on it


class Case(NamedTuple):
    """A student on a topology."""

    model: str
    mesh: tuple[int, int, int, int]  # data, fsdp, expert, tensor
    rows: int  # an update


CASES = {
    "v5e-16x16": Case("qwen3-1.7b", (1, 32, 1, 8), 32),
    "v5p-8x8x8": Case("qwen3-8b", (2, 64, 1, 4), 128),
    "v6e-16x16-experts": Case("qwen3-30b-a3b", (1, 16, 8, 2), 128),
}


def describe(case: Case) -> dict[str, Any]:
    """Every sharding of a case: whole shape, partition, and the part of one device."""
    mesh = AbstractMesh(case.mesh, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    model, config = preset(case.model), load_config(None, [])
    optimizer = make_optimizer(config.optimizer.learning_rate)
    table = parameter_table(model)
    shardings = state_shardings(table, optimizer, mesh)  # type: ignore[arg-type]
    state = abstract_state(table, optimizer, shardings)
    return {
        "model": case.model,
        "mesh": dict(zip(MESH_AXES, case.mesh, strict=True)),
        "parameters": _of_tree(state.params),
        "optimizer": _of_tree(state.opt_state),
        "activations": _activations(case, config, state, shardings, optimizer, mesh),
    }


def _activations(
    case: Case, config: Config, state: Any, shardings: Any, optimizer: Any, mesh: Any
) -> list[str]:
    model = preset(case.model)
    step = make_train_step(model, config, optimizer, np.zeros(model.vocab_size, bool), shardings, mesh)
    batch = abstract_batch(config, case.rows, LENGTH, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        whole = jax.make_jaxpr(step)(state, batch, {})
        forward = jax.make_jaxpr(lambda params, rows: token_logprobs(params, rows, model))(
            state.params, batch.rows
        )
    found: dict[str, None] = {}  # in order, each once

    def note(how: str, variable: Any, spec: Any) -> None:
        x = variable.aval
        found[f"{how} {x.dtype} {_line(x.shape, NamedSharding(mesh, spec))}"] = None

    for equation in _equations(whole.jaxpr):
        if equation.primitive.name == "sharding_constraint":
            note("pinned", equation.invars[0], equation.params["sharding"].spec)
    for equation in _equations(forward.jaxpr):
        if equation.primitive.name == "shard_map":
            for variable, spec in zip(equation.invars, equation.params["in_specs"], strict=True):
                note("taken", variable, spec)
            for variable, spec in zip(equation.outvars, equation.params["out_specs"], strict=True):
                note("given", variable, spec)
    return [*found, *_counted(case, config, state, batch, forward, mesh)]


def _counted(case: Case, config: Config, state: Any, batch: Any, forward: Any, mesh: Any) -> list[str]:
    """How often each thing is pinned in one reading of a row, of prompts, and of a token."""
    sampler = make_sampler(
        dataclasses.replace(preset(case.model), attention="splash"),
        slots=case.rows,
        max_prompt=LENGTH,
        max_response=LENGTH,
        temperature=1.0,
        top_p=0.9,
        usable=preset(case.model).vocab_size,
    )
    with jax.sharding.use_abstract_mesh(mesh):
        slots = jax.eval_shape(sampler.begin)
        each = jax.ShapeDtypeStruct((sampler.group,), np.int32)
        prompts = jax.ShapeDtypeStruct((sampler.group, LENGTH), np.int32)
        roots = jax.ShapeDtypeStruct((sampler.group, 2), np.uint32)
        group = Group(prompts, each, each, each, each, each, roots)
        flags, count = jax.ShapeDtypeStruct((case.rows,), bool), jax.ShapeDtypeStruct((), np.int32)
        programs = {
            "forward": forward,
            "prefill": jax.make_jaxpr(sampler.fill)(state.params, slots, group),
            "a token": jax.make_jaxpr(sampler.advance)(state.params, slots, flags, count, count, None),
        }
    lines = []
    for name, program in programs.items():
        pinned = Counter(
            _line(equation.invars[0].aval.shape, NamedSharding(mesh, equation.params["sharding"].spec))
            for equation in _equations(program.jaxpr)
            if equation.primitive.name == "sharding_constraint"
        )
        lines += [f"{name}: {times} x {line}" for line, times in pinned.items()]
    return lines


def _equations(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def _of_tree(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): _line(x.shape, x.sharding) for path, x in leaves}


def _line(shape: tuple[int, ...], sharding: NamedSharding) -> str:
    """``[151936, 2048] by (tensor, fsdp) -> [18992, 64]``."""
    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    batch = partition("batch")[0]
    names = [
        "batch" if place == batch else "+".join(place) if isinstance(place, tuple) else place or "-"
        for place in spec
    ]
    return f"{list(shape)} by ({', '.join(names)}) -> {list(sharding.shard_shape(shape))}"


if __name__ == "__main__":
    for name, case in CASES.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(describe(case), indent=1) + "\n")
