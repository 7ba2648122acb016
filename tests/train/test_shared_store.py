"""Runs that share a store: what another student drew is refused, or taken where it is named."""

import jax
import pytest

from opd_jax.errors import InputError
from opd_jax.interrupt import never
from opd_jax.train import collect
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
    with pytest.raises(InputError, match="round 1 of .* was drawn by another, at update 4") as error:
        trained(run)
    assert int(run.state.update) == run.config.schedule.updates_per_round  # the base student drew the first
    named = str(error.value).split("[policy=")[1].split("]")[0]
    assert first.rollouts.shard(1)["policy"].startswith(named)
    lines = trained(another(first, tmp_path / "run", FASTER, f"--store.accept=[policy={named}]"))
    assert lines[0]["round"] == 1
    assert lines[0]["drift_abs"] > 1e-3


def test_rollouts_drawn_ahead_are_the_runs_own_however_far_it_goes(tmp_path):
    """Near its end nothing is drawn ahead; a run that is made longer draws later than one that was long."""
    folder = tmp_path / "run"
    for rounds in (2, 3):
        run = open_run(folder, tiny_config(f"--schedule.rounds={rounds}", "--schedule.staleness=1"))
        distill(run, ignore, never)
    assert [run.rollouts.shard(round_)["update"] for round_ in range(3)] == [0, 0, 8]


@pytest.mark.parametrize("setting", ["--sampling.prompts=2", "--sampling.prompts=8"])
def test_a_round_of_another_size_is_refused(first, tmp_path, setting):
    with pytest.raises(InputError, match="has 16 of 4 problems; give the settings"):
        trained(another(first, tmp_path / "run", setting))


def test_what_could_not_be_added_is_not_drawn(first, tmp_path, monkeypatch):
    accept = "--store.accept=[top_p=1.0]"
    run = another(first, tmp_path / "run", "--sampling.top_p=0.8", "--schedule.rounds=3", accept)
    monkeypatch.setattr(collect, "engine_of", None)
    refused = pytest.raises(InputError, match="rollouts of one top_p are not added to those of another")
    with refused, jax.set_mesh(run.mesh):
        collect.sample_round(run, never)


def test_scores_of_another_precision_are_refused(first, tmp_path):
    with pytest.raises(InputError, match="a store belongs to one compute_dtype"):
        another(first, tmp_path / "run", "--model.compute_dtype=bfloat16")
    assert not (tmp_path / "run").exists()
