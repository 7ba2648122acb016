"""Against transformers' own Qwen3: logits, gradients, and folders that each side writes for the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.lab import student, teacher
from opd_jax.model import forward, load_pretrained, save_pretrained

torch = pytest.importorskip("torch", reason="the oracles need torch: pip install -e '.[oracle]'")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens_of(config, rows=2, length=17):
    return np.random.default_rng(0).integers(config.vocab_size, size=(rows, length))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("theta", [5_000.0, 1_000_000.0])
def test_what_we_write_they_compute_the_same(tmp_path, small, tied, theta):
    config, params = small
    config = dataclasses.replace(config, tie_word_embeddings=tied, rope_theta=theta)
    params = {k: v for k, v in params.items() if not (tied and k == "head")}
    params = jax.tree.map(lambda x: x * jnp.linspace(0.7, 1.3, x.size).reshape(x.shape), params)
    save_pretrained(tmp_path, config, params)
    model, tokens = theirs(tmp_path), tokens_of(config)
    out = model(torch.tensor(tokens)).logits
    ours = forward(params, jnp.array(tokens), config)
    np.testing.assert_allclose(ours, out.detach().numpy(), rtol=1e-4, atol=1e-4)

    weight = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
    (out * torch.tensor(weight)).sum().backward()
    gradient = jax.grad(lambda p: jnp.sum(forward(p, jnp.array(tokens), config) * weight))(params)
    save_pretrained(tmp_path / "gradient", config, gradient)
    from safetensors.numpy import load_file

    ours_by_name = load_file(tmp_path / "gradient" / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name in ours_by_name:
            want = parameter.grad.numpy()
            error = np.abs(ours_by_name[name] - want).max() / np.abs(want).max()
            assert error < 1e-3, (name, error)


@pytest.mark.parametrize("folder", [student(), teacher()], ids=["student", "teacher"])
def test_the_lab_models_load_in_transformers(folder):
    config, params = load_pretrained(folder)
    tokens = tokens_of(config, length=100)
    out = theirs(folder)(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(forward(params, jnp.array(tokens), config), out, rtol=1e-3, atol=2e-3)


def test_what_they_write_we_load(tmp_path, small):
    config, _ = small
    their_config = transformers.Qwen3Config(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        rope_parameters={"rope_type": "default", "rope_theta": 5_000.0},
        tie_word_embeddings=False,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(their_config).eval()
    model.save_pretrained(tmp_path)
    loaded_config, params = load_pretrained(tmp_path)
    assert loaded_config.rope_theta == 5_000.0
    tokens = tokens_of(config)
    out = model(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(forward(params, jnp.array(tokens), loaded_config), out, rtol=1e-4, atol=1e-4)
