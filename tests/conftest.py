"""One tiny configuration, eight fake devices, and a compile cache shared by all workers."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

# Before JAX is first used: fake devices for sharding, and programs compiled once for all runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["TQDM_DISABLE"] = "1"
# Most programs run for milliseconds and are compiled for seconds: without optimisations, and with XLA's
# older emitters of fused loops, in half the time. What is tested in programs of its own (the keystone, the
# command line) is compiled as users have it: see `as_users_have_it`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
OLDER_EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {OLDER_EMITTERS}".strip()

from opd_jax.backend import sum_in_one_order

sum_in_one_order()

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

from opd_jax.config import Config
from opd_jax.lab import student
from opd_jax.model import Qwen3Config, init_params, load_pretrained
from opd_jax.settings import load_config
from opd_jax.tasks import load_tokenizer
from opd_jax.types import Params

# Short chains, few rollouts: a round takes a second once compiled. The sampler's limit is too short
# for whole answers on purpose, so that truncated and ended responses both occur.
TINY = (
    "--problems.train=tests.world:short_train --problems.heldout=tests.world:short_heldout "
    "--sampling.prompts=4 --sampling.samples=4 --sampling.max_prompt=16 --sampling.max_response=40 "
    "--sampling.slots=16 --schedule.rounds=2 --schedule.passes=2 --schedule.minibatches=2 "
    "--gate.block=8 --optimizer.learning_rate=3e-3 --evaluation.samples=2 --log.diagnose_every=0"
).split()


def tiny_config(*overrides: str) -> Config:
    """The lab's config, cut down to seconds."""
    return load_config(Path(__file__).parent.parent / "configs" / "lab.yaml", [*TINY, *overrides])


def as_users_have_it() -> dict[str, str]:
    """The environment of a program that is compiled with all optimisations."""
    found = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    return found | {"XLA_FLAGS": found["XLA_FLAGS"].replace(OLDER_EMITTERS, "").strip()}


def said_by_a_program(module: str, *words: object, **environment: str) -> str:
    """What ``python -m module`` prints, which must end well; compiled as users have it."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=Path(__file__).parent.parent,
        env={**as_users_have_it(), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drop what a module compiled: a worker that keeps a thousand programs spends its time on memory."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def lab_student() -> tuple[Qwen3Config, Params]:
    return load_pretrained(student())


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(student())


@pytest.fixture(scope="session")
def small() -> tuple[Qwen3Config, Params]:
    """A random model whose every dimension differs and divides by two, so that no axis can be mixed up."""
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        rope_theta=5_000.0,
        eos_token_id=0,
    )
    return config, init_params(config, jax.random.key(0))
