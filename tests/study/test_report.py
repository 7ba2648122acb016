"""The report: numbers equal to what the run wrote down, a page that stands alone, refusals."""

import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.evaluate import by_problem, read_answers
from opd_jax.study.evaluation import answers_file, evaluate_run
from opd_jax.study.plots import structure
from opd_jax.study.report import write_report
from opd_jax.study.summary import PERCENTILES, Summary
from opd_jax.train.loop import distill
from opd_jax.train.metrics import read_lines
from opd_jax.train.opening import open_run
from tests.conftest import tiny_config
from tests.rollout.test_store import rewrite_manifest


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = []
    for gate, every in (("none", 0), ("block", 3)):  # what is logged makes no other arm
        overrides = f"--gate.segments={gate}", f"--log.diagnose_every={every}"
        run = open_run(folder / f"arm-{gate}", tiny_config(*overrides))
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
        assert set(first["drift_percentiles"]) == {0.0}  # none beyond what there was
        assert set(first["weight_percentiles"]) == {1.0}
        last = told["within_round"][-1]
        assert np.all(np.diff(last["drift_percentiles"]) >= 0)
        assert ("score_percentiles" in last) == (run is runs[1])
        if run is runs[1]:
            assert 0 < last["score_percentiles"][2] < last["score_percentiles"][4] <= last["drift_max"]
        lengths = [len(rollout.response_ids) for rollout in run.rollouts.read(0)]
        assert told["rounds"][0]["response_length"] == pytest.approx(np.mean(lengths), rel=1e-6)
        norms = [line["gradient_norm"] for line in lines]
        np.testing.assert_allclose(told["gradient_norm_percentiles"], np.percentile(norms, PERCENTILES))
        assert not any(name.startswith("evaluation.") for name in told["settings"])
        rewards = [rollout.reward for rollout in run.rollouts.read(0)]
        assert told["rounds"][0]["reward"] == pytest.approx(np.mean(rewards))
        for name, stored in (("sampler_mismatch", "mismatch"), ("null_drift", "null_drift")):
            found = [run.scored.shard(round_)[stored] for round_ in (0, 1)]
            assert [round_[name] for round_ in told["rounds"]] == found
            read = [distance for distance in found if distance]
            # What is not diagnosed is read once.
            assert len(read) == (0 if (stored, run) == ("null_drift", runs[0]) else 2)
            if not read:
                continue
            assert told[name]["p99"] == max(distance["p99"] for distance in read)
            assert told[name]["pearson"] == min(distance["pearson"] for distance in read) > 0.999
    by_name = {judged["name"]: judged for judged in numbers["judged"]}
    records = read_answers(answers_file(runs[1], "student"))
    assert by_name["arm-block"]["pass@1"]["mean"] == pytest.approx(
        np.mean(list(by_problem(records, 1).values()))
    )
    assert {name: by_name[name]["after"] for name in by_name} == {
        "base": None,
        "arm-none": 8,
        "arm-block": 8,
    }
    assert numbers["judged_as"]["temperature"] == 1.0
    assert "At\nthe first update of a round" in html.read_text()
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
    assert checker.svgs == 5
    assert checker.borders >= 4  # two rollouts of several blocks of eight tokens
    assert "<script" not in text
    assert text.count("<td>sampler against trainer</td>") == 2
    assert text.count("<td>trainer against itself</td>") == 1


def test_a_store_that_says_less_of_distances_is_reported(page, tmp_path):
    folder = copied(page[0][0], tmp_path / "a")

    def change(manifest):
        for entry in manifest["rounds"]:
            entry["mismatch"] = {name: entry["mismatch"][name] for name in ("mean", "max")}
            del entry["null_drift"]

    rewrite_manifest(folder / "scored", change)
    html = write_report([folder], tmp_path / "r.html")
    [told] = json.loads(html.with_suffix(".json").read_text())["runs"]
    means = [page[0][0].scored.shard(round_)["mismatch"]["mean"] for round_ in (0, 1)]
    assert told["sampler_mismatch"]["mean"] == max(means)
    assert (told["sampler_mismatch"]["pearson"], told["null_drift"]["mean"]) == (None, None)
    assert "trainer against itself</td>" not in html.read_text()


def copied(run, where):
    shutil.copytree(run.folder, where)
    return where


def test_where_nothing_drifts_no_structure_is_drawn():
    empty = {name: {} for name in ("autocorrelation", "block_variance", "cancellation")}
    drawn = structure(Summary([{"name": "still", "diagnosis": empty}], [], {}, []))
    assert "still" in drawn
    assert "<!-- o" not in drawn  # the marker, taken for data
    assert ">o-<" not in drawn


def test_runs_of_one_name_are_told_apart_by_their_paths(page, tmp_path):
    runs, _ = page
    folders = [copied(run, tmp_path / name / "run") for run, name in zip(runs, "ab", strict=True)]
    numbers = json.loads(write_report(folders, tmp_path / "r.html").with_suffix(".json").read_text())
    assert [run["name"] for run in numbers["runs"]] == ["a/run", "b/run"]
    assert {judged["name"] for judged in numbers["judged"]} == {"base", "a/run", "b/run"}
    with pytest.raises(InputError, match="named twice"):
        write_report([folders[0], folders[0]], tmp_path / "r.html")


def test_an_arm_may_be_called_base_and_there_may_be_many(page, tmp_path):
    runs, _ = page
    folders = [copied(runs[0], tmp_path / name) for name in ("base", *"abcdefgh")]
    page_ = write_report(folders, tmp_path / "r.html")
    numbers = json.loads(page_.with_suffix(".json").read_text())
    kinds = [(judged["kind"], judged["name"]) for judged in numbers["judged"]]
    assert kinds == [("base", "base"), ("arm", "base"), *(("arm", name) for name in "abcdefgh")]
    assert page_.read_text().count(">h<") >= 3  # the ninth run is in the plots too


def test_what_was_judged_otherwise_is_not_compared(page, tmp_path):
    runs, _ = page
    folders = [copied(run, tmp_path / name) for run, name in zip(runs, "ab", strict=True)]
    file = next((folders[1] / "evaluation").glob("update-*.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "samples": 4}))
    with pytest.raises(InputError, match="samples = "):
        write_report(folders, tmp_path / "r.html")
    for name in ("r.json", "a/config.yaml"):
        with pytest.raises(InputError, match=r"name it \.html"):
            write_report(folders, tmp_path / name)
    assert "seed:" in (folders[0] / "config.yaml").read_text()


def change_config(folder, old, new):
    file = folder / "config.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_settings_of_no_gate_keep_nobody_from_comparing(page, tmp_path):
    folders = [copied(run, tmp_path / name) for run, name in zip(page[0], "ab", strict=True)]
    change_config(folders[0], "block: 8", "block: 16")

    def compared():
        told = json.loads(write_report(folders, tmp_path / "r.html").with_suffix(".json").read_text())
        return {(c["new"], c["old"]) for c in told["compared"]}

    assert ("b", "a") in compared()
    change_config(folders[0], "learning_rate: 0.003", "learning_rate: 0.002")
    assert ("b", "a") not in compared()


def test_a_score_is_that_of_the_update_it_was_taken_at(page, tmp_path):
    folder = copied(page[0][0], tmp_path / "a")
    for suffix in (".json", ".jsonl"):
        (folder / "evaluation" / f"update-00008{suffix}").rename(
            folder / "evaluation" / f"update-00004{suffix}"
        )
    (folder / "evaluation" / "update-best.jsonl").write_text("")  # a name of somebody's own
    html = write_report([folder], tmp_path / "r.html")
    [told] = [j for j in json.loads(html.with_suffix(".json").read_text())["judged"] if j["kind"] == "arm"]
    assert (told["after"], told["of_updates"]) == (4, 8)
    assert "4 of 8" in html.read_text()
    for damaged in ("{", "[]"):
        (folder / "evaluation" / "update-00004.json").write_text(damaged)
        with pytest.raises(InputError, match=r"update-00004\.json is none; remove .*evaluate again"):
            write_report([folder], tmp_path / "r.html")


def test_nobody_is_told_that_a_stale_round_begins_without_drift(page, tmp_path):
    folder = copied(page[0][1], tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().replace('"drift_max": 0.0', '"drift_max": 0.5')
    (folder / "metrics.jsonl").write_text(lines)
    assert "the first update of a round" not in write_report([folder], tmp_path / "r.html").read_text()


def test_updates_must_all_be_there(page, tmp_path):
    folder = copied(page[0][0], tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(InputError, match="one line an update"):
        write_report([folder], tmp_path / "r.html")


def test_what_is_no_trained_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.yaml"):
        write_report([tmp_path], tmp_path / "r.html")
    run = open_run(tmp_path / "new", tiny_config())
    with pytest.raises(InputError, match="has no updates yet"):
        write_report([run.folder], tmp_path / "r.html")
