"""Runs that share a store: what another student drew is refused, or taken where it is named."""

import pytest

from opd_jax.errors import InputError
from opd_jax.interrupt import never
from opd_jax.train.loop import distill, do_part, next_part
from opd_jax.train.opening import open_run
from tests.conftest import tiny_config
from tests.train.conftest import ignore

FASTER = "--optimizer.learning_rate=1e-3"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of two rounds."""
    folder = tmp_path_factory.mktemp("shared")
    run = open_run(folder / "run", tiny_config("--schedule.rounds=2", f"--store.at={folder / 'store'}"))
    distill(run, ignore, never)
    return run


def another(first, folder, *settings):
    at = f"--store.at={first.config.store.at}"
    return open_run(folder, tiny_config("--schedule.rounds=2", at, *settings))


def trained(run):
    lines = []
    while next_part(run) == "train":
        do_part(run, "train", lines.append, never)
    return lines


def test_a_run_with_the_same_settings_trains_on_the_same_rollouts(first, tmp_path):
    run = another(first, tmp_path / "run")
    lines = trained(run)
    assert next_part(run) == "done"
    assert [line["drift_abs"] for line in lines if not line["pass"] + line["minibatch"]] == [0, 0]


def test_rollouts_that_another_student_drew_are_refused(first, tmp_path):
    run = another(first, tmp_path / "run", FASTER)
    with pytest.raises(InputError, match="a store belongs to one policy") as error:
        trained(run)
    assert int(run.state.update) == run.config.schedule.updates_per_round  # the base student drew the first
    named = str(error.value).split("[policy=")[1].split("]")[0]
    assert first.rollouts.shard(1)["policy"].startswith(named)
    lines = trained(another(first, tmp_path / "run", FASTER, f"--store.accept=[policy={named}]"))
    assert lines[0]["round"] == 1
    assert lines[0]["drift_abs"] > 1e-3


def test_rollouts_drawn_at_another_update_are_refused(first, tmp_path):
    run = another(first, tmp_path / "run", "--schedule.passes=1")
    with pytest.raises(InputError, match="a store belongs to one update"):
        trained(run)


def test_rollouts_drawn_ahead_are_asked_about_when_they_were_due(first, tmp_path):
    """With a round of staleness the base student draws two rounds; here the second had been trained."""
    run = another(first, tmp_path / "run", "--schedule.staleness=1")
    with pytest.raises(InputError, match="a store belongs to one update"):
        trained(run)


def test_scores_of_another_precision_are_refused(first, tmp_path):
    with pytest.raises(InputError, match="a store belongs to one compute_dtype"):
        another(first, tmp_path / "run", "--model.compute_dtype=bfloat16")
    assert not (tmp_path / "run").exists()
