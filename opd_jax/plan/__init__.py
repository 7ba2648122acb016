"""What a run will take of the devices, found out before it begins: memory, operations, traffic."""

from opd_jax.plan.programs import Program, compile_programs
from opd_jax.plan.topology import devices_of

__all__ = ["Program", "compile_programs", "devices_of"]
