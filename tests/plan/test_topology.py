"""Plans for TPUs that are not here, by their own compiler; skipped where that is not installed."""

import dataclasses
import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from opd_jax.errors import InputError
from opd_jax.lab import student, teacher
from opd_jax.model import make_mesh, parameter_table, preset
from opd_jax.model.parameters import abstract_params
from opd_jax.plan import devices_of
from opd_jax.plan.command import plan
from opd_jax.plan.programs import _why, abstract_slots, bytes_on_device
from opd_jax.plan.topology import memory_of, uncached
from opd_jax.rollout import make_sampler
from tests.conftest import tiny_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra tpu"),
]


@pytest.mark.parametrize(
    ("topology", "axes"),
    [
        ("v5e:4x4", {"fsdp": 8, "tensor": 2}),
        ("v5p:8x8x8", {"fsdp": 128, "tensor": 4}),
        ("v5e:2x4", {"fsdp": 3, "tensor": 2}),  # no block of the torus
    ],
)
def test_a_mesh_may_split_an_axis_of_the_torus(topology, axes):
    mesh = make_mesh(**axes, devices=devices_of(topology))
    assert {name: mesh.shape[name] for name in axes} == axes
    assert len({device.id for device in mesh.devices.flat}) == mesh.size


def test_a_mesh_that_a_pod_would_refuse_is_not_planned():
    with pytest.raises(InputError, match="has those of .* of 64; let .* multiply to 256"):
        make_mesh(fsdp=8, devices=devices_of("v5e:16x16"))


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_memory_of_a_device_is_what_the_compiler_has_of_it(topology):
    device = devices_of(topology)[0]
    memory = memory_of(device)

    def why(size):
        """What the compiler says of reading and writing this many bytes."""
        row = jax.ShapeDtypeStruct((size // 2 // 4,), jnp.float32, sharding=SingleDeviceSharding(device))
        try:
            with uncached([device]):
                jax.jit(lambda x: x + 1).lower(row).compile()
        except jax.errors.JaxRuntimeError as error:
            return _why(str(error))

    assert why(int(0.99 * memory)) is None
    said = why(int(1.02 * memory))
    assert said.endswith(f"exceeds available HBM ({memory / 2**30:.2f}G)")
    assert len(said) < 80


def test_the_programs_of_a_run_compile_for_a_tpu():
    config = tiny_config("--mesh.fsdp=4", "--model.compute_dtype=bfloat16", "--sampling.prompts=8")
    programs, memory, about = plan(config, str(student()), str(teacher()), "v5e:2x2")
    assert memory == 15.75 * 2**30
    assert "4 of 4 devices, TPU v5 lite" in about
    for program in programs:
        assert not program.error
        assert 0 < program.total < memory / 100
    assert programs[-1].traffic["all-gather"] > 0
    assert os.environ["TPU_SKIP_MDS_QUERY"]


@pytest.mark.parametrize("response", [1025, 1030])
def test_a_step_of_sampling_holds_its_cache_once(response):
    """Of a length that the compiler's tiles divide, and of one that they do not."""
    model = dataclasses.replace(preset("qwen3-0.6b"), num_hidden_layers=4, vocab_size=512, eos_token_id=0)
    sampler = make_sampler(
        model,
        slots=64,
        max_prompt=512,
        max_response=response,
        temperature=1.0,
        top_p=1.0,
        usable=512,
        block=4096,
    )
    mesh = make_mesh(devices=devices_of("v5p:2x2x1")[:1])
    slots, _ = abstract_slots(sampler, mesh)
    params = abstract_params(parameter_table(model), jnp.dtype(model.compute_dtype))
    empty, count = jax.ShapeDtypeStruct((64,), jnp.bool_), jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(mesh), uncached(mesh.devices.flat):
        compiled = sampler.advance.lower(params, slots, empty, count, count, None).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < bytes_on_device(slots.cache) / 4
