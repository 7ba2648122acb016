"""Qwen3 as transformers computes it, family by family: logits, gradients, bfloat16, folders both ways."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from opd_jax.errors import InputError
from opd_jax.model import (
    Qwen3Config,
    forward,
    init_params,
    load_pretrained,
    parameter_table,
    save_pretrained,
)
from opd_jax.model.hf import hf_tensors, to_hf
from opd_jax.model.rope import Yarn

pytestmark = pytest.mark.oracle

DENSE = Qwen3Config(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    eos_token_id=0,
)
MIXTURE = dataclasses.replace(DENSE, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32)
FAMILIES = {
    "untied": DENSE,
    "tied": dataclasses.replace(DENSE, tie_word_embeddings=True),
    "another theta": dataclasses.replace(DENSE, rope_theta=5_000.0),
    "yarn": dataclasses.replace(DENSE, rope_scaling=Yarn(4.0, 64), max_position_embeddings=256),
    "yarn with every field": dataclasses.replace(
        DENSE,
        rope_theta=1e4,
        rope_scaling=Yarn(8.0, 32, beta_fast=16.0, beta_slow=2.0, mscale=0.8, mscale_all_dim=0.5),
        max_position_embeddings=256,
    ),
    "mixture": MIXTURE,
    "mixture with weights that sum to one": dataclasses.replace(MIXTURE, norm_topk_prob=True),
    "mixture with yarn": dataclasses.replace(
        MIXTURE, rope_scaling=Yarn(4.0, 64, truncate=False), max_position_embeddings=256
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A random model of a family, its folder as we export it, and the same in transformers."""
    from transformers import AutoModelForCausalLM

    config, folder = FAMILIES[request.param], tmp_path_factory.mktemp("family")
    params = init_params(config, jax.random.key(0))
    # Norm scales of one would hide a norm applied to the wrong thing.
    params = jax.tree.map(lambda x: x * jnp.linspace(0.7, 1.3, x.size).reshape(x.shape), params)
    save_pretrained(folder, config, params)
    return config, params, folder, AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def tokens(config):
    return np.random.default_rng(0).integers(config.vocab_size, size=(2, 90))


def test_logits(family):
    import torch

    config, params, _, theirs = family
    with torch.no_grad():
        want = theirs(torch.tensor(tokens(config))).logits.numpy()
    np.testing.assert_allclose(forward(params, jnp.array(tokens(config)), config), want, atol=1e-4, rtol=0)


def test_gradients(family):
    import torch

    config, params, _, theirs = family
    ids = tokens(config)
    theirs.zero_grad()
    logits = theirs(torch.tensor(ids)).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.tensor(ids[:, 1:]).flatten()
    ).backward()

    def loss(params):
        logprobs = jax.nn.log_softmax(forward(params, jnp.array(ids), config)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logprobs, jnp.array(ids)[:, 1:, None], -1))

    ours = traverse_util.flatten_dict(jax.grad(loss)(params))
    want = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    for path, parameter in parameter_table(config).items():
        for index, name in hf_tensors(parameter):
            got = to_hf(np.asarray(ours[path])[index], parameter.inputs)
            wanted = theirs_by_name(want, name, index)
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(got / scale, wanted / scale, atol=1e-3, err_msg=name)


def theirs_by_name(tensors, name, index):
    """A tensor by its name in a checkpoint; experts are fused in memory, gate before up."""
    if name in tensors:
        return tensors[name]
    before, _, after = name.rpartition(f".{index[-1]}.")
    if after == "down_proj.weight":
        return tensors[f"{before}.down_proj"][index[-1]]
    fused = tensors[f"{before}.gate_up_proj"][index[-1]]
    return np.split(fused, 2)[0 if after == "gate_proj.weight" else 1]


def test_bfloat16_logprobs(family):
    import torch
    from transformers import AutoModelForCausalLM

    config, params, folder, _ = family
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    with torch.no_grad():
        want = torch.log_softmax(theirs(torch.tensor(tokens(config))).logits.float(), -1).numpy()
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got = jax.nn.log_softmax(forward(params, jnp.array(tokens(config)), half))
    picked = jnp.array(tokens(config))[..., None]
    distance = jnp.abs(jnp.take_along_axis(got, picked, -1) - jnp.take_along_axis(want, picked, -1))
    assert float(jnp.mean(distance)) < 0.02


def test_what_transformers_writes_is_read_to_the_bit(family, tmp_path):
    config, params, _, theirs = family
    theirs.save_pretrained(tmp_path)
    read, got = load_pretrained(tmp_path)
    assert read == dataclasses.replace(config, eos_token_id=read.eos_token_id)
    jax.tree.map(np.testing.assert_array_equal, got, params)


def test_a_tied_model_with_a_stored_head_reads_the_embedding(tmp_path):
    from transformers import AutoModelForCausalLM

    config = FAMILIES["tied"]
    params = init_params(config, jax.random.key(0))
    save_pretrained(tmp_path, config, params)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    _, got = load_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    ids = jnp.array(tokens(config))
    import torch

    def logits():
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
            return theirs(torch.tensor(np.asarray(ids))).logits.numpy()

    np.testing.assert_allclose(forward(got, ids, config), logits(), atol=1e-4, rtol=0)

    # Another head is another model in transformers, so here it must not be left out silently.
    tensors["lm_head.weight"] = tensors["lm_head.weight"][::-1].copy()
    save_file(tensors, file, metadata={"format": "pt"})
    assert np.abs(forward(got, ids, config) - logits()).max() > 0.1
    with pytest.raises(InputError, match="set tie_word_embeddings to false"):
        load_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": False}))
    untied, got = load_pretrained(tmp_path)
    np.testing.assert_allclose(forward(got, ids, untied), logits(), atol=1e-4, rtol=0)


def test_spellings_of_the_rotary_embedding_that_agree_are_read_as_transformers_does(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    config = FAMILIES["yarn with every field"]
    params = init_params(config, jax.random.key(0))
    save_pretrained(tmp_path, config, params)
    path = tmp_path / "config.json"
    said = json.loads(path.read_text())
    said["rope_parameters"] = {**said["rope_scaling"], "rope_theta": said["rope_theta"]}
    path.write_text(json.dumps(said))
    read, got = load_pretrained(tmp_path)
    assert read == config
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    with torch.no_grad():
        want = theirs(torch.tensor(tokens(config))).logits.numpy()
    np.testing.assert_allclose(forward(got, jnp.array(tokens(config)), read), want, atol=1e-4, rtol=0)
