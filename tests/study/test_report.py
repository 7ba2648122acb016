"""The report: numbers equal to what the run wrote down, a page that stands alone, refusals."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.evaluate import by_problem, read_answers
from opd_jax.study.evaluation import answers_file, evaluate_run
from opd_jax.study.report import write_report
from opd_jax.study.summary import PERCENTILES, _percentiles
from opd_jax.train.loop import distill
from opd_jax.train.metrics import read_lines
from opd_jax.train.run import open_run
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = []
    for gate in ("none", "block"):
        run = open_run(folder / f"arm-{gate}", tiny_config(f"--gate.segments={gate}"))
        distill(run, lambda line: None, lambda: False)
        for who in ("student", "base"):
            evaluate_run(run, who, lambda answer: None, lambda: False)
        runs.append(run)
    return runs, write_report([run.folder for run in runs], folder / "out" / "report.html")


def test_the_json_holds_what_the_run_wrote(page):
    runs, html = page
    numbers = json.loads(html.with_suffix(".json").read_text())
    assert [run["name"] for run in numbers["runs"]] == ["arm-none", "arm-block"]
    for run, told in zip(runs, numbers["runs"], strict=True):
        lines = read_lines(run.metrics_file)
        assert told["updates"]["drift_abs"] == [line["drift_abs"] for line in lines]
        assert told["rounds"][1]["loss"] == pytest.approx(np.mean([line["loss"] for line in lines[4:]]))
        first = told["within_round"][0]
        assert (first["drift_max"], first["weight_min"], first["weight_max"]) == (0.0, 1.0, 1.0)
        assert np.abs(first["drift_percentiles"]).max() <= 5e-4  # the width of the bin around zero
        assert np.abs(np.array(first["weight_percentiles"]) - 1).max() <= 5e-4
        rewards = [rollout.reward for rollout in run.rollouts.read(0)]
        assert told["rounds"][0]["reward"] == pytest.approx(np.mean(rewards))
    by_name = {judged["name"]: judged for judged in numbers["judged"]}
    records = read_answers(answers_file(runs[1], "student"))
    assert by_name["arm-block"]["pass@1"]["mean"] == pytest.approx(
        np.mean(list(by_problem(records, 1).values()))
    )
    pairs = {(c["new"], c["old"]) for c in numbers["compared"]}
    assert pairs == {("arm-none", "base"), ("arm-block", "base"), ("arm-block", "arm-none")}


def test_the_page_stands_alone_and_is_well_formed(page):
    _, html = page
    text = html.read_text()

    class Checker(HTMLParser):
        void = frozenset(("meta", "br", "img", "link", "hr", "path", "use", "rect", "image"))

        def __init__(self):
            super().__init__()
            self.open, self.svgs, self.borders = [], 0, 0

        def handle_starttag(self, tag, attrs):
            attributes = dict(attrs)
            self.svgs += tag == "svg"
            self.borders += attributes.get("class") == "border"
            for name in ("src", "href"):
                assert not (attributes.get(name) or "").startswith(("http", "//", "/")), attributes
            if tag not in self.void:
                self.open.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            if tag not in self.void:
                assert self.open.pop() == tag

    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert checker.svgs == 4
    assert checker.borders >= 4  # two rollouts of several blocks of eight tokens
    assert "<script" not in text


def test_percentiles_of_a_histogram():
    edges = (0.0, 1.0, 2.0, 4.0)
    # Ten values spread evenly over [1, 2), after empty bins: linear within the bin.
    got = _percentiles([{"h": [0, 0, 10, 0, 0]}], "h", edges)
    np.testing.assert_allclose(got, [1 + p / 100 for p in PERCENTILES])
    # Two updates add up; half the values lie below 1 and half above 2, a quarter beyond the last edge.
    got = _percentiles([{"h": [0, 2, 0, 1, 0]}, {"h": [0, 0, 0, 0, 1]}], "h", edges)
    np.testing.assert_allclose(got, [0.1, 0.5, 1.0, 4.0, 4.0])


def test_what_is_no_trained_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.yaml"):
        write_report([tmp_path], tmp_path / "r.html")
    run = open_run(tmp_path / "new", tiny_config())
    with pytest.raises(InputError, match="has no updates yet"):
        write_report([run.folder], tmp_path / "r.html")
