"""The store: what goes in comes out, what was touched is named, and nothing good is thrown away."""

import dataclasses
import io
import json

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest

from opd_jax.errors import InputError
from opd_jax.rollout import Rollout, RolloutStore, Score
from opd_jax.rollout.schema import GROUP_BYTES, encode
from opd_jax.rollout.storage import LocalPlace, digest_of

ABOUT = {"student": "abc", "temperature": 1.0}


def rollout(round_=0, length=5, scored=True, seed=0, hidden=False):
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
        teacher_hidden=rng.normal(size=(length, 4)).astype(ml_dtypes.bfloat16) if hidden else None,
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


def rollouts(round_=0, **options):
    return [rollout(round_, length=3 + i, seed=i, **options) for i in range(4)]


def filled(path, about=ABOUT, **options):
    """Two rounds of four rollouts in two parts each."""
    store = RolloutStore(path, about)
    for round_ in (0, 1):
        four = rollouts(round_, **options)
        store.append(four[:2])
        store.append(four[2:])
        store.seal(round_, note=f"round {round_}")
    return store


def shards(path, round_):
    return [path / shard["file"] for shard in RolloutStore(path).shard(round_)["shards"]]


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        for field in dataclasses.fields(Rollout)[:-1]:
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
        assert (a.score is None) == (b.score is None)
        for field in dataclasses.fields(Score) if b.score else ():
            x, y = getattr(a.score, field.name), getattr(b.score, field.name)
            np.testing.assert_array_equal(x, y)
            assert y is None or x.dtype == y.dtype


def rewrite_manifest(path, change):
    """Change a manifest as one who knows its rule would."""
    file = path / ".manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    del manifest["sha256"]
    manifest["sha256"] = digest_of(json.dumps(manifest, sort_keys=True).encode())
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize("options", [{}, {"scored": False}, {"hidden": True}])
def test_what_goes_in_comes_out_to_the_bit(tmp_path, options):
    filled(tmp_path, **options)
    store = RolloutStore(tmp_path, ABOUT)
    assert store.rounds == [0, 1]
    told = store.shard(1)
    assert (told["note"], told["rows"], told["tokens"]) == ("round 1", 4, 3 + 4 + 5 + 6)
    assert [shard["rows"] for shard in told["shards"]] == [2, 2]
    same(store.read(1), rollouts(1, **options))


def test_other_tools_open_it_as_it_lies(tmp_path):
    datasets = pytest.importorskip("datasets")
    store = filled(tmp_path / "store", hidden=True)
    store.append(rollouts(2, hidden=True))  # not sealed, and so not seen
    import pandas

    frame = pandas.read_parquet(tmp_path / "store")
    assert len(frame) == 8
    table = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "store"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(table) == 8
    want = rollout(1, length=6, seed=3, hidden=True)
    for row in (table[7], frame.iloc[7]):
        np.testing.assert_array_equal(row["response_ids"], want.response_ids)
        np.testing.assert_array_equal(
            np.stack(row["teacher_topk_logprobs"]).astype(np.float32), want.score.teacher_topk_logprobs
        )
        hidden = np.frombuffer(row["teacher_hidden"], ml_dtypes.bfloat16).reshape(6, -1)
        np.testing.assert_array_equal(hidden, want.score.teacher_hidden)
    # A file by itself says whose it is.
    says = json.loads(pq.read_schema(shards(tmp_path / "store", 1)[1]).metadata[b"opd_jax"])
    assert (says["about"], says["round"], says["part"]) == (ABOUT, 1, 1)


def test_a_row_group_holds_so_many_bytes_whatever_the_columns():
    for scored in (True, False):
        many = [rollout(length=2000, seed=i, scored=scored) for i in range(60)]
        file = pq.ParquetFile(io.BytesIO(encode(many, {})))
        groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
        assert sum(groups) / GROUP_BYTES * 0.8 < len(groups) < sum(groups) / GROUP_BYTES * 1.2 + 1


# Damage to what is sealed


def flip(file, foreign):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file, foreign):
    file.write_bytes(file.read_bytes()[:-9])


def another(file, foreign):
    file.write_bytes(shards(foreign, 1)[1].read_bytes())


def another_round(file, foreign):
    file.write_bytes(shards(file.parent.parent, 0)[1].read_bytes())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "has another SHA-256 than the manifest"),
        (truncate, r"is cut off, at \d+ of \d+ bytes"),
        (lambda file, foreign: file.unlink(), "is missing"),
        (another, "is a shard of another store or round"),
        (another_round, "is a shard of another store or round"),
    ],
)
def test_a_damaged_shard_is_named_and_the_rest_is_read(tmp_path, damage, words):
    store = filled(tmp_path / "store")
    filled(tmp_path / "foreign", {**ABOUT, "student": "other"}, scored=False)
    store.verify()
    file = shards(tmp_path / "store", 1)[1]
    damage(file, tmp_path / "foreign")
    for act in (store.verify, lambda: store.read(1)):
        with pytest.raises(InputError, match=f"{file} {words}") as error:
            act()
        assert "\n" not in str(error.value)
    same(store.read(0), rollouts(0))


def test_a_shard_that_the_manifest_does_not_know_is_named(tmp_path):
    store = filled(tmp_path / "store")
    filled(tmp_path / "foreign", {**ABOUT, "student": "other"})
    [_, foreign] = shards(tmp_path / "foreign", 0)
    copied = tmp_path / "store" / "round-00000" / foreign.name
    copied.write_bytes(foreign.read_bytes())
    with pytest.raises(InputError, match=f"{copied} is not in the manifest"):
        store.verify()


def test_files_that_tools_would_read_beside_the_shards_are_named(tmp_path):
    store = filled(tmp_path)
    [one, *_] = shards(tmp_path, 0)
    store.append(rollouts(2))  # which tools pass by
    (tmp_path / "round-00007").mkdir()
    for stray, words in (
        (tmp_path / "x.parquet", "is not in the manifest"),
        (tmp_path / "round-00007" / "notes.txt", "is not in the manifest"),
        (tmp_path / "round-00007" / one.name, "is of another store or round"),
    ):
        store.verify()
        stray.write_bytes(one.read_bytes())
        with pytest.raises(InputError, match=f"{stray} {words}"):
            store.verify()
        stray.unlink()


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    store = filled(tmp_path)
    for file in (shards(tmp_path, 0)[0], tmp_path / ".manifest.json"):
        file.unlink()
        file.mkdir()
        with pytest.raises(InputError, match=rf"{file} is not \(Is a directory\)") as error:
            store.verify()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("sealed", [True, False])
def test_shards_without_a_manifest_are_refused(tmp_path, sealed):
    store = filled(tmp_path) if sealed else RolloutStore(tmp_path, ABOUT)
    if not sealed:
        store.append(rollouts(0))
        store.close()
    before = sorted(tmp_path.rglob("part-*"))
    other = RolloutStore(tmp_path, ABOUT)
    (tmp_path / ".manifest.json").unlink()
    for act in (
        lambda: RolloutStore(tmp_path),
        other.verify,
        other.__enter__,
        lambda: other.append([rollout(9)]),
        lambda: other.seal(0),
        lambda: other.discard(0),
    ):
        with pytest.raises(InputError, match=f"{before[0].relative_to(tmp_path)} and no .manifest.json"):
            act()
    assert sorted(tmp_path.rglob("part-*")) == before
    assert not (tmp_path / ".manifest.json").exists()


def test_a_damaged_manifest_is_named(tmp_path):
    filled(tmp_path)
    file = tmp_path / ".manifest.json"
    good = file.read_text()
    for bad, words in (
        ("{", "whole JSON"),
        ("[" * 100_000, "whole JSON"),
        ('{"schema": 3}', "by its own SHA-256"),
        (good.replace('"rows": 2', '"rows": 3'), "by its own SHA-256"),
        ('{"schema": 99}', "has 99"),
    ):
        file.write_text(bad)
        with pytest.raises(InputError, match=f"manifest.*{words}"):
            RolloutStore(tmp_path, ABOUT)


# Whose store it is


def test_a_store_of_another_student_is_refused_unless_it_is_named(tmp_path):
    filled(tmp_path)
    with pytest.raises(InputError, match="one student: .* written for 'abc', this run has 'xyz'"):
        RolloutStore(tmp_path, {**ABOUT, "student": "xyz"})
    other = {"student": "xyz", "temperature": 0.5}
    with pytest.raises(InputError, match=r"--store\.accept='\[temperature=1\.0\]'"):
        RolloutStore(tmp_path, {**ABOUT, "temperature": 0.5})
    with pytest.raises(InputError, match="one temperature"):
        RolloutStore(tmp_path, other, ["student=abc", "temperature=0.7"])
    with pytest.raises(InputError, match="named with its value: .*'student'"):
        RolloutStore(tmp_path, other, ["student"])
    store = RolloutStore(tmp_path, other, ["student=abc", "temperature=1.0"])
    same(store.read(0), rollouts(0))
    with pytest.raises(InputError, match="rollouts of one student are not added to those of another"):
        store.append(rollouts(2))


def test_a_digest_is_named_by_its_beginning(tmp_path):
    digest = "0123456789abcdef" * 4
    filled(tmp_path, {"student": digest})
    with pytest.raises(InputError, match=r"'\[student=0123456789ab\]'"):
        RolloutStore(tmp_path, {"student": "f" * 64})
    RolloutStore(tmp_path, {"student": "f" * 64}, ["student=0123456789ab"])
    for text in ("student=0123456789", "student=0123456789ac", "tokenizer=0123456789ab"):
        with pytest.raises(InputError, match="one student"):
            RolloutStore(tmp_path, {"student": "f" * 64}, [text])


# What is not sealed


def test_parts_that_were_appended_outlive_who_appended_them(tmp_path):
    store = RolloutStore(tmp_path, ABOUT)
    four = rollouts(0)
    store.append(four[:2], policy="p")
    store.close()
    again = RolloutStore(tmp_path, ABOUT)
    assert again.rounds == []
    same(again.pending(0, policy="p"), four[:2])
    again.append(four[2:], policy="p")
    again.seal(0)
    same(again.read(0), four)
    whole = RolloutStore(tmp_path / "whole", ABOUT)
    whole.append(four[:2], policy="p")
    whole.append(four[2:], policy="p")
    whole.seal(0)
    assert again.shard(0) == whole.shard(0)
    with pytest.raises(InputError, match="has round 0 already"):
        again.pending(0)


def test_a_torn_part_is_set_aside_alone_and_made_again_in_its_place(tmp_path, capsys):
    four = rollouts(0)
    store = RolloutStore(tmp_path, ABOUT)
    for one in four[:3]:
        store.append([one])
    store.close()
    torn = sorted((tmp_path / ".round-00000").glob("part-*"))[1]
    torn.write_bytes(torn.read_bytes()[:100])
    same(store.pending(0), [four[0], four[2]])
    assert torn.exists()  # to look is not to change
    assert capsys.readouterr().err == ""
    left = torn.read_bytes()
    with store:
        same(store.pending(0), [four[0], four[2]])
        assert not torn.exists()
        [aside] = (tmp_path / ".damaged").iterdir()
        assert aside.read_bytes() == left
        [told] = capsys.readouterr().err.splitlines()
        assert str(torn) in told
        assert f".damaged/{aside.name}" in told
        with pytest.raises(InputError, match="part 1 of round 0 in .* is lost"):
            store.seal(0)
        store.append([four[1]])
        store.append([four[3]])
        store.seal(0)
    same(store.read(0), four)
    store.verify()


def test_a_round_that_was_moved_but_not_named_yet_is_not_lost(tmp_path):
    store = RolloutStore(tmp_path, ABOUT)
    four = rollouts(0)
    store.append(four[:3])
    store.close()
    (tmp_path / ".round-00000").rename(tmp_path / "round-00000")  # killed here, before the manifest
    assert store.rounds == []
    same(store.pending(0), four[:3])
    store.append(four[3:])
    store.seal(0)
    same(store.read(0), four)
    store.verify()
    assert not (tmp_path / ".round-00000").exists()


def test_parts_of_others_are_neither_taken_nor_thrown_away(tmp_path):
    store = RolloutStore(tmp_path / "store", ABOUT)
    other = RolloutStore(tmp_path / "other", {**ABOUT, "student": "other"})
    for one in (store, other):
        one.append(rollouts(0)[:2], policy="p")
        one.close()
    with pytest.raises(InputError, match=r"part-00000-.* was made by \{'policy': 'p'\}, this run has"):
        store.pending(0, policy="q")
    staged = tmp_path / "store" / ".round-00000"
    [foreign] = (tmp_path / "other" / ".round-00000").iterdir()
    copied = staged / foreign.name.replace("part-00000", "part-00001")
    copied.write_bytes(foreign.read_bytes())
    stray = staged / "notes.txt"
    more = rollouts(0)[2:]
    for file, words in ((copied, "is of another store or round"), (stray, "is none")):
        file.write_bytes(foreign.read_bytes())
        for act in (
            lambda: store.pending(0),
            lambda: store.append(more, policy="p"),
            lambda: store.seal(0),
        ):
            with pytest.raises(InputError, match=f"{file} {words}"):
                act()
            store.close()
        file.unlink()
    same(store.pending(0, policy="p"), rollouts(0)[:2])


def test_what_can_be_had_again_is_discarded(tmp_path):
    store = filled(tmp_path)
    store.append(rollouts(2)[:1])
    store.discard(2)
    assert store.pending(2) == []
    store.append(rollouts(2))
    store.seal(2)
    same(store.read(2), rollouts(2))
    with pytest.raises(InputError, match="has round 1 already"):
        store.discard(1)


def test_rounds_are_written_once(tmp_path):
    store = filled(tmp_path)
    for act in (lambda: store.append([rollout(1)]), lambda: store.seal(1)):
        with pytest.raises(InputError, match="has round 1 already"):
            act()
    with pytest.raises(InputError, match="has none"):
        RolloutStore(tmp_path / "empty", ABOUT).seal(2)
    with pytest.raises(InputError, match=r"has rounds \[0, 1\], not 5"):
        store.read(5)


def test_two_writers_do_not_meet(tmp_path):
    first, second = (RolloutStore(tmp_path, ABOUT) for _ in range(2))
    first.append(rollouts(0)[:2])
    for act in (lambda: second.append(rollouts(0)), lambda: second.seal(0), lambda: second.discard(0)):
        with pytest.raises(InputError, match=f"{tmp_path} is in use"):
            act()
    same(second.pending(0), rollouts(0)[:2])  # reading takes no lock
    first.append(rollouts(0)[2:])
    first.seal(0)
    second.append(rollouts(1))
    second.seal(1)
    assert first.rounds == second.rounds == [0, 1]
    same(first.read(0), rollouts(0))


def test_a_file_that_another_has_written_since_is_not_replaced(tmp_path):
    slow, quick = LocalPlace(tmp_path), LocalPlace(tmp_path)
    first = slow.update("a", b"first", None)
    quick.update("a", b"second", first)
    for version in (first, None):
        with pytest.raises(InputError, match=f"{tmp_path}/a has changed since it was read"):
            slow.update("a", b"third", version)
    assert slow.read("a")[0] == b"second"


def test_a_manifest_is_parsed_once_for_each_version(tmp_path, monkeypatch):
    store, parsed = filled(tmp_path), []
    honest = json.loads
    monkeypatch.setattr(json, "loads", lambda data: parsed.append(len(data)) or honest(data))
    reader = RolloutStore(tmp_path, ABOUT)
    whole = (tmp_path / ".manifest.json").stat().st_size
    for _ in range(9):
        assert reader.rounds == [0, 1]
        reader.shard(1)["shards"].clear()  # the caller's own
        assert len(reader.shards) == 4
    assert parsed.count(whole) == 1
    store.append(rollouts(2))
    store.seal(2)
    for one in (store, reader):
        assert one.rounds == [0, 1, 2]
    assert [size for size in parsed if size > whole] == [(tmp_path / ".manifest.json").stat().st_size]


# What is refused


def test_a_response_of_length_zero_is_refused_going_in_and_coming_out(tmp_path):
    store = filled(tmp_path, scored=False)
    with pytest.raises(InputError, match="at least one token: a rollout of problem 'p0' has 2 and 0"):
        store.append([rollout(2, length=0, scored=False)])
    assert store.pending(2) == []
    # A foreign writer that knows the manifest but not the rule.
    file = shards(tmp_path, 0)[0]
    table = pq.read_table(file)
    empty = table.column("response_ids").to_pylist()
    empty[1] = []
    nats = [[-1.0] * len(ids) for ids in empty]
    table = table.set_column(4, "response_ids", [empty]).set_column(5, "behaviour_logprobs", [nats])
    pq.write_table(table, file)

    def change(manifest):
        manifest["rounds"][0]["shards"][0]["sha256"] = digest_of(file.read_bytes())

    rewrite_manifest(tmp_path, change)
    with pytest.raises(InputError, match=f"row 1 of {file} has 2 and 0"):
        store.read(0)


def test_columns_must_match_and_be_finite(tmp_path):
    store = RolloutStore(tmp_path, ABOUT)
    good = rollout()
    with pytest.raises(InputError, match="5 tokens and 4 behaviour_logprobs"):
        store.append([dataclasses.replace(good, behaviour_logprobs=good.behaviour_logprobs[:-1])])
    bad = dataclasses.replace(good.score, teacher_logprobs=np.full(5, np.nan, np.float32))
    with pytest.raises(InputError, match="NaN or infinity in teacher_logprobs"):
        store.append([dataclasses.replace(good, score=bad)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"response_ids": np.array([2**40, 1, 2, 3, 4])}, "has 1 to 1099511627776 in response_ids"),
        ({"response_ids": np.array([-1, 1, 2, 3, 4])}, "has -1 to 4 in response_ids"),
        ({"prompt_ids": np.array([1.5, 1])}, "has float64 in prompt_ids"),
        ({"response_ids": np.zeros((5, 1), int)}, r"response_ids of shape \[5, 1\], not of 1 axes"),
        ({"behaviour_logprobs": -np.ones((5, 2))}, r"behaviour_logprobs of shape \[5, 2\], not of 1 axes"),
        ({"behaviour_logprobs": np.ones(5)}, "has 1 in behaviour_logprobs"),
        ({"reward": float("nan")}, "finite number: .* has nan"),
        ({"reward": None}, "finite number: .* has None"),
        ({"round": -3}, "has round -3"),
        ({"sample": 2**40}, "has sample 1099511627776"),
        ({"sample": 0.5}, r"has sample 0\.5"),
        ({"problem": None}, "text that UTF-8 has: .* has None"),
        ({"problem": "\ud800"}, r"text that UTF-8 has: .* has '\\ud800'"),
    ],
)
def test_what_would_not_be_stored_as_it_is_is_refused(tmp_path, change, words):
    store = RolloutStore(tmp_path, ABOUT)
    with pytest.raises(InputError, match=words) as error:
        store.append([dataclasses.replace(rollout(), **change)])
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_columns_of_scores_have_their_axes_and_kinds(tmp_path):
    store, good = RolloutStore(tmp_path, ABOUT), rollout()
    for name, values, words in (
        ("teacher_topk_logprobs", -np.ones(5), r"of shape \[5\], not of 2 axes"),
        ("teacher_topk_ids", np.ones((5, 3)), "has float64 in teacher_topk_ids"),
        ("teacher_logprobs", np.full(5, 2.5), r"has 2\.5 in teacher_logprobs"),
    ):
        with pytest.raises(InputError, match=words):
            store.append([dataclasses.replace(good, score=dataclasses.replace(good.score, **{name: values}))])
    rounded = dataclasses.replace(good.score, teacher_logprobs=np.full(5, 0.25))  # as bfloat16 has it
    store.append([dataclasses.replace(good, score=rounded)])


def test_rollouts_of_a_part_have_the_same_columns(tmp_path):
    store, good = RolloutStore(tmp_path, ABOUT), rollout()
    wide = dataclasses.replace(good.score, teacher_topk_ids=np.ones((5, 4), int))
    for other, words in (
        (rollout(scored=False, seed=1), "again_logprobs of problem 'p1' is None, of problem 'p0' \\[R\\]"),
        (
            dataclasses.replace(good, score=wide),
            r"teacher_topk_ids of .* is \[R, 4\], of problem 'p0' \[R, 3\]",
        ),
    ):
        with pytest.raises(InputError, match=words):
            store.append([good, other])
        with pytest.raises(InputError, match="the same columns"):
            store.append([other, good])
