"""Export: the same bits back, files of bounded size, and a folder that is never half of two models."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from opd_jax.errors import InputError
from opd_jax.files import replacing_folder, restore_folder
from opd_jax.model import (
    Qwen3Config,
    init_params,
    load_pretrained,
    make_mesh,
    param_shardings,
    parameter_table,
    save_pretrained,
)
from opd_jax.model.hf import hf_shape, hf_tensors
from opd_jax.model.hf_save import host_tensors
from opd_jax.model.parameters import Parameter

INDEX = "model.safetensors.index.json"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, a, b)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_import_of_export_is_the_same_to_the_bit(tmp_path, small, dtype, mesh, shard_bytes):
    config, params = small
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    placed = jax.device_put(params, param_shardings(config, make_mesh(*mesh))) if mesh else params
    save_pretrained(tmp_path, config, placed, shard_bytes=shard_bytes)
    _, loaded = load_pretrained(tmp_path, dtype=dtype)
    assert same(loaded, params)
    files = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    stored = {tensor.dtype for tensors in files for tensor in tensors.values()}
    assert stored == {np.dtype(dtype)}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == np.dtype(dtype).name


def test_files_are_bounded_and_the_index_names_every_tensor(tmp_path, small):
    config, params = small
    save_pretrained(tmp_path, config, params, shard_bytes=20_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = json.loads((tmp_path / INDEX).read_text())
    tensors = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, held in tensors.items() for name in held}
    sizes = [sum(value.nbytes for value in held.values()) for held in tensors.values()]
    assert max(sizes) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes)
    expected = {name: hf_shape(p) for p in parameter_table(config).values() for _, name in hf_tensors(p)}
    assert {name: value.shape for held in tensors.values() for name, value in held.items()} == expected
    assert all(len(file.read_bytes()) % 4 == 0 for file in files)  # data of whole words, aligned


def test_a_tensor_above_the_bound_has_a_file_of_its_own(tmp_path, small):
    save_pretrained(tmp_path, *small, shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 * 11 + 3
    assert same(load_pretrained(tmp_path)[1], small[1])


def test_nothing_of_an_earlier_export_remains_and_nothing_else_goes(tmp_path, small):
    config, params = small
    folder = tmp_path / "model"
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("tokens")
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 3], "top_p": 0.95}')
    beside = [source / "tokenizer.json", source / "generation_config.json", source / "absent.json"]
    save_pretrained(folder, config, params, shard_bytes=20_000, beside=beside)
    (folder / "README.md").write_text("mine")
    assert "0.95" in (folder / "generation_config.json").read_text()
    save_pretrained(folder, config, params, shard_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) == 2
    save_pretrained(folder, config, params)
    assert names_in(folder) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 0}
    assert names_in(tmp_path) == ["model", "source"]
    assert same(load_pretrained(folder)[1], params)


def test_what_cannot_be_replaced_whole_is_left_alone(tmp_path, small, monkeypatch):
    config, params = small
    (tmp_path / "model" / "inner").mkdir(parents=True)
    with pytest.raises(InputError, match="holds the folder inner"):
        save_pretrained(tmp_path / "model", config, params)
    monkeypatch.chdir(tmp_path / "model" / "inner")
    with pytest.raises(InputError, match="working folder"):
        save_pretrained(".", config, params)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="place of a file"):
        save_pretrained(tmp_path / "file", config, params)
    assert names_in(tmp_path) == ["file", "model"]


def test_a_link_to_a_folder_stays_a_link(tmp_path, small):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "there")
    save_pretrained(tmp_path / "here", *small)
    assert (tmp_path / "here").is_symlink()
    assert (tmp_path / "there" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: p.pop("norm"), "lack norm"),
        (lambda p: p["layers"].update(lora={"up": {"a": jnp.zeros(1)}}), "have layers.lora.up.a"),
        (lambda p: p.update(norm=jnp.zeros(25)), r"norm for .* is float32\[25\], not \[24\]"),
        (lambda p: p.update(norm=jnp.zeros(24, jnp.int8)), "norm for .* is int8"),
    ],
)
def test_parameters_of_another_model_are_refused_by_name(tmp_path, small, edit, message):
    config, params = small
    params = {**params, "layers": dict(params["layers"])}
    edit(params)
    with pytest.raises(InputError, match=message):
        save_pretrained(tmp_path / "model", config, params)
    assert not names_in(tmp_path)


def test_experts_are_written_one_matrix_each():
    parameter = Parameter(
        (2, 3, 4, 5), ("layers", "experts", "embed", "mlp"), "{layer}.{expert}.up", inputs=1
    )
    value = np.random.default_rng(0).normal(size=parameter.shape).astype(np.float32)
    spec = jax.sharding.PartitionSpec(None, None, "fsdp", None)
    placed = jax.device_put(value, jax.sharding.NamedSharding(make_mesh(1, 4, 2), spec))
    for array in (value, placed):
        tensors = list(host_tensors({("up",): parameter}, {("up",): array}))
        names = [name for _, name in hf_tensors(parameter)]
        assert names == ["0.0.up", "0.1.up", "0.2.up", "1.0.up", "1.1.up", "1.2.up"]
        for name, tensor in zip(names, tensors, strict=True):
            layer, expert = int(name[0]), int(name[2])
            np.testing.assert_array_equal(tensor, value[layer, expert].T)


def test_the_host_never_holds_the_model(tmp_path):
    """NumPy's memory while a sharded model is written, and what its arrays keep of it afterwards."""
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        eos_token_id=0,
    )
    placed = param_shardings(config, make_mesh(1, 4, 2))
    warm, params = (jax.device_put(init_params(config, jax.random.key(i)), placed) for i in range(2))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    layer = 4 * 256 * 512  # the largest matrix
    save_pretrained(tmp_path, config, warm)
    tracemalloc.start()
    try:
        save_pretrained(tmp_path, config, params)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total > 20 * layer
    assert peak < 3 * layer  # one as it comes, one as Hugging Face lays it out, and Python's own
    assert kept < layer / 2


# Kills: from a chosen change of the file system on, this process changes nothing any more.


class Killed(BaseException):
    pass


class Fuse:
    """Counts changes of the file system while it is lit, and lets the rest of them fail from one on."""

    changes = frozenset(
        ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
    )

    def __init__(self):
        self.lit, self.left = False, 0
        sys.addaudithook(self.audit)

    def audit(self, event, args):
        if not self.lit:
            return
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in self.changes or writes:
            self.left -= 1
            if self.left < 0:
                raise Killed(event)

    def burn(self, allowed, do):
        """Whether ``do`` was killed after ``allowed`` changes."""
        self.lit, self.left = True, allowed
        try:
            do()
        except Killed:
            return True
        finally:
            self.lit = False
        return False


@pytest.fixture(scope="module")
def fuse():
    return Fuse()  # an audit hook cannot be taken back; unlit it does nothing


@pytest.fixture(scope="module")
def two_models():
    """Models of two shapes, so that no file of the one goes with a file of the other."""
    one = Qwen3Config(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        eos_token_id=0,
    )
    other = dataclasses.replace(one, hidden_size=6, tie_word_embeddings=True)
    return [(config, init_params(config, jax.random.key(i))) for i, config in enumerate((one, other))]


@pytest.mark.parametrize(("old_bytes", "new_bytes"), [(200, 300), (10**9, 200), (200, 10**9), (None, 200)])
def test_a_kill_at_any_change_leaves_the_old_model_or_the_new(
    tmp_path, two_models, fuse, old_bytes, new_bytes
):
    old, new = two_models
    save_pretrained(tmp_path / "warm", *new, shard_bytes=new_bytes)
    saw_old = saw_new = saw_absent = 0
    for allowed in range(200):
        folder = tmp_path / str(allowed) / "model"
        folder.parent.mkdir()
        if old_bytes:
            save_pretrained(folder, *old, shard_bytes=old_bytes)
            (folder / "tokenizer.json").write_text("tokens")
        killed = fuse.burn(
            allowed, lambda folder=folder: save_pretrained(folder, *new, shard_bytes=new_bytes)
        )
        saw_absent += not folder.exists()
        try:
            config, params = load_pretrained(folder)
        except InputError:
            assert not old_bytes  # there was nothing yet, and there is nothing
            assert not folder.exists()
        else:
            assert config in (old[0], new[0])
            assert same(params, (old if config == old[0] else new)[1])
            saw_old += config == old[0]
            saw_new += config == new[0]
            assert not old_bytes or (folder / "tokenizer.json").read_text() == "tokens"
        # Whoever comes next goes on from there, and clears what was left.
        save_pretrained(folder, *new, shard_bytes=new_bytes)
        assert same(load_pretrained(folder)[1], new[1])
        assert names_in(folder.parent) == ["model"]
        assert names_in(folder) == sorted(
            [*names_in(tmp_path / "warm"), *(["tokenizer.json"] if old_bytes else [])]
        )
        if not killed:
            break
    assert not killed
    assert saw_new > bool(old_bytes)  # not killed, or while the old one was removed
    if old_bytes:
        assert saw_old > 5
        assert saw_absent == 1  # between the two renames, and put back by loading


def test_a_failure_that_is_no_kill_leaves_the_old_model_and_no_rest(tmp_path, two_models, monkeypatch):
    old, new = two_models
    folder = tmp_path / "model"
    save_pretrained(folder, *old)
    for function in ("rename", "fsync"):
        real, calls = getattr(os, function), []

        def full(*given, real=real, calls=calls):
            calls.append(given)
            if len(calls) == 2:  # the second of the two renames
                raise OSError(28, "No space left on device")
            return real(*given)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OSError, match="No space"):
                save_pretrained(folder, *new)
        assert names_in(tmp_path) == ["model"]
        assert same(load_pretrained(folder)[1], old[1])


def test_two_writers_of_one_folder_do_not_mix(tmp_path, two_models):
    (config, params), other = two_models
    folder = tmp_path / "model"
    save_pretrained(folder, config, params)
    with replacing_folder(folder, ["*"]) as new:
        with pytest.raises(InputError, match="another is writing .*/model; wait"):
            save_pretrained(folder, *other)
        (new / "note").write_text("whole")
        assert same(load_pretrained(folder)[1], params)
        # Between the two renames a reader does not put the old folder back under the writer's hands.
        folder.rename(tmp_path / ".model.old")
        restore_folder(folder)
        assert not folder.exists()
    assert names_in(folder) == ["note"]
    assert names_in(tmp_path) == ["model"]


@pytest.mark.slow
def test_two_processes_read_a_half_each_and_write_one_folder(tmp_path, small):
    config, params = small
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save_pretrained(tmp_path / "one", config, params)
    (tmp_path / "one" / "tokenizer.json").write_text("tokens")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.model.two_processes", port, tmp_path / "one", tmp_path / "two"]
    outs = [tmp_path / "told-0", tmp_path / "told-1"]
    children = [subprocess.Popen([*command, str(process), out]) for process, out in enumerate(outs)]
    assert [child.wait(timeout=200) for child in children] == [0, 0]
    told = [json.loads(out.read_text()) for out in outs]
    assert same(load_pretrained(tmp_path / "two", dtype=jnp.bfloat16)[1], params)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 2
    assert (tmp_path / "two" / "tokenizer.json").exists()
    assert names_in(tmp_path) == ["one", "told-0", "told-1", "two"]
    sharded = sum(leaf.size for leaf in jax.tree.leaves(params)) - told[0]["replicated"]
    # fsdp over both processes, tensor within each: every sharded number is read by one of the two.
    assert [each["read"] - each["replicated"] for each in told] == [sharded // 2, sharded // 2]
