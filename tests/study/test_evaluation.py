"""Evaluating a run: broken off and gone on with, under the conditions that are asked for."""

import dataclasses
import fcntl
import json

import pytest

from opd_jax.errors import InputError
from opd_jax.evaluate import read_answers
from opd_jax.interrupt import Interrupted, never
from opd_jax.study.evaluation import answers_file, evaluate_run, is_judged
from opd_jax.train.opening import open_run
from opd_jax.train.run import Run
from tests.conftest import tiny_config

MANY = ("--evaluation.samples=4", "--sampling.slots=16")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = open_run(tmp_path_factory.mktemp("whole") / "run", tiny_config(*MANY))
    evaluate_run(run, "base", lambda answer: None, never)
    return run


def broken_off(folder) -> Run:
    """A run whose evaluation was stopped when the first answers were put down."""
    run = open_run(folder, tiny_config(*MANY))
    seen = []
    with pytest.raises(Interrupted):
        evaluate_run(run, "base", seen.append, lambda: True)
    assert 0 < len(seen) < 4 * len(run.heldout)
    assert not is_judged(run, "base")
    return run


def test_what_was_answered_is_not_asked_again(whole, tmp_path, monkeypatch):
    run = broken_off(tmp_path / "run")
    begun = run.folder / "evaluation" / ".base.jsonl"
    held = begun.read_text().splitlines(keepends=True)
    begun.write_text("".join(held) + held[2] + held[-1][:20])  # a stranger's line, and the power went
    asked = []
    drawing = "opd_jax.rollout.jax_engine.JaxEngine.draw"
    from opd_jax.rollout.jax_engine import JaxEngine

    draw = JaxEngine.draw

    def counting(self, requests):
        asked.append(len(requests))
        return draw(self, requests)

    monkeypatch.setattr(drawing, counting)
    seen = []
    file = evaluate_run(Run(run.folder, run.config), "base", seen.append, never)
    assert asked == [len(seen) - (len(held) - 1)]
    assert file.read_text() == answers_file(whole, "base").read_text()
    assert is_judged(run, "base")
    assert sorted(x.name for x in file.parent.iterdir()) == ["base.json", "base.jsonl"]


def test_another_evaluation_begins_anew(whole, tmp_path):
    run = broken_off(tmp_path / "run")
    config = dataclasses.replace(run.config, evaluation=dataclasses.replace(run.config.evaluation, samples=2))
    other = Run(run.folder, config)
    records = read_answers(evaluate_run(other, "base", lambda answer: None, never))
    assert len(records) == 2 * len(run.heldout)
    assert is_judged(other, "base")
    assert not is_judged(run, "base")  # which asks for four
    two = [record for record in read_answers(answers_file(whole, "base")) if record.sample < 2]
    assert [(r.problem, r.sample, r.response) for r in records] == [
        (r.problem, r.sample, r.response) for r in two
    ]


def test_answers_without_their_conditions_count_as_none(whole, tmp_path):
    file = answers_file(whole, "base")
    conditions = file.with_suffix(".json")
    held = conditions.read_text()
    conditions.write_text("{")
    try:
        with pytest.raises(InputError, match="evaluate again"):
            is_judged(whole, "base")
    finally:
        conditions.write_text(held)
    assert json.loads(held)["samples"] == 4
    assert is_judged(whole, "base")


def test_one_at_a_time_evaluates_a_model(whole):
    with (answers_file(whole, "base").parent / ".base.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being written; wait"):
            evaluate_run(whole, "base", lambda answer: None, never)
