"""The forward pass: against loops, against itself over a cache, and what attention may not see."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.model import forward, parameter_count, parameter_table, preset
from opd_jax.model.attention import Blocks
from opd_jax.model.config import CHOICES
from opd_jax.model.forward import REMAT, decode, empty_cache, hidden_states, logits
from opd_jax.model.hf import hf_tensors, to_hf
from opd_jax.model.parameters import init_params
from opd_jax.model.rope import Yarn


def numpy_frequencies(config):
    """Angle per position of each pair, and YaRN's factor: one pair at a time, from the paper's formulas."""
    yarn, half = config.rope_scaling, config.head_dim // 2
    frequencies = [config.rope_theta ** (-i / half) for i in range(half)]
    if yarn is None:
        return np.array(frequencies), 1.0

    def pair_that_turns(times):
        context = yarn.original_max_position_embeddings
        return half * math.log(context / (2 * math.pi * times)) / math.log(config.rope_theta)

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), config.head_dim - 1)
    mixed = []
    for i, frequency in enumerate(frequencies):
        slow = min(max((i - low) / (high - low), 0), 1)
        mixed.append((1 - slow) * frequency + slow * frequency / yarn.factor)
    return np.array(mixed), 0.1 * math.log(yarn.factor) + 1


def numpy_qwen3(params, tokens, config):
    """Qwen3 for one sequence in float64 loops, from Hugging Face's weight layout."""
    w = {}
    for path, p in parameter_table(config).items():
        value = params[path[0]] if len(path) == 1 else params[path[0]][path[1]]
        value = np.asarray(value, np.float64)
        for index, name in hf_tensors(p):
            w[name] = to_hf(value[index], p.inputs)

    def rms(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def rope(x, position):
        half = len(x) // 2
        frequency, factor = numpy_frequencies(config)
        cos, sin = factor * np.cos(position * frequency), factor * np.sin(position * frequency)
        a, b = x[:half], x[half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin])

    def mlp(h, at):
        gate = h @ w[at + "gate_proj.weight"].T
        return (gate / (1 + np.exp(-gate)) * (h @ w[at + "up_proj.weight"].T)) @ w[at + "down_proj.weight"].T

    def mixture(h, at):
        score = h @ w[at + "gate.weight"].T
        p = np.exp(score) / np.exp(score).sum()
        chosen = np.argsort(-p)[: config.num_experts_per_tok]
        total = p[chosen].sum() if config.norm_topk_prob else 1.0
        return sum(p[e] / total * mlp(h, f"{at}experts.{e}.") for e in chosen)

    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        h = rms(x, w[at + "input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"{at}self_attn.{name}_proj.weight"].T).reshape(len(tokens), -1, size) for name in "qkv"
        )
        q, k = rms(q, w[at + "self_attn.q_norm.weight"]), rms(k, w[at + "self_attn.k_norm.weight"])
        out = np.zeros((len(tokens), heads, size))
        for n in range(heads):
            m = n // (heads // kv)
            for t in range(len(tokens)):
                score = np.array([rope(q[t, n], t) @ rope(k[s, m], s) / np.sqrt(size) for s in range(t + 1)])
                p = np.exp(score - score.max())
                out[t, n] = (p / p.sum()) @ v[: t + 1, m]
        x = x + out.reshape(len(tokens), -1) @ w[at + "self_attn.o_proj.weight"].T
        h = rms(x, w[at + "post_attention_layernorm.weight"])
        one = mixture if config.num_experts else mlp
        x = x + np.stack([one(token, at + "mlp.") for token in h])
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return rms(x, w["model.norm.weight"]) @ head.T


MIXTURE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_scaling": Yarn(4.0, 64, beta_fast=8.0)},
        MIXTURE,
        {**MIXTURE, "norm_topk_prob": True},
    ],
    ids=["untied", "tied", "yarn", "mixture", "mixture with weights that sum to one"],
)
def test_forward_is_qwen3(small, fields):
    config = dataclasses.replace(small[0], **fields)
    params = init_params(config, jax.random.key(0))
    # Norm scales of one would hide a norm applied to the wrong thing.
    params = jax.tree.map(lambda x: x * jnp.linspace(0.7, 1.3, x.size).reshape(x.shape), params)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=11)
    got = forward(params, jnp.array(tokens)[None], config)[0]
    np.testing.assert_allclose(got, numpy_qwen3(params, tokens, config), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change", [{"attention": "auto"}, {"remat": "some"}, {"compute_dtype": "bf16"}, {"head_chunk": 0}]
)
def test_a_way_to_compute_that_is_none_is_refused(small, change):
    [(name, value)] = change.items()
    with pytest.raises(InputError, match=f"{name} must be .* got {value!r}; "):
        dataclasses.replace(small[0], **change)
    assert CHOICES["remat"] == tuple(REMAT)


def test_rope_theta_is_read(small):
    config, params = small
    tokens = jnp.arange(12)[None]
    other = dataclasses.replace(config, rope_theta=1e6)
    assert float(jnp.abs(forward(params, tokens, config) - forward(params, tokens, other)).max()) > 1e-2


@pytest.mark.parametrize("blocks", [None, Blocks(3, 4), Blocks(5, 2)])
def test_a_cache_gives_the_same_as_the_whole_row(small, blocks):
    config, params = small
    rng = np.random.default_rng(1)
    tokens = jnp.array(rng.integers(config.vocab_size, size=(3, 9)))
    whole = forward(params, tokens, config)
    # Prompts of 2, 4 and 5 tokens; what lies behind them in the prefill is garbage to be overwritten.
    lengths = jnp.array([2, 4, 5])
    garbage = jnp.array(rng.integers(config.vocab_size, size=(3, 5)))
    prompt = jnp.where(jnp.arange(5) < lengths[:, None], tokens[:, :5], garbage)
    cache = empty_cache(config, 3, 12)
    hidden, cache = decode(params, prompt, jnp.broadcast_to(jnp.arange(5), (3, 5)), cache, config, blocks)
    last = hidden[jnp.arange(3), lengths - 1]
    want = whole[jnp.arange(3), lengths - 1]
    np.testing.assert_allclose(logits(last, params, config), want, atol=2e-5)
    for step in range(4):
        position = lengths + step
        token = tokens[jnp.arange(3), position]
        hidden, cache = decode(params, token[:, None], position[:, None], cache, config, blocks)
        want = whole[jnp.arange(3), position]
        np.testing.assert_allclose(logits(hidden[:, 0], params, config), want, atol=2e-5)


def test_sequences_in_one_row_do_not_see_each_other(small):
    config, params = small
    rng = np.random.default_rng(2)
    first, second = rng.integers(config.vocab_size, size=5), rng.integers(config.vocab_size, size=7)
    packed, _ = hidden_states(
        params,
        jnp.array([[*first, *second, 0, 0]]),
        config,
        positions=jnp.array([[*range(5), *range(7), 0, 0]]),
        sequence_ids=jnp.array([[1] * 5 + [2] * 7 + [0] * 2]),
    )
    for alone, part in ((first, packed[0, :5]), (second, packed[0, 5:12])):
        want = hidden_states(params, jnp.array(alone)[None], config)[0][0]
        np.testing.assert_allclose(part, want, atol=2e-5)
    assert np.isfinite(packed).all()


def test_the_future_changes_nothing(small):
    config, params = small
    tokens = jnp.array(np.random.default_rng(3).integers(config.vocab_size, size=(1, 8)))
    changed = tokens.at[0, 5:].set(1)
    np.testing.assert_array_equal(
        forward(params, tokens, config)[:, :5], forward(params, changed, config)[:, :5]
    )


def test_published_sizes_without_allocating():
    published = {
        "qwen3-0.6b": 596_049_920,
        "qwen3-1.7b": 1_720_574_976,
        "qwen3-4b": 4_022_468_096,
        "qwen3-8b": 8_190_735_360,
        "qwen3-14b": 14_768_307_200,
        "qwen3-32b": 32_762_123_264,
        "qwen3-30b-a3b": 30_532_122_624,
        "qwen3-235b-a22b": 235_093_634_560,
    }
    assert {name: parameter_count(preset(name)) for name in published} == published


def test_bfloat16_computes_in_bfloat16_but_speaks_float32(small):
    config, params = small
    config = dataclasses.replace(config, compute_dtype="bfloat16")
    tokens = jnp.arange(10)[None]
    assert hidden_states(params, tokens, config)[0].dtype == jnp.bfloat16
    out = forward(params, tokens, config)
    assert out.dtype == jnp.float32
    full = forward(params, tokens, dataclasses.replace(config, compute_dtype="float32"))
    assert 0 < float(jnp.abs(out - full).max()) < 0.2


def test_init_has_the_scales_of_the_table(small):
    config, _ = small
    params = init_params(dataclasses.replace(config, hidden_size=256), jax.random.key(1))
    assert abs(float(jnp.std(params["embed"])) - 1) < 0.02
    assert abs(float(jnp.std(params["layers"]["up"])) - 1 / 16) < 0.002
    assert (np.asarray(params["norm"]) == 1).all()
