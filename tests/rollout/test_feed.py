"""Feeding: a store read row by row, in packed batches whose order and position are exact."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pyarrow.parquet as pq
import pytest

from opd_jax.errors import InputError
from opd_jax.rollout import Rollout, Score
from opd_jax.rollout.feed import packed_batches
from opd_jax.rollout.rows import one_each
from opd_jax.rollout.score import batch_of, rows_of
from opd_jax.rollout.source import RolloutSource
from opd_jax.rollout.store import RolloutStore

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "measure_feed.py"
COUNTS = (7, 1, 12)  # rollouts of three shards


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


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards as a store writes them, in row groups of three."""
    folder, number = tmp_path_factory.mktemp("feed"), 0
    store, files = RolloutStore(folder / "store"), []
    for round_, count in enumerate(COUNTS):
        store.append([rollout(number + i) for i in range(count)])
        store.seal(round_)
        written = store.files[-1]
        files.append(folder / f"part-{round_}.parquet")
        pq.write_table(pq.read_table(written), files[-1], row_group_size=3)
        number += count
    return files


def same(got, want):
    for field in dataclasses.fields(Rollout)[:-1]:
        np.testing.assert_array_equal(getattr(got, field.name), getattr(want, field.name), field.name)
    for field in dataclasses.fields(Score):
        a, b = getattr(got.score, field.name), getattr(want.score, field.name)
        assert (a is None) == (b is None), field.name
        if b is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, field.name)


def test_any_rollout_of_any_shard_comes_out_to_the_bit(shards):
    source = RolloutSource(shards, held=1)
    assert len(source) == sum(COUNTS)
    for number in (19, 0, 7, 6, 8, 3, 2, 19, -1):
        same(source[number], rollout(number % sum(COUNTS)))
    assert source[4].response_ids.base is None  # a view would keep its row group in memory
    with pytest.raises(IndexError):
        source[20]


def test_a_store_of_one_row_group_and_chosen_columns(shards):
    [written] = (shards[0].parent / "store" / "round-00000").iterdir()
    source = RolloutSource([written], ["old_logprobs"])
    got = source[5].score
    np.testing.assert_array_equal(got.old_logprobs, rollout(5).score.old_logprobs)
    assert got.teacher_logprobs is got.teacher_topk_ids is None


def test_only_the_row_group_asked_for_is_read(shards, monkeypatch):
    read = []
    honest = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **kw: read.append(i) or honest(self, i, **kw)
    )
    source = RolloutSource(shards, held=2)
    for number in (0, 1, 2, 8, 0, 13, 1, 8):
        source[number]
    assert read == [0, 0, 1, 0]  # of the first, the third and its second, and the third again


def test_what_is_no_shard_is_named(shards, tmp_path):
    with pytest.raises(InputError, match="part-9.parquet is not"):
        RolloutSource([*shards, tmp_path / "part-9.parquet"])
    bad = tmp_path / "bad.parquet"
    whole = bytearray(shards[2].read_bytes())
    bad.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="bad.parquet is not"):
        RolloutSource([bad])
    whole[20:4000] = bytes(3980)
    bad.write_bytes(whole)
    with pytest.raises(InputError, match="bad.parquet is not"):
        [RolloutSource([bad])[number] for number in range(12)]


def feed(shards, **changes):
    settings = {"seed": 5, "rows": 2, "widths": [40], "window": 8, "threads": 1} | changes
    make = settings.pop("make", batch_of)
    return packed_batches(RolloutSource(shards), make, **settings)


def test_an_epoch_holds_every_rollout_once_as_it_is(shards):
    seen = []
    for fed in feed(shards, epochs=1):
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


def order(shards, batches=None, **changes):
    found = []
    for fed in feed(shards, make=rows_of, **changes):
        if len(found) == batches:
            break
        found.append(fed.numbers.tolist())
    return found


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def test_the_order_is_the_seeds_and_every_epoch_has_its_own(shards):
    once = order(shards, epochs=1)
    assert order(shards, epochs=1) == once == order(shards, epochs=1, threads=0)
    assert order(shards, epochs=1, seed=6) != once
    # 20 rollouts are five windows of four: an epoch ends with one.
    flat = [joined(order(shards, epochs=n, window=4)) for n in (1, 2)]
    assert flat[1][:20] == flat[0]
    assert sorted(flat[1][20:]) == sorted(flat[0])
    # It is the rollouts of a window that differ, not the order of its rows alone.
    windows = [{frozenset(flat[1][at : at + 4]) for at in range(start, start + 20, 4)} for start in (0, 20)]
    assert not windows[0] & windows[1]
    assert not any(max(window) - min(window) == 3 for window in windows[0])


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_an_epoch_without_overlap(shards, hosts):
    parts = [joined(order(shards, epochs=1, hosts=hosts, host=host)) for host in range(hosts)]
    assert sorted(joined(parts)) == list(range(20))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_narrow_rollouts_go_to_narrow_rows_and_kernels_that_cannot_pack_get_one_each(shards):
    shapes, seen = set(), []
    for fed in feed(shards, epochs=1, widths=[40, 10, 20], put=one_each, make=rows_of):
        lengths = (fed.batch.sequence_ids > 0).sum(axis=1)
        assert lengths.max() <= fed.width
        assert all(length > fed.width // 2 or fed.width == 10 for length in lengths[lengths > 0])
        assert fed.counts.max() == 1
        shapes.add(fed.batch.tokens.shape)
        seen += fed.numbers.tolist()
    assert shapes == {(2, 40), (4, 20), (8, 10)}
    assert sorted(seen) == list(range(20))


def test_a_position_is_restored_to_the_very_next_batch_from_anywhere(shards):
    whole = order(shards, batches=16)  # endless: more than two epochs
    running = iter(feed(shards, make=rows_of))
    states = []
    for want in whole:
        states.append(json.loads(json.dumps(running.get_state())))
        assert next(running).numbers.tolist() == want
    for at, state in enumerate(states):
        again = iter(feed(shards, make=rows_of))
        next(again)  # wherever it stood
        again.set_state(state)
        assert again.get_state() == state
        assert [next(again).numbers.tolist() for _ in whole[at : at + 3]] == whole[at : at + 3]


def test_a_position_passes_through_a_prefetching_thread(shards):
    whole = order(shards, batches=12)

    def ahead():
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(feed(shards, make=rows_of), prefetch_buffer_size=2)
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
def test_a_position_of_another_feed_is_refused(shards, changes, named):
    state = iter(feed(shards)).get_state()
    with pytest.raises(InputError, match=named):
        iter(feed(shards, **changes)).set_state(state)


def test_a_position_of_other_shards_is_refused(shards):
    state = iter(feed(shards)).get_state()
    with pytest.raises(InputError, match="its shards was"):
        iter(feed(shards[:2])).set_state(state)


def test_what_cannot_be_fed_is_refused(shards):
    with pytest.raises(InputError, match="host 2 of 2, 20 rollouts"):
        feed(shards, host=2, hosts=2)
    with pytest.raises(InputError, match="0 rollouts"):
        feed([])
    with pytest.raises(InputError, match="the widest rows have 9; add a width"):
        order(shards, widths=[9])


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
