"""Folders in several files, written for transformers and read from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.model import forward, load_pretrained, save_pretrained

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_export_in_several_files_loads_in_transformers(tmp_path, small, dtype):
    torch = pytest.importorskip("torch", reason="the oracles need torch: pip install -e '.[oracle]'")
    transformers = pytest.importorskip("transformers")
    config, params = small
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    save_pretrained(tmp_path / "ours", config, params, shard_bytes=20_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, 17))
    theirs = model(torch.tensor(tokens)).logits.detach().numpy()
    ours = forward(jax.tree.map(lambda x: x.astype(jnp.float32), params), jnp.array(tokens), config)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert model.generation_config.eos_token_id == config.eos_token_id

    model.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    _, loaded = load_pretrained(tmp_path / "theirs", dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
