"""The store: what goes in comes out, and what was touched is named."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from opd_jax.errors import InputError
from opd_jax.rollout import Rollout, RolloutStore, Score

ABOUT = {"student": "abc", "temperature": 1.0}


def rollout(round_=0, length=5, scored=True, seed=0):
    rng = np.random.default_rng(seed)
    nats = lambda *shape: -rng.exponential(size=shape).astype(np.float32)  # noqa: E731
    score = Score(
        old_logprobs=nats(length),
        teacher_logprobs=nats(length),
        teacher_entropy=-nats(length),
        teacher_topk_ids=rng.integers(9, size=(length, 3)).astype(np.int32),
        teacher_topk_logprobs=nats(length, 3),
        teacher_outside_mass=rng.random(length).astype(np.float32),
        # Of the columns that a store may hold or not, one of each shape.
        again_logprobs=nats(length),
        student_topk_logprobs=nats(length, 2),
    )
    return Rollout(
        round=round_,
        problem=f"p{seed}",
        sample=seed,
        prompt_ids=rng.integers(9, size=2).astype(np.int32),
        response_ids=rng.integers(9, size=length).astype(np.int32),
        behaviour_logprobs=nats(length),
        truncated=bool(seed % 2),
        reward=float(seed % 2),
        score=score if scored else None,
    )


def filled(path, scored=True):
    store = RolloutStore(path, ABOUT)
    for round_ in (0, 1):
        store.append([rollout(round_, length=3 + i, scored=scored, seed=i) for i in range(4)])
        store.seal(round_, note=f"round {round_}")
    return store


@pytest.mark.parametrize("scored", [True, False])
def test_what_goes_in_comes_out_to_the_bit(tmp_path, scored):
    filled(tmp_path, scored)
    store = RolloutStore(tmp_path, ABOUT)
    assert store.rounds == [0, 1]
    assert store.shard(1)["note"] == "round 1"
    for i, got in enumerate(store.read(1)):
        want = rollout(1, length=3 + i, scored=scored, seed=i)
        for field in dataclasses.fields(Rollout)[:-1]:
            np.testing.assert_array_equal(getattr(got, field.name), getattr(want, field.name))
        assert (got.score is None) == (want.score is None)
        for field in dataclasses.fields(Score) if scored else ():
            a, b = getattr(got.score, field.name), getattr(want.score, field.name)
            np.testing.assert_array_equal(a, b)
            assert b is None or a.dtype == b.dtype


def test_other_tools_open_it_as_it_lies(tmp_path):
    datasets = pytest.importorskip("datasets")
    filled(tmp_path / "store")
    import pandas

    assert len(pandas.read_parquet(tmp_path / "store")) == 8
    table = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "store"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(table) == 8
    want = rollout(1, length=6, seed=3)
    assert table[7]["response_ids"] == want.response_ids.tolist()
    np.testing.assert_array_equal(
        np.float32(table[7]["teacher_topk_logprobs"]), want.score.teacher_topk_logprobs
    )


def test_a_flipped_bit_is_named_by_file(tmp_path):
    store = filled(tmp_path)
    store.verify()
    shard = tmp_path / "round-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for act in (store.verify, lambda: store.read(1)):
        with pytest.raises(InputError, match=r"round-00001\.parquet has another SHA-256"):
            act()
    assert len(store.read(0)) == 4
    shard.unlink()
    with pytest.raises(InputError, match=r"round-00001\.parquet is missing"):
        store.verify()


def test_a_store_of_another_student_is_refused(tmp_path):
    filled(tmp_path)
    with pytest.raises(InputError, match="one student: .* written for 'abc', this run has 'xyz'"):
        RolloutStore(tmp_path, {**ABOUT, "student": "xyz"})
    with pytest.raises(InputError, match=r"one temperature: .* 1\.0, this run has 0\.5"):
        RolloutStore(tmp_path, {**ABOUT, "temperature": 0.5})


def test_an_unsealed_shard_is_not_there(tmp_path):
    store = RolloutStore(tmp_path, ABOUT)
    store.append([rollout()])
    assert RolloutStore(tmp_path, ABOUT).rounds == []
    (tmp_path / "round-00000.parquet").write_bytes(b"half a shard of a run that was killed")
    store.seal(0)
    assert len(store.read(0)) == 1


def test_rounds_are_written_once(tmp_path):
    store = filled(tmp_path)
    store.append([rollout()])
    with pytest.raises(InputError, match="has round 1 already"):
        store.seal(1)
    with pytest.raises(InputError, match="there is nothing|has none"):
        RolloutStore(tmp_path, ABOUT).seal(2)
    with pytest.raises(InputError, match=r"has rounds \[0, 1\], not 5"):
        store.read(5)


def test_a_response_of_length_zero_is_refused_going_in_and_coming_out(tmp_path):
    store = filled(tmp_path, scored=False)
    with pytest.raises(InputError, match="at least one token: a rollout of problem 'p0' has 2 and 0"):
        store.append([rollout(length=0, scored=False)])
    # A foreign writer that knows the manifest but not the rule.
    file = tmp_path / "round-00000.parquet"
    table = pq.read_table(file)
    empty = table.column("response_ids").to_pylist()
    empty[2] = []
    table = table.set_column(4, "response_ids", [empty]).set_column(5, "behaviour_logprobs", [empty])
    pq.write_table(table, file)
    manifest = json.loads((tmp_path / ".manifest.json").read_text())
    from opd_jax.files import sha256

    manifest["shards"][0]["sha256"] = sha256(file)
    (tmp_path / ".manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"row 2 of .*round-00000\.parquet has 2 and 0"):
        store.read(0)


def test_columns_must_match_and_be_finite(tmp_path):
    store = RolloutStore(tmp_path, ABOUT)
    good = rollout()
    with pytest.raises(InputError, match="5 tokens and 4 behaviour_logprobs"):
        store.append([dataclasses.replace(good, behaviour_logprobs=good.behaviour_logprobs[:-1])])
    bad = dataclasses.replace(good.score, teacher_logprobs=np.full(5, np.nan, np.float32))
    with pytest.raises(InputError, match="NaN or infinity in teacher_logprobs"):
        store.append([dataclasses.replace(good, score=bad)])


def test_a_damaged_manifest_is_named(tmp_path):
    filled(tmp_path)
    (tmp_path / ".manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is not"):
        RolloutStore(tmp_path, ABOUT)
    (tmp_path / ".manifest.json").write_text('{"schema": 2}')
    with pytest.raises(InputError, match=r"manifest\.json is not"):
        RolloutStore(tmp_path, ABOUT)
    (tmp_path / ".manifest.json").write_text('{"schema": 99}')
    with pytest.raises(InputError, match="has 99"):
        RolloutStore(tmp_path, ABOUT)
