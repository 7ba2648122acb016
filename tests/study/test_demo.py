"""The demo: arms that go on at once are what each would be alone, and stop together."""

import json

import pytest

from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted
from opd_jax.study.demo import arms, demo
from opd_jax.study.evaluation import answers_file, evaluate_run
from opd_jax.train.loop import distill
from opd_jax.train.opening import open_run
from tests.conftest import tiny_config
from tests.train.conftest import ignore, never

CONFIG = tiny_config("--schedule.rounds=1", "--evaluation.samples=1")


def train(run, label):
    distill(run, ignore, never)


def judge(run, who, label):
    evaluate_run(run, who, ignore, never)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return demo(folder, CONFIG, train, judge)


def test_the_report_is_of_all_arms_and_the_base(shown):
    told = json.loads(shown.with_suffix(".json").read_text())
    assert [run["name"] for run in told["runs"]] == ["opd", "opd-block8", "topk"]
    assert [judged["name"] for judged in told["judged"]] == ["base", "opd", "opd-block8", "topk"]
    assert all((shown.parent / name / "student" / "config.json").exists() for name in arms(CONFIG))


def test_an_arm_among_others_is_the_same_as_alone(shown, tmp_path):
    for name in ("opd-block8", "topk"):
        alone, beside = open_run(tmp_path / name, arms(CONFIG)[name]), open_run(shown.parent / name)
        train(alone, name)
        assert beside.metrics_file.read_text() == alone.metrics_file.read_text()
        evaluate_run(alone, "student", ignore, never)
        answers = [answers_file(run, "student").read_text() for run in (beside, alone)]
        assert answers[0] == answers[1]


def test_the_arm_that_failed_is_the_one_to_hear_of(tmp_path):
    def fail(run, label):
        if label == "topk":
            raise InputError("a disk must have room: it has none; make some")
        raise Interrupted

    with pytest.raises(InputError, match="must have room"):
        demo(tmp_path, CONFIG, fail, lambda *_: None)
