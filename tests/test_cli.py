"""The command line: exit statuses, one-line refusals, Ctrl-C."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_jax.cli import main
from opd_jax.model import load_pretrained
from opd_jax.rollout.storage import digest_of
from tests.conftest import TINY, as_users_have_it
from tests.rollout.test_store import rewrite_manifest

ROOT = Path(__file__).parent.parent
LAB = ["--config", str(ROOT / "configs" / "lab.yaml"), *TINY]


def refused(capsys, *argv: str) -> str:
    """Run a command that must be refused; returns its one line."""
    assert main([str(argument) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.strip().splitlines()
    assert line.startswith("opd: ")
    return line


@pytest.fixture
def sampled(tmp_path) -> Path:
    """A run with one round of rollouts, not scored yet."""
    assert main(["sample", str(tmp_path / "run"), *LAB]) == 0
    return tmp_path / "run"


def test_parts_by_command(sampled, capsys):
    for part, following in (("score", "train"), ("train", "sample"), ("sample", "score")):
        assert main([part, str(sampled)]) == 0
        assert f"next: {following}" in capsys.readouterr().out
    assert main(["evaluate", str(sampled), "--of", "base"]) == 0
    out = capsys.readouterr().out
    assert "pass@1" in out
    assert "pass@2" in out
    assert main(["report", str(sampled), "--out", str(sampled / "report.html")]) == 0
    assert json.loads((sampled / "report.json").read_text())["runs"][0]["name"] == "run"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sample", "{tmp}/x", *LAB, "--model.student=/nowhere"], "/nowhere has no config.json"),
        (["sample", "{tmp}/x", *LAB, "--gate.blck=3"], "the nearest is gate.block"),
        (["sample", "{tmp}/x", "--config", "{tmp}/none.yaml"], "check the path"),
        (["sample", "{tmp}/x"], "a new run needs a config"),
        (["sample", "{tmp}/x", *LAB, "--problems.train={tmp}/empty.jsonl"], "has none"),
        (["sample", "{tmp}/x", *LAB, "--problems.train=nowhere:at_all"], "'nowhere:at_all' does not"),
        (["sample", "{tmp}/x", *LAB, "--sampling.max_prompt=3"], "1 to 3 tokens"),
        (["score", "{tmp}/x", *LAB], "is due for sample, not score"),
        (["evaluate", "{tmp}/x"], "evaluate judges a run"),
        (["evaluate", "{tmp}/x", "--gate.block=3"], "evaluate judges a run"),
        (["demo", "{tmp}/x", "--gate.segments", "newline"], "the demo's arms set"),
        (["demo", "{tmp}/x", "--seed"], "--seed has none"),
        (["sample", "{tmp}/empty.jsonl", *LAB], "empty.jsonl is a file"),
        (["sample", "{tmp}/empty.jsonl/x", *LAB], "Not a directory"),
        (["report", "{tmp}/x"], "has no config.yaml"),
        (["report", "{tmp}", "--gate.block=3"], "takes no settings"),
        (["demo", "{tmp}/x", "--config", "{tmp}/arms.yaml"], "arms.yaml sets gate.segments; drop it"),
        (["sample", "{tmp}/x", *LAB, "--sampling.stop_ids=[-1]"], "sampling.stop_ids has -1"),
        (["sample", "{tmp}/x", *LAB, "--problems.train=broken:at_all"], "SyntaxError: "),
        (["sample", "{tmp}/x", *LAB, "--problems.train=failing:boom"], "ValueError: no luck, "),
        (["demo", "--mesh.data", "64", "{tmp}/x"], "mesh.data x mesh.fsdp x mesh.expert is 64"),
        (["sample", "gs://bucket/x", *LAB], "run folders are of this machine: got gs://bucket/x"),
        (["report", "gs://bucket/x"], "run folders are of this machine: got gs://bucket/x"),
        (["dream"], "invalid choice: 'dream'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "arms.yaml").write_text("gate:\n  segments: newline\n")
    (tmp_path / "broken.py").write_text("def at_all(:\n")
    (tmp_path / "failing.py").write_text("def boom():\n    raise ValueError('no\\nluck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert words in refused(capsys, *(argument.replace("{tmp}", str(tmp_path)) for argument in argv))
    assert argv[:1] == ["score"] or not (tmp_path / "x").exists()  # what cannot begin leaves nothing


def test_a_store_of_another_student_is_refused(sampled, capsys):
    def change(manifest):
        manifest["about"]["student"] = "0" * 64

    rewrite_manifest(sampled / "rollouts", change)
    line = refused(capsys, "score", sampled)
    assert "a store belongs to one student" in line
    [named] = re.findall("--store.accept='(.*)'$", line)
    assert main(["score", str(sampled), f"--store.accept={named}"]) == 0


def test_a_device_that_is_too_small_is_one_line_and_status_2(tmp_path, capsys):
    assert main(["sample", str(tmp_path / "run"), *LAB, "--sampling.slots=80000000"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("opd: a run must fit its devices: RESOURCE_EXHAUSTED: Out of memory allocating")


def test_a_run_that_would_not_fit_its_devices_does_not_begin(tmp_path, monkeypatch, capsys):
    for module in ("topology", "command"):
        monkeypatch.setattr(f"opd_jax.plan.{module}.memory_of", lambda device: 10**6)
    assert "a run must fit its devices: it does not" in refused(capsys, "sample", tmp_path / "run", *LAB)
    assert not (tmp_path / "run").exists()


def test_parts_say_the_peak_and_end_with_an_export(tmp_path, capsys):
    run = tmp_path / "run"
    once = ["--schedule.rounds=1", "--model.residency=sequential"]
    assert main(["sample", str(run), *LAB, *once]) == 0
    assert capsys.readouterr().out.startswith("peak: ")
    for part in ("score", "train"):
        assert main([part, str(run)]) == 0
        assert capsys.readouterr().out.startswith("peak: ")
    exported = load_pretrained(run / "student")[1]
    shutil.rmtree(run / "student")
    assert main(["export", str(run)]) == 0
    assert capsys.readouterr().out == f"student: {run / 'student'}\n"
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(run / "student")[1], exported)
    assert "export writes a run's student" in refused(capsys, "export", tmp_path / "none")


def test_a_run_on_a_store_of_another_leaves_nothing(sampled, capsys):
    elsewhere = f"--store.at={sampled}"
    line = refused(capsys, "sample", sampled.parent / "other", *LAB, "--model.student=lab:teacher", elsewhere)
    assert "a store belongs to one student" in line
    assert not (sampled.parent / "other").exists()


def test_a_response_of_length_zero_is_refused(sampled, capsys):
    [shard] = (sampled / "rollouts" / "round-00000").iterdir()
    table = pq.read_table(shard)
    for name in ("response_ids", "behaviour_logprobs"):
        values = table.column(name).to_pylist()
        values[3] = []
        place = table.column_names.index(name)
        field = table.schema.field(place)
        table = table.set_column(place, field, pa.array(values, field.type))
    pq.write_table(table, shard)

    def change(manifest):
        manifest["rounds"][0]["shards"][0]["sha256"] = digest_of(shard.read_bytes())

    rewrite_manifest(sampled / "rollouts", change)
    assert f"at least one token: row 3 of {shard}" in refused(capsys, "score", sampled)


def test_help_needs_no_jax():
    code = (
        "import sys, opd_jax.cli\ntry: opd_jax.cli.main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout


def test_ctrl_c_says_how_to_go_on_and_going_on_ends_the_same(tmp_path):
    """As ends a run without an interruption, and one that keeps both models on the device."""
    env = {**as_users_have_it(), "PYTHONPATH": str(ROOT)}
    opd = [sys.executable, "-m", "opd_jax.cli"]

    def distill(name: str, interrupt: bool) -> subprocess.CompletedProcess:
        folder = tmp_path / name
        config = LAB if not folder.exists() else []
        if config and interrupt:
            config = [*LAB, "--model.residency=sequential"]
        process = subprocess.Popen(
            [*opd, "distill", str(folder), *config],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        metrics = folder / "metrics.jsonl"
        while interrupt and process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= 1:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.005)
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    cut = distill("cut", interrupt=True)
    assert cut.returncode == 130, cut.stderr
    assert "stopping at the next safe place" in cut.stderr
    peak = next(line for line in cut.stdout.splitlines() if line.startswith("peak: "))
    assert peak.endswith("GiB on a device, in train")
    assert f"go on with: {sys.executable} -m opd_jax.cli distill {tmp_path / 'cut'}" in cut.stderr
    assert "Traceback" not in cut.stderr
    done = (tmp_path / "cut" / "metrics.jsonl").read_text().count("\n")
    assert 1 <= done < 8
    for name in ("cut", "whole"):
        finished = distill(name, interrupt=False)
        assert finished.returncode == 0, finished.stderr
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("cut", "whole"))
    assert a == b
    for line in map(json.loads, a.splitlines()):  # the first update of a round is on policy, to the bit
        first = line["pass"] == line["minibatch"] == 0
        assert (line["drift_max"] == 0.0) == first
        assert (line["weight_min"] == line["weight_max"] == 1.0) == first
