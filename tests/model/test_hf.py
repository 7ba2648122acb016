"""Hugging Face folders: a bijection, and refusals by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax.errors import InputError
from opd_jax.model import hf_load, load_pretrained, make_mesh, save_pretrained
from opd_jax.model.config_json import config_from_json


@pytest.fixture
def folder(tmp_path, small):
    save_pretrained(tmp_path, *small)
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_import_of_export_is_the_same_to_the_bit(folder, small):
    config, params = small
    for mesh in (None, make_mesh(1, 2, 2)):
        loaded_config, loaded = load_pretrained(folder, mesh=mesh)
        assert loaded_config == config
        jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_names_and_layout_are_hugging_faces(folder, small):
    _, params = small
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (20, 24)  # [M * H, D]
    assert tensors["model.layers.2.self_attn.o_proj.weight"].shape == (24, 40)  # [D, N * H]
    head3 = tensors["model.layers.0.self_attn.q_proj.weight"][30:40]  # rows of query head 3
    np.testing.assert_array_equal(head3.T, params["layers"]["query"][0, :, 3])
    np.testing.assert_array_equal(tensors["lm_head.weight"].T, params["head"])


@pytest.fixture
def tied_folder(tmp_path, small):
    config, params = small
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    save_pretrained(tmp_path, tied, {name: value for name, value in params.items() if name != "head"})
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    return tmp_path


def store_head(folder, dtype=np.float32, row=0, by=0.0):
    """Store the embedding as the head too, with one number of one row moved."""

    def edit(tensors):
        head = tensors["model.embed_tokens.weight"].astype(dtype)
        head[row, -1] += by
        tensors["lm_head.weight"] = head

    change(folder, edit)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tied_model_may_store_its_embedding_as_the_head(tied_folder, dtype):
    store_head(tied_folder, dtype)
    _, loaded = load_pretrained(tied_folder)
    assert "head" not in loaded


@pytest.mark.parametrize("row", [0, 17, 39])
@pytest.mark.parametrize("read_bytes", [1, 2_000, 2**26])  # one row at a time, some, all at once
def test_a_tied_model_that_stores_another_head_is_refused(tied_folder, monkeypatch, row, read_bytes):
    monkeypatch.setattr(hf_load, "READ_BYTES", read_bytes)
    store_head(tied_folder, row=row, by=1e-3)
    with pytest.raises(InputError, match=r"lm_head\.weight.*differs.*set tie_word_embeddings to false"):
        load_pretrained(tied_folder)
    set_config(tied_folder, tie_word_embeddings=False)
    _, loaded = load_pretrained(tied_folder)
    assert loaded["head"][-1, row] == loaded["embed"][row, -1] + np.float32(1e-3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 missing, first model.norm.weight"),
        (lambda t: t.update({"model.extra": np.zeros(2)}), "1 unknown, first model.extra"),
        (lambda t: t.update({"model.norm.weight": np.zeros(25, np.float32)}), r"model.norm.weight.*\(25,\)"),
    ],
)
def test_wrong_tensors_are_refused_by_name(folder, edit, message):
    change(folder, edit)
    with pytest.raises(InputError, match=message):
        load_pretrained(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "stale.safetensors")
    with pytest.raises(InputError, match=r"model.norm.weight is in two files"):
        load_pretrained(folder)


def test_a_torn_file_is_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="whole safetensors"):
        load_pretrained(folder)


def test_missing_parts_are_refused(tmp_path, folder):
    with pytest.raises(InputError, match="is not there"):
        load_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has none"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"readable config\.json"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen2"},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0]},
        {"quantization_config": {"bits": 4}},
        {"attention_bias": True},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"use_sliding_window": True},
        {"hidden_act": "gelu"},
    ],
)
def test_what_is_not_computed_is_refused_not_ignored(folder, fields):
    set_config(folder, **fields)
    with pytest.raises(InputError, match="only Qwen3 with"):
        load_pretrained(folder)


def test_both_spellings_of_rope_theta(folder):
    path = folder / "config.json"
    assert config_from_json(path).rope_theta == 5000.0
    set_config(folder, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    assert config_from_json(path).rope_theta == 77.0


def test_a_config_without_a_dimension_is_refused(folder):
    set_config(folder, head_dim=None)
    with pytest.raises(InputError, match="must say head_dim"):
        load_pretrained(folder)
