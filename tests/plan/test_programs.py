"""What a plan says of a program that its devices do not hold."""

import math
import types

import jax
import pytest

from opd_jax.plan.programs import _why
from opd_jax.plan.topology import GIB, memory_of, uncached


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(15.89G) exceeds available HBM (15.75G).",
            "HLO temporaries (15.89G) exceeds available HBM (15.75G)",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 20.15G of 15.75G hbm. Exceeded hbm capacity by 4.40G.",
            "Used 20.15G of 15.75G hbm",
        ),
        ("RESOURCE_EXHAUSTED: Out of memory\nwhile trying", "RESOURCE_EXHAUSTED: Out of memory while trying"),
    ],
)
def test_the_sentence_on_what_was_used_is_found(error, said):
    assert _why(error) == said


@pytest.mark.parametrize(
    ("kind", "gib"),
    [("TPU v4", 30.75), ("TPU v5 lite", 15.75), ("TPU v5", 95.74), ("TPU v6 lite", 31.25), ("TPU7x", 94.75)],
)
def test_memory_is_what_the_compiler_has_not_what_is_built_in(kind, gib):
    device = types.SimpleNamespace(device_kind=kind, platform="tpu")
    assert memory_of(device) == pytest.approx(gib * GIB, abs=1)


def test_nothing_is_kept_of_programs_for_devices_elsewhere():
    """JAX could not load them, and would say so at every further plan."""
    seconds = lambda: jax.config.jax_persistent_cache_min_compile_time_secs  # noqa: E731
    before = seconds()
    with uncached(["a device elsewhere"]):
        assert seconds() == math.inf
    assert seconds() == before
    with uncached(jax.devices()):
        assert seconds() == before
