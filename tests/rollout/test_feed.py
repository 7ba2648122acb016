"""Feeding: a store read row by row, in packed batches whose order and position are exact."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from opd_jax.errors import InputError
from opd_jax.rollout import Rollout, Score, schema
from opd_jax.rollout.feed import packed_batches
from opd_jax.rollout.rows import one_each, pack
from opd_jax.rollout.score import batch_of, rows_of
from opd_jax.rollout.source import RolloutSource
from opd_jax.rollout.store import RolloutStore

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "measure_feed.py"
COUNTS = (7, 1, 12)  # rollouts of three shards
SCORES = (
    "old_logprobs",
    "teacher_logprobs",
    "teacher_entropy",
    "teacher_topk_ids",
    "teacher_topk_logprobs",
    "teacher_outside_mass",
    "student_topk_logprobs",
)


def rollout(number):
    """Told apart by everything it holds."""
    rng = np.random.default_rng(number)
    length = int(rng.integers(1, 30))
    nats = lambda *shape: -rng.exponential(size=(length, *shape)).astype(np.float32)  # noqa: E731
    return Rollout(
        round=int(np.searchsorted(np.cumsum(COUNTS), number, side="right")),
        problem=f"p{number // 4}",
        sample=number,
        prompt_ids=rng.integers(9, size=1 + number % 3).astype(np.int32),
        response_ids=rng.integers(9, size=length).astype(np.int32),
        behaviour_logprobs=nats(),
        truncated=bool(number % 2),
        reward=float(number),
        score=Score(
            old_logprobs=nats(),
            teacher_logprobs=nats(),
            teacher_entropy=-nats(),
            teacher_topk_ids=rng.integers(9, size=(length, 3)).astype(np.int32),
            teacher_topk_logprobs=nats(3),
            teacher_outside_mass=-nats(),
            student_topk_logprobs=nats(2),
        ),
    )


def stored(store):
    """The rollouts in row groups of a few, a round a shard."""
    number = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "GROUP_BYTES", 5000)
        for round_, count in enumerate(COUNTS):
            store.append([rollout(number + i) for i in range(count)])
            store.seal(round_)
            number += count
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored(RolloutStore(tmp_path_factory.mktemp("feed")))


def same(got, want):
    for field in dataclasses.fields(Rollout)[:-1]:
        np.testing.assert_array_equal(getattr(got, field.name), getattr(want, field.name), field.name)
    for field in dataclasses.fields(Score):
        a, b = getattr(got.score, field.name), getattr(want.score, field.name)
        assert (a is None) == (b is None), field.name
        if b is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, field.name)


def test_any_rollout_of_any_shard_comes_out_to_the_bit(store):
    source = RolloutSource(store, SCORES, held=1)
    assert len(source) == sum(COUNTS)
    for number in (19, 0, 7, 6, 8, 3, 2, 19, -1):
        want = rollout(number % sum(COUNTS))
        same(source[number], want)
        assert source.length(number) == len(want.prompt_ids) + len(want.response_ids) - 1
    assert source[4].response_ids.base is None  # a view would keep its row group in memory
    with pytest.raises(IndexError):
        source[20]


def test_only_the_columns_asked_for_are_read(store, monkeypatch):
    read = set()
    honest = pq.ParquetFile.read_row_group

    def reading(self, group, columns, **options):
        read.update(columns)
        return honest(self, group, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", reading)
    got = RolloutSource(store, ["old_logprobs"])[5].score
    np.testing.assert_array_equal(got.old_logprobs, rollout(5).score.old_logprobs)
    assert got.teacher_logprobs is got.teacher_topk_ids is None
    assert read & {field.name for field in dataclasses.fields(Score)} == {"old_logprobs"}
    assert RolloutSource(store)[5].score is None


def test_only_the_row_group_asked_for_is_read(store, monkeypatch):
    read = []
    source = RolloutSource(store, held=2)
    for number in (0, 7, 8):  # a shard's lengths are read when it is first asked for something
        source.length(number)
    honest = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **kw: read.append(i) or honest(self, i, **kw)
    )
    for number in (0, 1, 8, 0, 13, 1, 8):
        source[number]
    assert read == [0, 0, 1, 0]  # of the first shard, the third and its second, and the third again


def test_a_store_on_an_object_store_is_fed_as_one_in_a_folder(store):
    pytest.importorskip("obstore", reason="object stores need opd_jax[objects]")
    far = stored(RolloutStore("memory://fed/here"))
    for number in (19, 0, 7):
        same(RolloutSource(far, SCORES)[number], rollout(number))
    assert order(far, epochs=1) == order(store, epochs=1)
    torn = far.shards[1]["file"]
    data, version = far.place.read(torn)
    far.place.update(torn, data[:-1] + bytes([data[-1] ^ 1]), version)
    with pytest.raises(InputError, match=f"memory://fed/here/{torn} has another SHA-256"):
        RolloutSource(far)[7]
    far.place.remove(torn)
    with pytest.raises(InputError, match="is missing"):
        RolloutSource(far)[7]


def test_a_shard_that_is_not_as_it_was_written_is_named_when_it_is_touched(tmp_path):
    written = stored(RolloutStore(tmp_path))
    file = Path(written.path, written.shards[2]["file"])
    whole = file.read_bytes()
    for at in range(5, len(whole), len(whole) // 20):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        source = RolloutSource(written)
        same_ids = source[0].response_ids, source[7].response_ids  # of other shards
        assert [len(ids) for ids in same_ids] == [len(rollout(i).response_ids) for i in (0, 7)]
        for touch in (source.length, source.__getitem__):
            with pytest.raises(InputError, match=f"{file} has another SHA-256 than the manifest"):
                touch(8)
    file.unlink()
    with pytest.raises(InputError, match=f"{file} is missing"):
        RolloutSource(written)[8]


def test_a_shard_that_rots_after_it_was_verified_is_named_by_its_pages(tmp_path):
    written = stored(RolloutStore(tmp_path))
    source = RolloutSource(written, SCORES)
    source.length(8)
    file = Path(written.path, written.shards[2]["file"])
    pages = pq.read_metadata(file).row_group(0).column(5)
    rotten = bytearray(file.read_bytes())
    rotten[pages.data_page_offset + pages.total_compressed_size - 3] ^= 1
    file.write_bytes(rotten)
    with pytest.raises(InputError, match=f"{file} is not .*CRC"):
        source[8]


def test_a_column_that_is_not_there_is_named(store):
    with pytest.raises(InputError, match="round-00000/part-.* has no reference_logprobs"):
        RolloutSource(store, ["reference_logprobs"])[0]
    with pytest.raises(InputError, match="got 'teacher_hidden'; choose from old_logprobs, "):
        RolloutSource(store, ["teacher_hidden"])


SETTINGS = {"seed": 5, "rows": 2, "widths": [40], "window": 8, "threads": 1}


def feed(store, **changes):
    settings = SETTINGS | changes
    make = settings.pop("make", batch_of)
    return packed_batches(RolloutSource(store, SCORES), make, **settings)


def test_an_epoch_holds_every_rollout_once_as_it_is(store):
    seen = []
    for fed in feed(store, epochs=1):
        assert fed.batch.rows.tokens.shape == (2, 40)
        assert fed.counts.sum() == len(fed.numbers)
        place = 0
        for row, count in enumerate(fed.counts):
            for number in range(1, count + 1):
                want = rollout(fed.numbers[place])
                mask = fed.batch.rows.mask[row] & (fed.batch.rows.sequence_ids[row] == number)
                np.testing.assert_array_equal(fed.batch.rows.targets[row][mask], want.response_ids)
                np.testing.assert_array_equal(fed.batch.signal.old[row][mask], want.score.old_logprobs)
                np.testing.assert_array_equal(
                    fed.batch.signal.support_ids[row][mask], want.score.teacher_topk_ids
                )
                assert (fed.batch.signal.reward[row][mask] == want.reward).all()
                place += 1
        same_problem = fed.numbers[:, None] // 4 == fed.numbers // 4
        group = [
            fed.batch.signal.group[r][fed.batch.rows.sequence_ids[r] == n][0]
            for r, c in enumerate(fed.counts)
            for n in range(1, c + 1)
        ]
        np.testing.assert_array_equal(np.equal.outer(group, group), same_problem)
        seen += fed.numbers.tolist()
    assert sorted(seen) == list(range(20))
    assert seen != sorted(seen)


def test_of_the_rollouts_those_of_one_batch_are_read(store, monkeypatch):
    read = []
    honest = RolloutSource.__getitem__
    monkeypatch.setattr(RolloutSource, "__getitem__", lambda self, i: read.append(i) or honest(self, i))
    running = iter(feed(store, window=20))
    for _ in range(2):
        read.clear()
        fed = next(running)
        assert sorted(read) == sorted(fed.numbers)
        assert len(read) < 20


def order(store, batches=None, **changes):
    found = []
    for fed in feed(store, make=rows_of, **changes):
        if len(found) == batches:
            break
        found.append(fed.numbers.tolist())
    return found


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def test_the_order_is_the_seeds_and_every_epoch_has_its_own(store):
    once = order(store, epochs=1)
    assert order(store, epochs=1) == once == order(store, epochs=1, threads=0)
    assert order(store, epochs=1, seed=6) != once
    # 20 rollouts are five windows of four: an epoch ends with one.
    flat = [joined(order(store, epochs=n, window=4)) for n in (1, 2)]
    assert flat[1][:20] == flat[0]
    assert sorted(flat[1][20:]) == sorted(flat[0])
    # It is the rollouts of a window that differ, not the order of its rows alone.
    windows = [{frozenset(flat[1][at : at + 4]) for at in range(start, start + 20, 4)} for start in (0, 20)]
    assert not windows[0] & windows[1]
    assert not any(max(window) - min(window) == 3 for window in windows[0])


def test_a_window_is_shuffled_in_its_rows_and_in_its_batches(store):
    drawn = joined(order(store, epochs=1, window=1, rows=1))  # whose windows leave the epoch as it is
    batches = order(store, epochs=1, window=20, put=one_each)
    assert sorted(joined(batches)) == sorted(drawn)
    neighbours = {frozenset(pair) for pair in itertools.pairwise(drawn)}
    assert len({frozenset(batch) for batch in batches} & neighbours) < len(batches) / 2
    widths = [fed.width for fed in feed(store, epochs=1, window=20, rows=1, widths=[10, 20, 40])]
    assert len(set(widths)) == 3
    assert len(list(itertools.groupby(widths))) > 3


@pytest.mark.parametrize("put", [pack, one_each])
@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_read_together_what_one_with_as_many_times_the_rows_would(store, hosts, put):
    settings = {"epochs": 1, "widths": [20, 40], "put": put}
    parts = [list(feed(store, **settings, window=4, hosts=hosts, host=host)) for host in range(hosts)]
    whole = list(feed(store, **settings, window=4 * hosts, rows=2 * hosts))
    assert len({fed.width for fed in whole}) == 2
    for one, *several in zip(whole, *parts, strict=True):
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), fed.batch) for fed in several]
        assert all(shape == shapes[0] for shape in shapes)
        assert several[0].batch.rows.tokens.shape == (80 // one.width, one.width)
        assert sorted(joined(fed.numbers for fed in several)) == sorted(one.numbers)
        filled = [np.count_nonzero(fed.counts) for fed in several]
        assert sum(filled) == np.count_nonzero(one.counts)
        assert max(filled) - min(filled) <= 1
    assert sorted(joined(fed.numbers for fed in joined(parts))) == list(range(20))
    # A window's last batch of a width may have fewer rows than there are hosts.
    without = [fed for fed in joined(parts) if not len(fed.numbers)]
    assert without
    assert not any(np.any(array) for fed in without for array in jax.tree.leaves(fed.batch))


def test_a_position_is_the_same_on_every_host(store):
    settings = {"widths": [20, 40], "window": 4, "make": rows_of}
    running = [iter(feed(store, **settings, hosts=3, host=host)) for host in range(3)]
    read, states = [], []
    for _ in range(20):  # more than two epochs
        told = [feed_.get_state() for feed_ in running]
        assert told[0] == told[1] == told[2]
        states.append(json.loads(json.dumps(told[0])))
        read.append([next(feed_) for feed_ in running])
    for at in (1, 7, 13, 19):
        for host in range(3):
            again = iter(feed(store, **settings, hosts=3, host=host))
            again.set_state(states[at])
            for step in read[at:]:
                got = next(again)
                np.testing.assert_array_equal(got.numbers, step[host].numbers)
                assert got.batch.tokens.shape == step[0].batch.tokens.shape


def test_narrow_rollouts_go_to_narrow_rows_and_kernels_that_cannot_pack_get_one_each(store):
    shapes, seen = set(), []
    for fed in feed(store, epochs=1, widths=[40, 10, 20], put=one_each, make=rows_of):
        lengths = (fed.batch.sequence_ids > 0).sum(axis=1)
        assert lengths.max() <= fed.width
        assert all(length > fed.width // 2 or fed.width == 10 for length in lengths[lengths > 0])
        assert fed.counts.max() == 1
        shapes.add(fed.batch.tokens.shape)
        seen += fed.numbers.tolist()
    assert shapes == {(2, 40), (4, 20), (8, 10)}
    assert sorted(seen) == list(range(20))


def test_a_position_is_restored_to_the_very_next_batch_from_anywhere(store):
    whole = order(store, batches=16)  # endless: more than two epochs
    running = iter(feed(store, make=rows_of))
    states = []
    for want in whole:
        states.append(json.loads(json.dumps(running.get_state())))
        assert next(running).numbers.tolist() == want
    for at, state in enumerate(states):
        again = iter(feed(store, make=rows_of))
        next(again)  # wherever it stood
        again.set_state(state)
        assert again.get_state() == state
        assert [next(again).numbers.tolist() for _ in whole[at : at + 3]] == whole[at : at + 3]


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_batch_that_could_not_be_read_is_still_to_come(tmp_path, at):
    written = stored(RolloutStore(tmp_path / "here"))
    whole = order(written, epochs=1)
    running = iter(packed_batches(RolloutSource(written, held=1), rows_of, **SETTINGS, epochs=1))
    got = [next(running).numbers.tolist() for _ in range(at)]
    (tmp_path / "here").rename(tmp_path / "away")
    with pytest.raises(InputError, match="here/round-00"):
        got.extend(fed.numbers.tolist() for fed in running)  # what is in memory already needs no store
    state = running.get_state()
    (tmp_path / "away").rename(tmp_path / "here")
    again = iter(feed(written, make=rows_of, epochs=1))
    again.set_state(state)
    assert got + [fed.numbers.tolist() for fed in again] == whole
    assert got + [fed.numbers.tolist() for fed in running] == whole


def test_a_position_passes_through_a_prefetching_thread(store):
    whole = order(store, batches=12)

    def ahead():
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(feed(store, make=rows_of), prefetch_buffer_size=2)
        )

    running = ahead()
    assert [next(running).numbers.tolist() for _ in range(5)] == whole[:5]
    state = running.get_state()
    running.close()
    again = ahead()
    again.set_state(state)
    assert [next(again).numbers.tolist() for _ in range(7)] == whole[5:]
    again.close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 6}, "seed was 5, here it is 6"),
        ({"hosts": 2}, "hosts was 1, here it is 2"),
        ({"window": 9}, "window was 8, here it is 9"),
        ({"rows": 3}, "rows was 2, here it is 3"),
        ({"put": one_each}, "put was 'pack', here it is 'one_each'"),
    ],
)
def test_a_position_of_another_feed_is_refused(store, changes, named):
    state = iter(feed(store)).get_state()
    with pytest.raises(InputError, match=named):
        iter(feed(store, **changes)).set_state(state)


def test_a_position_of_other_shards_is_refused(store, tmp_path):
    state = iter(feed(store)).get_state()
    other = RolloutStore(tmp_path)
    other.append([rollout(0)])
    other.seal(0)
    with pytest.raises(InputError, match="its shards was"):
        iter(feed(other)).set_state(state)


def test_what_is_no_position_is_refused(store):
    running = feed(store, epochs=1)
    state = iter(running).get_state()
    for bad in (
        {},
        {**state, "of": None},
        {**state, "window": {}},
        {**state, "window": {"next_index": 99}},
        {**state, "window": {"next_index": 0.5}},
        {**state, "window": [0]},
        {**state, "batches": 999},
        {**state, "batches": -1},
        {**state, "batches": 0.7},
        {**state, "window": {"next_index": 3}, "batches": 1},  # the end, where there are no batches
    ):
        with pytest.raises(InputError, match="a position is what get_state of a feed has told: {.* is none"):
            iter(running).set_state(bad)


def test_what_cannot_be_fed_is_refused(store, tmp_path):
    with pytest.raises(InputError, match="host 2 of 2, 20 rollouts"):
        feed(store, host=2, hosts=2)
    with pytest.raises(InputError, match="0 rollouts"):
        feed(RolloutStore(tmp_path))
    for bad in ({"widths": []}, {"widths": [20, 0]}, {"rows": 0}, {"window": 0}):
        with pytest.raises(InputError, match="must be positive: got rows"):
            feed(store, **bad)
    with pytest.raises(InputError, match="the widest rows have 9; add a width"):
        order(store, widths=[9])


@pytest.mark.slow
def test_the_measurement_small(tmp_path):
    """Processes of their own: one reads an epoch, two read its halves."""
    asked = "--rollouts=600 --tokens=256 --rows=4 --width=512 --window=64 --ragged".split()
    told = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), *asked], capture_output=True, text=True, check=True
    ).stdout
    end = json.loads(told.splitlines()[-1])
    assert end["restored_exactly"]
    assert end["each_rollout_once"]
    assert end["peak_resident_gb"] < 1.5
    assert not any(tmp_path.iterdir())
