"""Plans for GPUs that are not here: by their own compiler where that is installed, and refused in words."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from opd_jax.errors import InputError
from opd_jax.lab import student, teacher
from opd_jax.model.forward import empty_cache
from opd_jax.model.presets import preset
from opd_jax.plan import devices_of
from opd_jax.plan.command import plan
from opd_jax.plan.gpus import GPUS, SHARE, gpu_memory
from opd_jax.plan.topology import GIB, memory_of
from tests.conftest import tiny_config

INSTALLED = bool(
    importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")
)
compiled = pytest.mark.skipif(not INSTALLED, reason="needs the extra gpu")


@pytest.mark.parametrize(
    "topology",
    ["h100:", "h100:0", "h100:8x", "h100:x8", "h100:2x2x2", "t4:-1", "h100:eight", "h100:5000x5000"],
)
def test_a_topology_of_gpus_that_is_none_is_refused(topology):
    with pytest.raises(InputError, match="use h100:8 or h100:2x8"):
        devices_of(topology)


@pytest.mark.skipif(INSTALLED, reason="it is installed")
def test_without_their_compiler_the_extra_is_named():
    with pytest.raises(InputError, match="install the extra gpu"):
        devices_of("h100:8")


@pytest.fixture
def environment(monkeypatch):
    for name in SHARE:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", SHARE)
@pytest.mark.parametrize(("share", "gib"), [(None, 59.33), ("", 59.33), ("0.95", 75.15)])
def test_memory_is_the_share_that_jax_takes(environment, name, share, gib):
    if share is not None:
        environment.setenv(name, share)
    assert gpu_memory(GPUS["h100"].kind) == pytest.approx(gib * GIB, rel=1e-3)
    assert gpu_memory("a kind nobody knows") is None


@pytest.mark.parametrize("share", ["abc", "75%", "nan", "inf", "0", "-1"])
def test_a_share_that_is_none_is_refused(environment, share):
    environment.setenv(SHARE[1], share)
    with pytest.raises(InputError, match=f"must be a number above 0: got {SHARE[1]}={share}"):
        devices_of("h100")


def test_a_share_is_given_once(environment):
    for name in SHARE:
        environment.setenv(name, "0.9")
    with pytest.raises(InputError, match="is given once"):
        devices_of("h100")


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("name", GPUS)
def test_devices_say_what_they_are(name):
    hosts = devices_of(f"{name}:2x4")
    assert [device.process_index for device in hosts] == [0] * 4 + [1] * 4
    assert {device.platform for device in hosts} == {"gpu"}
    assert {device.device_kind for device in hosts} == {GPUS[name].kind}
    assert {device.compute_capability for device in hosts} == {"{}.{}".format(*GPUS[name].capability)}
    assert memory_of(hosts[0]) == gpu_memory(GPUS[name].kind)


@pytest.mark.slow
@compiled
def test_gpus_are_planned_for_where_jax_is_at_work_already():
    """It looked for a driver when it began, and none was here."""
    code = "import jax; jax.devices(); from opd_jax.plan import devices_of; print(len(devices_of('h100:8')))"
    apart = ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    env = {name: value for name, value in os.environ.items() if name not in apart}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "8", done.stderr


@pytest.mark.slow
@compiled
def test_the_programs_of_a_run_compile_for_gpus():
    config = tiny_config("--mesh.fsdp=4", "--model.compute_dtype=bfloat16", "--sampling.prompts=8")
    programs, memory, about = plan(config, str(student()), str(teacher()), "a100-80gb:4")
    assert "4 of 4 devices, NVIDIA A100-SXM4-80GB" in about
    assert "attention kernel cudnn" in about
    for program in programs:
        assert not program.error
        assert 0 < program.total < memory / 100
    here, _, _ = plan(config, str(student()), str(teacher()), "local")
    for there, same in zip(programs, here, strict=True):
        for kind in ("student", "teacher", "optimizer"):
            assert there.arguments.get(kind) == same.arguments.get(kind)
    assert programs[-1].traffic["all-gather"] > 0


@pytest.mark.slow
@compiled
def test_a_step_of_sampling_holds_its_cache_once():
    config = tiny_config("--sampling.slots=64", "--sampling.max_prompt=1024", "--sampling.max_response=1025")
    programs, _, _ = plan(config, "qwen3-0.6b", "qwen3-0.6b", "h100")
    model = dataclasses.replace(preset("qwen3-0.6b"), compute_dtype="float32")
    cache = jax.eval_shape(lambda: empty_cache(model, 64, 2048))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    (sampling,) = (program for program in programs if program.name == "sample")
    assert sampling.arguments["cache"] >= size
    assert sampling.temporary < size / 4
