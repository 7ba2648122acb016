"""Streaming in: what is read, what is held, and what is refused before anything is read."""

import dataclasses
import gc
import json
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax.errors import InputError
from opd_jax.model import hf_load, load_pretrained, make_mesh, parameter_table, save_pretrained
from opd_jax.model.hf import hf_shape, hf_tensors
from opd_jax.model.parameters import Parameter

INDEX = "model.safetensors.index.json"
MESHES = [(1, 8, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2)]


@pytest.fixture
def folder(tmp_path, small):
    """The small model in four files with an index."""
    save_pretrained(tmp_path / "model", *small, shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 4
    return tmp_path / "model"


def shapes(config):
    """The checkpoint's tensors, by name."""
    return {name: hf_shape(p) for p in parameter_table(config).values() for _, name in hf_tensors(p)}


def set_index(folder, edit):
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


class Recorded:
    """A stored tensor that writes down what is read of it."""

    def __init__(self, name, tensor, reads):
        self.name, self.tensor, self.reads = name, tensor, reads

    def __getitem__(self, index):
        self.reads.append((self.name, index))
        return self.tensor[index]

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@pytest.fixture
def reads(monkeypatch):
    """Every read of a load, as (tensor, index)."""
    reads = []
    opened = hf_load._open

    def recording(folder, stack):
        return {name: Recorded(name, tensor, reads) for name, tensor in opened(folder, stack).items()}

    monkeypatch.setattr(hf_load, "_open", recording)
    return reads


@pytest.mark.parametrize("shape", [None, *MESHES])
def test_a_mesh_loads_what_one_device_does_and_every_number_is_read_once(folder, small, reads, shape):
    config, params = small
    mesh = make_mesh(*shape) if shape else None
    loaded_config, loaded = load_pretrained(folder, mesh=mesh)
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    count = {
        name: np.zeros(hf_shape(p), int)
        for p in parameter_table(config).values()
        for _, name in hf_tensors(p)
    }
    for name, index in reads:
        count[name][index] += 1
    for name, times in count.items():
        assert (times == 1).all(), name


@pytest.mark.parametrize("shape", MESHES)
def test_no_read_exceeds_its_shard(folder, small, reads, shape):
    config, _ = small
    mesh = make_mesh(*shape)
    placed = hf_load.param_shardings(config, mesh)
    load_pretrained(folder, mesh=mesh)
    most = {}
    for path, p in parameter_table(config).items():
        sharding = placed
        for key in path:
            sharding = sharding[key]
        size = np.prod(sharding.shard_shape(p.shape)[p.stacks :])
        most |= {name: size for _, name in hf_tensors(p)}
    for name, index in reads:
        assert np.empty(shapes(config)[name])[index].size <= most[name], (name, index)


def test_reads_are_cut_and_the_result_is_the_same(folder, small, reads, monkeypatch):
    monkeypatch.setattr(hf_load, "READ_BYTES", 2_000)
    _, loaded = load_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded, small[1])
    assert max(np.empty(shapes(small[0])[name])[index].size * 8 for name, index in reads) <= 2_000


def misaligned(value):
    """A copy that a CPU device cannot take over as it lies, just as an accelerator never can."""
    tried = []  # held, so that each comes to lie elsewhere
    while not tried or tried[-1].ctypes.data % 64 == 0:
        tried.append(value.copy())
    return tried[-1]


@pytest.mark.parametrize("shape", [None, (1, 4, 2), (2, 2, 2)])
def test_the_host_holds_one_shard_at_a_time(folder, small, monkeypatch, shape):
    read, made = hf_load.read_shard, []

    def watched(*given):
        assert all(reference() is None for reference in made)
        shard = misaligned(read(*given))
        made.append(weakref.ref(shard))
        return shard

    monkeypatch.setattr(hf_load, "read_shard", watched)
    gc.disable()  # it must not come to the loader's help by chance
    try:
        _, loaded = load_pretrained(folder, mesh=make_mesh(*shape) if shape else None)
    finally:
        gc.enable()
    assert len(made) >= 14
    jax.tree.map(np.testing.assert_array_equal, loaded, small[1])


@pytest.mark.parametrize("shape", MESHES)
def test_devices_get_their_shards_and_nothing_more(folder, small, monkeypatch, shape):
    mesh, put, held = make_mesh(*shape), jax.device_put, Counter()

    def watched(value, device):
        held[device] += value.nbytes
        return put(value, device)

    monkeypatch.setattr(jax, "device_put", watched)
    _, loaded = load_pretrained(folder, mesh=mesh)
    share = Counter()
    for leaf in jax.tree.leaves(loaded):
        for shard in leaf.addressable_shards:
            share[shard.device] += shard.data.nbytes
    assert held == share
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(small[1]))
    assert max(share.values()) < total / (shape[1] * shape[2]) + 1_000  # norms are on every device


@pytest.mark.parametrize("stored", [np.float32, jnp.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_converted_like_numpys(tmp_path, small, stored, dtype):
    save_pretrained(tmp_path, *small)
    tensors = {
        name: value.astype(stored) for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    _, loaded = load_pretrained(tmp_path, dtype=dtype)
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    assert loaded["layers"]["up"].dtype == dtype
    np.testing.assert_array_equal(loaded["layers"]["up"][1], up.T.astype(dtype))


def test_any_part_of_any_parameter_is_what_numpy_slices(tmp_path):
    """Stacks of one and two axes, several inputs, several outputs; parts that split a head too."""
    rng = np.random.default_rng(0)
    for name, shape, inputs in (
        ("w.{layer}.{expert}.x", (3, 4, 5, 6), 1),
        ("w.{layer}.{expert}.v", (3, 4, 5), 0),
        ("w.{layer}.x", (2, 3, 4, 5), 1),
        ("w.{layer}.x", (2, 3, 4, 5), 2),
        ("w.x", (7, 3), 0),
        ("w.x", (2, 3, 4, 2), 2),
    ):
        parameter = Parameter(shape, ("a",) * len(shape), name, inputs=inputs)
        value = rng.normal(size=shape)
        stored = {}
        for index, tensor_name in hf_tensors(parameter):
            tensor = value[index]
            if inputs:  # outputs first, by moving one axis at a time
                for _ in range(inputs):
                    tensor = np.moveaxis(tensor, 0, -1)
                tensor = tensor.reshape(hf_shape(parameter))
            stored[tensor_name] = tensor
        if "expert" in name:
            assert "w.2.3.x" in stored or "w.2.3.v" in stored
        for _ in range(20):
            ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in shape]
            part = hf_load.read_shard(parameter, stored, tuple(range(*end) for end in ends), np.dtype("f8"))
            np.testing.assert_array_equal(part, value[tuple(slice(*end) for end in ends)])


def test_experts_are_placed_on_a_mesh(tmp_path):
    """A stack over layers and experts, sharded over experts and inputs."""
    parameter = Parameter(
        (2, 4, 6, 10), ("layers", "experts", "embed", "mlp"), "{layer}.{expert}.up", inputs=1
    )
    value = np.random.default_rng(0).normal(size=parameter.shape).astype(np.float32)
    stored = {f"{i}.{e}.up": np.ascontiguousarray(value[i, e].T) for i in range(2) for e in range(4)}
    spec = jax.sharding.PartitionSpec(None, "tensor", "fsdp", None)
    sharding = jax.sharding.NamedSharding(make_mesh(2, 2, 2), spec)
    loaded = hf_load.load_parameter(parameter, stored, sharding, np.dtype("float32"))
    assert loaded.sharding == sharding
    np.testing.assert_array_equal(loaded, value)


# Refusals


def without(name):
    return lambda folder: set_index(folder, lambda files: files.pop(name))


def elsewhere(name, file):
    return lambda folder: set_index(folder, lambda files: files.update({name: file}))


def twice(folder):
    second = load_file(folder / "model-00002-of-00004.safetensors")
    second["model.embed_tokens.weight"] = np.zeros((40, 24), np.float32)
    save_file(second, folder / "model-00002-of-00004.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model-00003-of-00004.safetensors").unlink(), "model-00003-of-00004.safetensors of"),
        (without("model.norm.weight"), "model.norm.weight in no file, it is in model-00004"),
        (
            elsewhere("model.norm.weight", "model-00001-of-00004.safetensors"),
            "model.norm.weight in model-00001-of-00004.safetensors, it is in model-00004-of-00004",
        ),
        (
            elsewhere("model.extra", "model-00001-of-00004.safetensors"),
            "model.extra in model-00001-of-00004.safetensors, it is in no file",
        ),
        (twice, "embed_tokens.weight is in two files of .*00001-of-00004.safetensors and model-00002"),
        (elsewhere("model.norm.weight", "../model/model.safetensors"), "of its own folder"),
        (elsewhere("model.norm.weight", 7), "whole JSON"),
        (lambda f: (f / INDEX).write_text("{}"), "whole JSON"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "whole JSON"),
        (lambda f: (f / INDEX).write_text("[" * 10), "whole JSON"),
        (lambda f: (f / INDEX).write_text("[" * 100_000), "whole JSON"),
    ],
)
def test_an_index_that_lies_is_refused_by_name(folder, reads, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_pretrained(folder)
    assert not reads


@pytest.mark.parametrize("dtype", ["int32", "bf16", object])
def test_parameters_are_floats(folder, reads, dtype):
    with pytest.raises(InputError, match="parameters must be floats: got the dtype"):
        load_pretrained(folder, dtype=dtype)
    assert not reads


def test_files_that_the_index_does_not_name_are_not_read(folder, small):
    (folder / "consolidated.safetensors").write_bytes(b"of another kind")
    _, loaded = load_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded, small[1])


def change(folder, edit):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if edit(tensors):
            save_file(tensors, file)


def misshape(tensors):
    name = "model.layers.2.self_attn.o_proj.weight"
    return name in tensors and not tensors.update({name: np.ascontiguousarray(tensors[name].T)})


def quantise(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    kind = jnp.float8_e4m3fn
    return name in tensors and not tensors.update({name: tensors[name].astype(kind)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (misshape, r"o_proj.weight of .* is \(40, 24\), not \(24, 40\)"),
        (quantise, "up_proj.weight .* is F8_E4M3"),
    ],
)
def test_what_headers_tell_is_refused_before_anything_is_read(folder, reads, edit, message):
    change(folder, edit)
    with pytest.raises(InputError, match=message):
        load_pretrained(folder)
    assert not reads


def test_a_torn_shard_is_refused(folder):
    file = folder / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="whole safetensors files.*model-00002-of-00004"):
        load_pretrained(folder)


def store_head(folder, head):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": head(tensors)}, folder / "model.safetensors")


@pytest.fixture
def tied_folder(tmp_path, small):
    config, params = small
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    save_pretrained(tmp_path, tied, {name: value for name, value in params.items() if name != "head"})
    return tmp_path


def test_a_stored_head_of_a_tied_model_is_read_once_in_pieces_and_not_kept(tied_folder, reads, monkeypatch):
    monkeypatch.setattr(hf_load, "READ_BYTES", 2_000)
    _, without_head = load_pretrained(tied_folder)
    store_head(tied_folder, lambda tensors: tensors["model.embed_tokens.weight"])
    _, loaded = load_pretrained(tied_folder)
    jax.tree.map(np.testing.assert_array_equal, loaded, without_head)
    rows = [np.arange(40)[index] for name, index in reads if name == "lm_head.weight"]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(40))
    assert max(2 * len(part) * 24 * 8 for part in rows) <= 2_000  # with the embedding beside it


def test_a_misshapen_head_of_a_tied_model_is_refused_unread(tied_folder, reads):
    store_head(tied_folder, lambda tensors: np.ones((24, 40), np.float32))
    with pytest.raises(InputError, match=r"lm_head.weight of .* is \(24, 40\), not \(40, 24\)"):
        load_pretrained(tied_folder)
    assert not reads


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_of_loading_the_shape_of_a_real_model():
    script = Path(__file__).parents[2] / "scripts" / "measure_load.py"
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"')]
    assert len(lines) == 6
    for line in lines:
        assert line["device_peak_bytes"] <= line["device_share_bytes"] + line["largest_parameter_bytes"]
        # A mesh with a data axis of two holds everything twice, a process of two holds half.
        held = {"data 2 x fsdp 2 x tensor 2": 2.0, "fsdp 8, two processes": 0.5}.get(line["load"], 1.0)
        assert held < line["anonymous_growth_over_checkpoint"] < 1.3 * held, line
