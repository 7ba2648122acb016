"""Sampling and scoring go on where they were stopped, and end in the same files."""

import dataclasses
import functools
import json
import math
import resource
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from opd_jax.cli import main
from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted
from opd_jax.model import forward
from opd_jax.rollout import RolloutStore, jax_engine
from opd_jax.rollout.rows import lengths_of
from opd_jax.rollout.score import full_logprobs, rows_of
from opd_jax.train import collect, scoring
from opd_jax.train.loop import check_extras, do_part
from opd_jax.train.opening import open_run
from opd_jax.train.run import Run
from opd_jax.train.scoring import parts_by_length
from tests.conftest import tiny_config
from tests.train.conftest import ignore, never

# Sixteen rollouts in four slots; four micro-batches, read by policy, reference and teacher.
SHAPE = (
    "--sampling.slots=4",
    "--schedule.microbatches=2",
    "--schedule.rounds=1",
    "--gate.control=oracle",
    "--loss.terms=[reference_kl]",
    "--loss.kl_weight=1",
    "--store.teacher_hidden=true",
)
PIECES = [f"{stage}-{part:05d}" for stage in ("policy", "reference", "teacher") for part in range(4)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A round sampled and scored without a break."""
    run = open_run(tmp_path_factory.mktemp("whole") / "run", tiny_config(*SHAPE))
    for part in ("sample", "score"):
        do_part(run, part, ignore, never)
    return run


def files(run, store):
    """The files of a store by name, which holds a digest, and its manifest."""
    folder = run.folder / store
    found = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != ".lock")
    return found, json.loads((folder / ".manifest.json").read_text())


def without(whole, tmp_path, *stores):
    """A copy of the run, to do again what these stores hold."""
    shutil.copytree(whole.folder, tmp_path / "run", ignore=shutil.ignore_patterns(*stores))
    return open_run(tmp_path / "run")


def drawing(monkeypatch, draw):
    """Rollouts come from ``draw(engine, requests)``."""
    honest = collect.engine_of
    monkeypatch.setattr(
        collect,
        "engine_of",
        lambda *args: SimpleNamespace(draw=lambda requests: draw(honest(*args), requests)),
    )


def kept(run):
    """What is kept of a round that is being drawn."""
    return sorted((run.folder / "rollouts" / ".work-00000").glob("drawn-*.npz"))


def drawn_by(monkeypatch, run):
    """How many rollouts are asked for when the run goes on sampling."""
    asked = []
    with monkeypatch.context() as patch:
        drawing(patch, lambda engine, requests: asked.append(len(requests)) or engine.draw(requests))
        do_part(open_run(run.folder), "sample", ignore, never)
    return sum(asked)


@pytest.fixture
def at_once(monkeypatch):
    """Every rollout is kept as soon as it is drawn."""
    monkeypatch.setattr(collect, "SECONDS", -1.0)


@pytest.mark.parametrize("count", [1, 6, 16])
def test_sampling_goes_on_where_it_stopped(whole, tmp_path, monkeypatch, at_once, count):
    run = without(whole, tmp_path, "rollouts", "scored")
    with pytest.raises(Interrupted):
        do_part(run, "sample", ignore, lambda: len(kept(run)) >= count)
    assert run.rollouts.rounds == []
    assert len(kept(run)) == count
    torn = kept(run)[0]
    torn.write_bytes(torn.read_bytes()[:-1])  # which is drawn again
    assert drawn_by(monkeypatch, run) == 16 - count + 1
    assert files(run, "rollouts") == files(whole, "rollouts")


def test_rollouts_are_kept_in_whatever_order_they_are_finished(whole, tmp_path, monkeypatch, at_once):
    run = without(whole, tmp_path, "rollouts", "scored")
    with monkeypatch.context() as patch:
        drawing(patch, lambda engine, requests: sorted(engine.draw(requests), key=lambda one: -one[0]))
        with pytest.raises(Interrupted):
            do_part(run, "sample", ignore, lambda: len(kept(run)) >= 3)
    assert [file.name.split("-")[1] for file in kept(run)] == ["00013", "00014", "00015"]
    assert drawn_by(monkeypatch, run) == 13
    assert files(run, "rollouts") == files(whole, "rollouts")


def test_a_user_who_stops_does_not_wait_for_a_response(whole, tmp_path, monkeypatch):
    """The host looks every few tokens; most responses have many."""
    monkeypatch.setattr(jax_engine, "STEPS", 2)
    run, asked = without(whole, tmp_path, "rollouts", "scored"), []
    with pytest.raises(Interrupted):
        do_part(run, "sample", ignore, lambda: asked.append(1) or len(asked) > 2)
    assert len(asked) == 3
    assert kept(run) == []


def test_rollouts_of_another_policy_are_not_taken(whole, tmp_path, monkeypatch, at_once):
    run = without(whole, tmp_path, "rollouts", "scored")
    with monkeypatch.context() as patch:
        patch.setattr(collect, "params_digest", lambda params: "another")
        with pytest.raises(Interrupted):
            do_part(run, "sample", ignore, lambda: len(kept(run)) >= 5)
    assert drawn_by(monkeypatch, run) == 16
    assert files(run, "rollouts") == files(whole, "rollouts")


def test_a_round_that_was_not_sealed_is_written_again(whole, tmp_path, monkeypatch):
    run = without(whole, tmp_path, "rollouts", "scored")

    def broken_off(*args, **about):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RolloutStore, "seal", broken_off)
        with pytest.raises(KeyboardInterrupt):
            do_part(run, "sample", ignore, never)
    assert drawn_by(monkeypatch, run) == 0
    assert files(run, "rollouts") == files(whole, "rollouts")


@pytest.mark.parametrize("count", [1, 4, 7, 11])
def test_scoring_goes_on_where_it_stopped(whole, tmp_path, monkeypatch, count):
    run = without(whole, tmp_path, "scored")
    pieces = lambda: sorted((run.folder / "scored" / ".work-00000").glob("*.npz"))  # noqa: E731
    with pytest.raises(Interrupted):
        do_part(run, "score", ignore, lambda: len(pieces()) >= count)
    assert [file.name.rsplit("-", 2)[0] for file in pieces()] == PIECES[:count]
    torn = pieces()[0]
    torn.write_bytes(torn.read_bytes()[:-1])  # which is read again, alone
    read = []
    for stage in ("policy", "reference", "teacher"):
        honest = getattr(scoring, f"_by_{stage}")
        counted = lambda *a, s=stage, h=honest: (read.extend([s] * len(a[2])), h(*a))[1]  # noqa: E731
        monkeypatch.setattr(scoring, f"_by_{stage}", counted)
    do_part(open_run(run.folder), "score", ignore, never)
    left = [PIECES[0], *PIECES[count:]]
    assert read == [piece.split("-")[0] for piece in left]
    assert files(run, "scored") == files(whole, "scored")


def test_a_teacher_reads_rollouts_of_like_length_together(whole, tmp_path, monkeypatch):
    run = without(whole, tmp_path, "scored")
    monkeypatch.setattr(scoring, "parts_by_length", functools.partial(parts_by_length, unit=22))
    rollouts = run.rollouts.read(0)
    lengths = lengths_of([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    parts = scoring.parts_by_length(lengths, 4, run.width)
    assert sorted(np.concatenate([part.packing.order for part in parts])) == list(range(16))
    assert [part.width for part in parts] == [run.width, 44, 44, 44]
    assert all(lengths[part.packing.order].max() <= part.width for part in parts)
    do_part(run, "score", ignore, never)
    for narrow, wide in zip(run.scored.read(0), whole.scored.read(0), strict=True):
        np.testing.assert_array_equal(narrow.score.old_logprobs, wide.score.old_logprobs)
        np.testing.assert_array_equal(narrow.score.teacher_topk_ids, wide.score.teacher_topk_ids)
        for name in ("teacher_logprobs", "teacher_topk_logprobs", "teacher_entropy", "teacher_outside_mass"):
            np.testing.assert_allclose(
                getattr(narrow.score, name), getattr(wide.score, name), atol=2e-5, err_msg=name
            )


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_was_drawn_before_an_engine_broke_off_is_kept(whole, tmp_path, monkeypatch, error):
    run = without(whole, tmp_path, "rollouts", "scored")

    def breaking(engine, requests):
        for count, drawn in enumerate(sorted(engine.draw(requests))):
            if count == 6:
                raise error
            yield drawn

    with monkeypatch.context() as patch:
        drawing(patch, breaking)
        with pytest.raises(error):
            do_part(run, "sample", ignore, never)
    assert drawn_by(monkeypatch, run) == 10
    assert files(run, "rollouts") == files(whole, "rollouts")


def test_what_is_drawn_is_kept_every_few_seconds(monkeypatch):
    clock = iter(range(0, 100, 2))  # seconds
    monkeypatch.setattr(collect.time, "monotonic", lambda: next(clock))
    rollouts = list(range(12))
    assert list(collect.batches(iter(rollouts), 100, 5.0)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert list(collect.batches(iter(rollouts), 8, math.inf)) == [rollouts[:8], rollouts[8:]]


def test_accepted_rollouts_keep_saying_what_their_log_probs_are_of(whole, tmp_path):
    """Drawn at temperature 1, by the same student, and taken by a run at another."""
    accept = "--store.accept=[temperature=1.0,behaviour_logprob_temperature=1.0]"
    config = tiny_config(*SHAPE, "--sampling.temperature=0.7", accept)
    run = open_run(tmp_path / "run", config)
    shutil.copytree(whole.folder / "rollouts", run.folder / "rollouts")
    do_part(run, "score", ignore, never)
    assert run.scored.about_store["behaviour_logprob_temperature"] == 1.0
    assert run.scored.shard(0)["mismatch"]["max"] < 1e-4
    asking = Run(run.folder, tiny_config("--sampling.temperature=0.7", "--loss.old_source=sampler", accept))
    with pytest.raises(InputError, match=r"are of temperature 1\.0, the trainer's of 0\.7"):
        check_extras(asking, 0)


def test_scores_of_other_work_are_not_taken(whole, tmp_path, monkeypatch):
    """What is scored hangs on a setting that may change between two sittings."""
    run = without(whole, tmp_path, "scored")
    work = run.folder / "scored" / ".work-00000"
    with pytest.raises(Interrupted):
        do_part(run, "score", ignore, lambda: len(list(work.glob("*"))) >= 4)
    run = open_run(run.folder, tiny_config(*SHAPE, "--log.diagnose_every=5"))
    do_part(run, "score", ignore, never)
    assert "again" in run.scored.shard(0)["extras"]
    assert run.scored.shard(0)["null_drift"]["max"] < 1e-5
    assert not work.exists()


def test_a_full_disk_is_said_and_costs_nothing_that_was_finished(
    whole, tmp_path, monkeypatch, capsys, at_once
):
    run = without(whole, tmp_path, "rollouts", "scored")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(engine, requests):
        for count, drawn in enumerate(sorted(engine.draw(requests))):
            if count == 8:  # no file may grow beyond this from now on
                resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
            yield drawn

    with monkeypatch.context() as patch:
        drawing(patch, filling)
        try:
            assert main(["sample", str(run.folder)]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    captured = capsys.readouterr()
    [line] = captured.err.strip().splitlines()
    assert line.startswith("opd: a store must have room, and leave to write: ")
    assert ".work-00000/drawn-00008" in line
    assert "File too large" in line
    assert len(kept(run)) == 8
    assert not [f for f in (run.folder / "rollouts").rglob("*.part")]
    assert main(["sample", str(run.folder)]) == 0
    assert files(run, "rollouts") == files(whole, "rollouts")


def test_a_divergence_over_the_vocabulary_is_had_from_hidden_states(whole):
    """Full KL(student || teacher), from a teacher pass and from what the store holds of one."""
    rollouts = whole.scored.read(0)
    rows = rows_of(rollouts, whole.width)
    assert {r.score.teacher_hidden.dtype.name for r in rollouts} == {"bfloat16"}

    def dense(model, params):
        z = forward(params, rows.tokens, model, positions=rows.positions, sequence_ids=rows.sequence_ids)
        return np.asarray(jax.nn.log_softmax(z, axis=-1), np.float64)[rows.mask]

    student, teacher = dense(whole.model, whole.base), dense(whole.teacher_model, whole.teacher)
    hidden = np.concatenate([rollout.score.teacher_hidden for rollout in rollouts])
    again = np.asarray(full_logprobs(hidden, whole.teacher, whole.teacher_model, temperature=1.0))
    assert again.shape == (rows.mask.sum(), whole.teacher_model.vocab_size)
    # bfloat16 keeps 8 bits of what a logit is summed from.
    np.testing.assert_allclose(again[teacher > -8], teacher[teacher > -8], atol=0.03)
    kl, want = ((np.exp(student) * (student - other)).sum(-1) for other in (again, teacher))
    assert want.max() > 0.5
    np.testing.assert_allclose(kl, want, atol=5e-4)
    np.testing.assert_allclose(kl.mean(), want.mean(), rtol=1e-3)
    unsure = np.argsort(teacher.max(-1))[:9]  # where a temperature makes a difference
    hot = np.asarray(full_logprobs(hidden[unsure], whole.teacher, whole.teacher_model, temperature=2.0))
    half = teacher[unsure] / 2
    np.testing.assert_allclose(np.exp(hot), np.exp(half) / np.exp(half).sum(-1, keepdims=True), atol=0.01)


def test_a_samplers_log_probs_of_another_temperature_are_compared_like_with_like(tmp_path, monkeypatch):
    config = tiny_config("--sampling.temperature=1.6", "--schedule.rounds=1")
    run = open_run(tmp_path / "run", config)
    vars(run)["about"] = {**run.about, "engine": "server", "behaviour_logprob_temperature": 1.0}
    read = jax.jit(forward, static_argnums=2)

    def server(engine, requests):
        """What a server gives: drawn at 1.6, log-probs at 1."""
        for index, drawn in engine.draw(requests):
            request = requests[index]
            ids = np.concatenate([request.prompt_ids, drawn.ids])
            text = np.zeros((1, run.width + 1), np.int32)  # one shape for all
            text[0, : len(ids)] = ids
            logits = np.asarray(read(run.base, text[:, :-1], run.model), np.float64)[0]
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            of_ids = np.take_along_axis(logprobs, text[0, 1:, None], -1)[:, 0]
            told = of_ids[len(request.prompt_ids) - 1 : len(ids) - 1].astype(np.float32)
            yield index, dataclasses.replace(drawn, logprobs=told)

    drawing(monkeypatch, server)
    for part in ("sample", "score"):
        do_part(run, part, ignore, never)
    apart = [np.abs(r.behaviour_logprobs - r.score.old_logprobs).max() for r in run.scored.read(0)]
    assert min(apart) > 0.01
    assert run.scored.shard(0)["mismatch"]["max"] < 1e-4
    assert run.scored.about_store["behaviour_logprob_temperature"] == 1.0
    asking = Run(run.folder, tiny_config("--sampling.temperature=1.6", "--loss.old_source=sampler"))
    vars(asking)["about"] = run.about
    with pytest.raises(InputError, match=r"are of temperature 1\.0, the trainer's of 1\.6"):
        check_extras(asking, 0)
