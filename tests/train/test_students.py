"""Students of other kinds on the same road: adapters, mixtures of experts, one model at a time."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.lab import student
from opd_jax.model import Qwen3Config, forward, init_params, load_pretrained, save_pretrained
from opd_jax.tasks import TOKENIZER_FILES
from opd_jax.train.loop import distill, do_part, export_student
from opd_jax.train.metrics import read_lines
from opd_jax.train.opening import open_run
from tests.conftest import tiny_config

ADAPTER = ("--model.lora.rank=2", "--model.lora.alpha=8")


def never() -> bool:
    return False


def trained(folder, *overrides):
    run = open_run(folder, tiny_config("--schedule.rounds=1", *overrides))
    distill(run, lambda line: None, never)
    return run, read_lines(run.metrics_file)


def leaves(tree):
    return jax.tree.leaves(jax.device_get(tree))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("adapted") / "run", *ADAPTER)


def test_an_adapter_begins_as_the_student_and_trains_nothing_else(plain, adapted):
    run, lines = adapted
    _, others = plain
    assert [line["drift_max"] == 0 for line in lines] == [True, False, False, False]
    # It samples what the student samples: the first update sees the same tokens and the same loss.
    assert lines[0]["tokens"] == others[0]["tokens"]
    np.testing.assert_allclose(lines[0]["loss"], others[0]["loss"], rtol=1e-4)
    assert set(run.state.params["layers"]) == {"lora"}
    assert all(np.any(np.asarray(x["b"]) != 0) for x in run.state.params["layers"]["lora"].values())
    _, base = load_pretrained(student())
    jax.tree.map(np.testing.assert_array_equal, run.base, base)


def test_an_export_has_the_adapter_merged_in(adapted):
    run, _ = adapted
    config, merged = load_pretrained(export_student(run))
    tokens = jnp.arange(12)[None]
    want = forward(run.policy, tokens, run.model)
    np.testing.assert_allclose(forward(merged, tokens, config), want, atol=1e-4)
    assert float(jnp.abs(want - forward(run.base, tokens, run.model)).max()) > 1e-3
    assert (run.folder / "adapter" / "adapter_model.safetensors").exists()
    assert (run.folder / "student" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "lora", [(), ("--model.lora.rank=2", "--model.lora.alpha=8")], ids=["all", "adapter"]
)
def test_one_model_at_a_time_gives_the_same_bits(plain, adapted, tmp_path, lora):
    together, lines = adapted if lora else plain
    run, got = trained(tmp_path / "run", "--model.residency=sequential", *lora)
    assert got == lines
    for a, b in zip(leaves(run.state.params), leaves(together.state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "teacher" not in vars(run)


def test_the_optimizer_waits_on_the_host_while_the_next_round_is_drawn(tmp_path):
    run = open_run(tmp_path / "run", tiny_config("--schedule.rounds=2", "--model.residency=sequential"))
    for part in ("sample", "score", "train", "sample"):
        do_part(run, part, lambda line: None, never)
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(run.state.opt_state))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(run.state.params))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a random mixture of experts that reads the lab's tokenizer."""
    folder = tmp_path_factory.mktemp("mixture")
    lab = load_pretrained(student())[0]
    config = Qwen3Config(
        vocab_size=lab.vocab_size,
        eos_token_id=lab.eos_token_id,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    save_pretrained(folder, config, init_params(config, jax.random.key(0)))
    for name in TOKENIZER_FILES:
        if (source := student() / name).exists():
            shutil.copyfile(source, folder / name)
    return folder


@pytest.mark.parametrize("parts", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_mixture_of_experts_is_trained_and_says_how_it_routes(mixture, tmp_path, parts):
    run, lines = trained(tmp_path / "run", f"--model.student={mixture}", f"--schedule.microbatches={parts}")
    assert lines[0]["drift_max"] == 0
    assert lines[1]["drift_max"] > 0
    for line in lines:
        assert 1 <= line["router_imbalance"] <= 4
        assert line["router_imbalance"] <= line["router_largest"] <= 4
        assert 0 < line["router_entropy"] < np.log(4)
        assert 0 <= line["router_idle"] < 1
    moved = jnp.abs(run.state.params["layers"]["router"] - run.base["layers"]["router"])
    assert float(moved.max()) > 0


def test_an_adapter_that_does_not_fit_leaves_no_run_behind(mixture, tmp_path):
    with pytest.raises(InputError, match="LoRA adapts one matrix a layer"):
        open_run(tmp_path / "run", tiny_config(f"--model.student={mixture}", *ADAPTER))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_experts_on_an_axis_of_their_own_give_the_same_updates(mixture, tmp_path):
    _one, want = trained(tmp_path / "one", f"--model.student={mixture}", "--log.rows=0")
    many, got = trained(
        tmp_path / "many", f"--model.student={mixture}", "--log.rows=0", "--mesh.expert=2", "--mesh.fsdp=2"
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-3, atol=1e-4)
    assert "expert" in str(many.state.params["layers"]["expert_up"].sharding.spec)
