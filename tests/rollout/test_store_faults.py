"""A store whose process dies at any of its steps on the disk, runs out of room, or may not write."""

import contextlib
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from opd_jax.errors import InputError
from opd_jax.rollout import RolloutStore
from tests.rollout.test_store import ABOUT, rollouts, same


class Died(BaseException):
    """The process is gone: nothing it would still have done on the way out is done."""


@contextlib.contextmanager
def dying(patch, at):
    """Let the ``at``-th step on the disk, and every one after it, be the last; yields the steps so far.

    A file that is being written when the process dies is left with half of its content.
    """
    steps = []

    def step(name):
        steps.append(name)
        if len(steps) > at:
            raise Died

    def wrapped(honest, name):
        def act(*args, **options):
            step(name)
            return honest(*args, **options)

        return act

    def write(file, data):
        try:
            step("write")
        except Died:
            if len(steps) == at + 1:
                honest_write(file, data[: len(data) // 2])
            raise
        return honest_write(file, data)

    honest_write = Path.write_bytes
    with patch.context() as patched:
        for module, name in [(os, n) for n in ("replace", "rename", "fsync", "chmod")] + [
            (Path, n) for n in ("mkdir", "unlink", "rmdir")
        ]:
            patched.setattr(module, name, wrapped(getattr(module, name), name))
        patched.setattr(Path, "write_bytes", write)
        yield steps


def work(path):
    """Two rounds of two parts; what an earlier process did is not done again. Returns what it did."""
    store, did = RolloutStore(path, ABOUT), []
    try:
        for round_ in (0, 1):
            if round_ in store.rounds:
                continue
            with store:
                there = len(store.pending(round_, policy=round_)) // 2
                for part in range(there, 2):
                    store.append(rollouts(round_)[2 * part : 2 * part + 2], policy=round_)
                    did.append((round_, part))
                store.seal(round_, note=round_)
    finally:
        store.place.unlock()  # as the kernel does for a process that dies
    return did


def content(path):
    """Every file but the locks, by name."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def test_a_process_that_dies_at_any_step_loses_no_part(tmp_path, monkeypatch):
    with dying(monkeypatch, at=10**9) as steps:
        assert len(work(tmp_path / "whole")) == 4
    want, total = content(tmp_path / "whole"), len(steps)
    assert total > 40
    for at in range(total):
        path = tmp_path / f"at-{at}"
        with pytest.raises(Died), dying(monkeypatch, at):
            work(path)
        store = RolloutStore(path, ABOUT) if path.exists() else None
        survived = 0
        for round_ in (0, 1) if store else ():
            got = store.read(round_) if round_ in store.rounds else store.pending(round_)
            same(got, rollouts(round_)[: len(got)])
            survived += len(got) // 2
        # A part is there from the moment that its file has its name.
        named = sum("part-" in name for name in content(path) if not name.endswith(".part"))
        assert survived == named
        assert len(work(path)) == 4 - survived
        assert content(path) == want
        RolloutStore(path).verify()
        shutil.rmtree(path)


def test_what_a_killed_writer_left_half_written_is_swept_away(tmp_path):
    store = RolloutStore(tmp_path, ABOUT)
    store.append(rollouts(0)[:2])
    store.close()
    left = [tmp_path / ".round-00000" / ".part-00001.parquet.99.part", tmp_path / "..manifest.json.99.part"]
    for file in left:
        file.write_bytes(b"half")
    same(store.pending(0), rollouts(0)[:2])
    store.append(rollouts(0)[2:])
    assert not any(file.exists() for file in left)
    store.seal(0)
    assert len(list((tmp_path / "round-00000").iterdir())) == 2


def test_a_store_that_has_no_room_keeps_its_parts(tmp_path):
    store = RolloutStore(tmp_path, ABOUT)
    store.append(rollouts(0)[:2])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(InputError, match="must have room.*part-00001.*File too large") as error:
            store.append(rollouts(0)[2:])
        with pytest.raises(InputError, match=r"must have room.*\.manifest\.json could not be written"):
            store.seal(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    same(store.pending(0), rollouts(0)[:2])
    store.append(rollouts(0)[2:])
    store.seal(0)
    same(store.read(0), rollouts(0))


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.faults
def test_a_disk_that_is_full(disk):
    store = RolloutStore(disk / "store", ABOUT)
    store.append(rollouts(0)[:2])
    filler = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY)
    with contextlib.suppress(OSError):
        while os.write(filler, bytes(4096)):
            pass
    os.close(filler)
    for act in (lambda: store.append(rollouts(0)[2:]), lambda: store.seal(0)):
        with pytest.raises(InputError, match="must have room.*No space left on device"):
            act()
    same(store.pending(0), rollouts(0)[:2])
    (disk / "filler").unlink()
    store.append(rollouts(0)[2:])
    store.seal(0)
    same(store.read(0), rollouts(0))


@pytest.mark.faults
def test_a_disk_that_is_read_only(disk):
    store = RolloutStore(disk / "store", ABOUT)
    store.append(rollouts(0)[:2])
    store.seal(0)
    store.append(rollouts(1)[:2])
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for act in (lambda: store.append(rollouts(1)[2:]), lambda: store.seal(1)):
        with pytest.raises(InputError, match="leave to write.*Read-only file system"):
            act()
    same(store.read(0), rollouts(0)[:2])
    same(store.pending(1), rollouts(1)[:2])
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    store.append(rollouts(1)[2:])
    store.seal(1)
    same(store.read(1), rollouts(1))
