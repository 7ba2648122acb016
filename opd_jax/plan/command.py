"""``opd plan``: what a run will take of devices, before it begins."""

from __future__ import annotations

from collections.abc import Sequence

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.model import Qwen3Config, preset
from opd_jax.model.config_json import read_model_config
from opd_jax.model.presets import PRESETS
from opd_jax.plan.programs import Program, compile_programs
from opd_jax.plan.report import fits
from opd_jax.plan.topology import GIB, devices_of, memory_of
from opd_jax.train.combinations import check_choices
from opd_jax.train.computing import computed, kernel_of, mesh_of
from opd_jax.train.run import Run
from opd_jax.train.sources import model_folder


def model_of(source: str, name: str) -> Qwen3Config:
    """The dimensions of a published size or of a checkpoint folder; no weights are read."""
    if source.lower() in PRESETS:
        return preset(source)
    try:
        folder = model_folder(source, name)
    except InputError as error:
        raise InputError(f"{error}, or name one of {', '.join(PRESETS)}") from None
    return read_model_config(folder)


def plan(config: Config, student: str, teacher: str, topology: str) -> tuple[list[Program], int | None, str]:
    """Compile a run for a topology.

    Returns:
      The programs, the memory of one device where it is known, and a line on devices and kernel.

    Raises:
      InputError: the mesh is larger than the topology, or the settings do not fit each other.
    """
    check_choices(config)
    devices = devices_of(topology)
    mesh = mesh_of(config, devices)
    models = model_of(student, "--model"), model_of(teacher, "--teacher")
    kernel = kernel_of(models[0], config, mesh)
    student_model, teacher_model = (computed(model, config, mesh) for model in models)
    programs = compile_programs(config, student_model, teacher_model, mesh)
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    about = f"{mesh.size} of {len(devices)} devices, {devices[0].device_kind}, {shape}; {kernel}"
    return programs, memory_of(devices[0]), about


def peak_of(run: Run) -> str:
    """A line on the most memory that a run will take of a device, found before its models are loaded.

    Raises:
      InputError: it is more than there is.
    """
    check_choices(run.config)
    programs = compile_programs(run.config, run.model, run.teacher_model, run.mesh, run.usable)
    memory = memory_of(run.mesh.local_devices[0])  # others' devices do not tell
    check_fit(programs, memory)
    most = max(programs, key=lambda program: program.total)
    of = "" if memory is None else f" of {memory / GIB:.2f}"
    return f"peak: {most.total / GIB:.2f}{of} GiB on a device, in {most.name}"


def check_fit(programs: Sequence[Program], memory: int | None) -> None:
    """Refuse a run with a program that takes more than ``memory`` bytes of a device."""
    if any(fits(program, memory) is False for program in programs):
        raise InputError(
            "a run must fit its devices: it does not; split weights further (mesh.fsdp, mesh.tensor), take "
            "fewer rows at a time (schedule.microbatches, sampling.slots), or set model.residency to "
            "sequential"
        )
