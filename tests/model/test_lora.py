"""Low-rank adapters: the product by hand, merged and beside, and PEFT's own reading of what we write."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from opd_jax.errors import InputError
from opd_jax.model import (
    forward,
    load_pretrained,
    make_mesh,
    param_shardings,
    parameter_table,
    save_pretrained,
)
from opd_jax.model import lora as lora_module
from opd_jax.model.lora import (
    TARGETS,
    LoraConfig,
    init_lora,
    lora_delta,
    lora_table,
    merge_lora,
    merged_in_turn,
    on_top,
    save_adapter,
)

LORA = LoraConfig(rank=3, alpha=7.5, targets=TARGETS)


@pytest.fixture(scope="module")
def adapter(small):
    """An adapter that changes something: b is not zero."""
    fresh = init_lora(small[0], LORA, jax.random.key(1))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), jnp.float32), fresh)


def of(adapter, target):
    return adapter["layers"]["lora"][target]


def test_a_fresh_adapter_changes_nothing_and_has_the_scale_of_its_table(small):
    config, params = small
    wide = dataclasses.replace(config, hidden_size=400)
    lora = LoraConfig(rank=8, alpha=16, targets=("query", "output"))
    fresh = init_lora(wide, lora, jax.random.key(0))
    assert abs(float(jnp.std(of(fresh, "query")["a"])) * 400**0.5 - 1) < 0.05
    assert abs(float(jnp.std(of(fresh, "output")["a"])) * 40**0.5 - 1) < 0.1
    assert not np.asarray(of(fresh, "query")["b"]).any()
    merged = merge_lora(params, init_lora(config, LORA, jax.random.key(0)), LORA)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_shapes_axes_and_names(small):
    table = lora_table(small[0], LORA)
    a, b = table["layers", "lora", "output", "a"], table["layers", "lora", "output", "b"]
    assert (a.shape, a.axes) == ((3, 4, 10, 3), ("layers", "heads", "head_dim", "rank"))
    assert (b.shape, b.axes) == ((3, 3, 24), ("layers", "rank", "embed"))
    assert a.name == "base_model.model.model.layers.{layer}.self_attn.o_proj.lora_A.weight"
    assert table["layers", "lora", "key", "b"].shape == (3, 3, 2, 10)
    assert len(table) == 14


def test_merged_is_the_product_by_hand(small, adapter):
    _, params = small
    merged = merge_lora(params, adapter, LORA)
    for target in TARGETS:
        w, a, b = (
            np.asarray(x, np.float64) for x in (params["layers"][target], *of(adapter, target).values())
        )
        for layer in range(3):
            product = a[layer].reshape(-1, 3) @ b[layer].reshape(3, -1) * 2.5
            want = w[layer] + product.reshape(w[layer].shape)
            np.testing.assert_allclose(merged["layers"][target][layer], want, rtol=1e-6, atol=1e-6)
            assert np.abs(product).max() > 0.01
    assert merged["embed"] is params["embed"]
    assert merged["layers"]["mlp_norm"] is params["layers"]["mlp_norm"]


@pytest.mark.parametrize(("target", "inputs"), [("query", 1), ("key", 1), ("output", 2), ("down", 1)])
def test_beside_equals_merged(small, adapter, target, inputs):
    _, params = small
    w, merged = params["layers"][target][1], merge_lora(params, adapter, LORA)["layers"][target][1]
    h = np.random.default_rng(2).normal(size=(2, 5, *w.shape[:inputs]))
    a, b = of(adapter, target)["a"][1], of(adapter, target)["b"][1]
    delta = lora_delta(jnp.asarray(h, jnp.float32), a, b, LORA.scale, inputs)
    assert delta.shape == (2, 5, *w.shape[inputs:])
    flat = h.reshape(2, 5, -1)
    by_hand = flat @ np.asarray(a, np.float64).reshape(-1, 3) @ np.asarray(b, np.float64).reshape(3, -1) * 2.5
    np.testing.assert_allclose(delta.reshape(2, 5, -1), by_hand, rtol=1e-4, atol=1e-4)
    want = flat @ np.asarray(merged, np.float64).reshape(flat.shape[-1], -1)
    beside = flat @ np.asarray(w, np.float64).reshape(flat.shape[-1], -1) + by_hand
    np.testing.assert_allclose(beside, want, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_merged_in_float32(small, adapter):
    _, params = small
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = merge_lora(half, adapter, LORA)["layers"]["up"]
    a, b = (np.asarray(x, np.float32) for x in of(adapter, "up").values())
    want = np.asarray(half["layers"]["up"], np.float32) + np.float32(2.5) * (a @ b)
    assert merged.dtype == jnp.float32
    np.testing.assert_allclose(merged, want, rtol=1e-6, atol=1e-6)


def test_an_export_of_bfloat16_loses_nothing_of_a_small_update(tmp_path, small, adapter):
    config, params = small
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    slight = jax.tree.map(lambda x: 0.01 * x, adapter)
    save_pretrained(tmp_path, config, merged_in_turn(half, slight, LORA))
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    _, loaded = load_pretrained(tmp_path)
    want = merge_lora(half, slight, LORA)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.float32)), loaded, want)
    moved = np.asarray(loaded["layers"]["up"]) != np.asarray(half["layers"]["up"], np.float32)
    assert moved.mean() > 0.99


def test_an_adapter_of_another_config_is_refused(tmp_path, small, adapter):
    config, params = small
    for other in (LoraConfig(8, 8.0), dataclasses.replace(LORA, targets=("key", "query"))):
        for use in (
            lambda other=other: merge_lora(params, adapter, other),
            lambda other=other: save_adapter(tmp_path / "x", config, adapter, other),
        ):
            with pytest.raises(InputError, match="must be what its LoraConfig describes: it has the ranks"):
                use()
    assert not (tmp_path / "x").exists()


def test_an_adapter_without_a_scale_is_refused(small, adapter):
    config, params = small
    with pytest.raises(InputError, match="and lora_alpha is 0"):
        forward(on_top(params, adapter), jnp.zeros((1, 4), jnp.int32), config)


def test_sharded_weights_stay_where_they_are(small, adapter):
    """Whatever the adapter's own sharding would suggest."""
    config, params = small
    mesh = make_mesh(1, 2, 2)
    placed = jax.device_put(params, param_shardings(config, mesh))
    elsewhere = {
        "a": NamedSharding(mesh, PartitionSpec()),
        "b": NamedSharding(mesh, PartitionSpec(None, None, "fsdp")),
    }
    lora = dataclasses.replace(LORA, targets=("query", "up", "down"))
    spread = {target: jax.device_put(of(adapter, target), elsewhere) for target in lora.targets}
    merged = merge_lora(placed, {"layers": {"lora": spread}}, lora)
    want = merge_lora(params, {"layers": {"lora": {x: of(adapter, x) for x in lora.targets}}}, lora)
    for target in lora.targets:
        assert merged["layers"][target].sharding == placed["layers"][target].sharding
        np.testing.assert_allclose(merged["layers"][target], want["layers"][target], rtol=1e-6, atol=1e-6)


def test_a_merged_export_has_no_adapter_and_another_opinion(tmp_path, small, adapter):
    config, params = small
    both = {**params, "layers": {**params["layers"], **adapter["layers"]}}
    save_pretrained(tmp_path / "in turn", config, merged_in_turn(both, both, LORA))
    save_pretrained(tmp_path / "whole", config, merge_lora(both, both, LORA))
    file = "model.safetensors"
    assert (tmp_path / "in turn" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    _, loaded = load_pretrained(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, loaded, merge_lora(params, adapter, LORA))


def test_an_adapter_folder_is_pefts_definition(tmp_path, small, adapter):
    """W + alpha / r * lora_B @ lora_A in Hugging Face's layout, from the two folders' own bytes."""
    config, params = small
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("mine")
    save_adapter(tmp_path / "adapter", config, adapter, LORA, base="some/where")
    save_pretrained(tmp_path / "base", config, params)
    save_pretrained(tmp_path / "merged", config, merge_lora(params, adapter, LORA))
    low = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert len(low) == 2 * 7 * 3
    adapted = 0
    for name, weight in base.items():
        at = "base_model.model." + name.removesuffix("weight")
        if at + "lora_A.weight" in low:
            weight = weight + 2.5 * (low[at + "lora_B.weight"] @ low[at + "lora_A.weight"])
            adapted += 1
        np.testing.assert_allclose(merged[name], weight, rtol=1e-5, atol=1e-6)
    assert adapted == 7 * 3
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (3, 7.5, "some/where")
    assert about["target_modules"] == sorted(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down"))
    assert (tmp_path / "adapter" / "README.md").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("query", "vaule")}, "'vaule'; the nearest is value"),
        ({"targets": ("xyz",)}, "'xyz'; choose among query"),
        ({"targets": ()}, "at least one"),
        ({"targets": ("up", "up")}, "named once"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"alpha": float("nan")}, "alpha must be a number above 0"),
        ({"alpha": "16"}, "alpha must be a number above 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        LoraConfig(**fields)


def test_a_rank_above_the_smaller_side_is_refused(small):
    lora_table(small[0], LoraConfig(rank=20, targets=("key",)))
    with pytest.raises(InputError, match="got 21, key is 24 x 20"):
        lora_table(small[0], LoraConfig(rank=21, targets=("key",)))


def test_projections_stacked_by_expert_are_refused(small, monkeypatch):
    config, _ = small

    def with_experts(config):
        table = parameter_table(config)
        up = table.pop(("layers", "up"))
        gate = dataclasses.replace(
            up, shape=(3, 4, 24, 36), name="model.layers.{layer}.mlp.experts.{expert}.x"
        )
        return {**table, ("layers", "gate"): gate}

    monkeypatch.setattr(lora_module, "parameter_table", with_experts)
    for target in ("gate", "up"):
        with pytest.raises(InputError, match=f"{target} of this model is stacked by expert"):
            lora_table(config, LoraConfig(targets=(target,), rank=2))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
def test_peft_computes_the_same_from_our_adapter(tmp_path, small, adapter):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft", reason="pip install peft")
    config, params = small
    save_pretrained(tmp_path / "base", config, params)
    save_adapter(tmp_path / "adapter", config, adapter, LORA)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, 9))
    theirs = model(torch.tensor(tokens)).logits.detach().numpy()
    ours = forward(merge_lora(params, adapter, LORA), jnp.array(tokens), config)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(theirs - np.asarray(forward(params, jnp.array(tokens), config))).max() > 0.1
