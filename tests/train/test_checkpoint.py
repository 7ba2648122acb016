"""Checkpoints that cannot be written: one line, and the one before stays."""

import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from opd_jax.errors import InputError
from opd_jax.train.checkpoint import Checkpoints
from opd_jax.train.step import TrainState


def state(update):
    weights = {"w": jax.random.normal(jax.random.key(update), 100_000)}
    return TrainState(jnp.array(update), weights, {"m": weights["w"]})


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_kept(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path / "c", writing=True)
    checkpoints.save(state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a disk that is full, for this process
    try:
        with pytest.raises(
            InputError, match=r"c/2 could not be written \(.*File too large.*; make room"
        ) as said:
            checkpoints.save(state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(said.value)
    checkpoints.close()  # says it no second time
    assert not caplog.records  # of the threads that write
    going_on = Checkpoints(tmp_path / "c", writing=True)
    assert going_on.latest == 1
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(1))
    np.testing.assert_array_equal(going_on.restore(like).params["w"], state(1).params["w"])
    going_on.save(state(2))
    assert going_on.latest == 2
    going_on.close()


def test_other_errors_of_a_save_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c", writing=True)

    def broken(*arguments):
        raise ValueError("a defect")

    monkeypatch.setattr(ocp.training.Checkpointer, "save", broken)
    with pytest.raises(ValueError, match="^a defect$"):
        checkpoints.save(state(1))
    checkpoints.close()


def test_what_a_kill_left_is_cleared_by_the_next_save_and_by_no_reader(tmp_path):
    """At opening nothing is begun that a refusal would cut off."""
    before = set(threading.enumerate())
    left = tmp_path / "c" / "5.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "half").write_text("of it")
    for writing in (False, True):
        checkpoints = Checkpoints(tmp_path / "c", writing=writing)
        assert checkpoints.latest is None
        checkpoints.close()
    assert left.exists()
    assert not [thread for thread in set(threading.enumerate()) - before if "Signaling" in repr(thread)]
    checkpoints = Checkpoints(tmp_path / "c", writing=True)
    checkpoints.save(state(1))
    assert sorted(x.name for x in (tmp_path / "c").iterdir()) == ["1"]
    checkpoints.close()
