"""One run by two real processes over loopback."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from opd_jax.cli import main
from opd_jax.model import load_pretrained
from opd_jax.settings import config_file
from opd_jax.train.metrics import read_lines
from tests.conftest import TINY, as_users_have_it


def command(folder, *more):
    words = [word for word in TINY if not word.startswith("--schedule.rounds")]
    lab = str(config_file("lab.yaml"))
    return ["distill", str(folder), "--config", lab, *words, "--schedule.rounds=1", *more]


def start(words, begin="", **environment):
    code = f"{begin}\nimport sys; from opd_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={
            **as_users_have_it(),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(words, *, first="", second=""):
    """Two processes of one run, and Python that the first or the second of them begins with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(words, begin, OPD_PROCESSES="2", OPD_PROCESS=str(number), OPD_COORDINATOR=where)
        for number, begin in enumerate((first, second))
    ]


def ended(processes, seconds=280):
    """Status and words of each, all of them within so many seconds."""
    end = time.monotonic() + seconds
    try:
        said = [process.communicate(timeout=max(end - time.monotonic(), 0.1))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, words) for process, words in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    [(status, said)] = ended([start(command(folder))])
    assert status == 0, said
    return folder


def drawn_in(folder):
    rollouts = [rollout for file in sorted(folder.rglob("rollouts/*/*.parquet")) for rollout in rows_of(file)]
    return {(rollout["problem"], rollout["sample"]): rollout for rollout in rollouts}


def rows_of(file):
    return pq.ParquetFile(file).read().to_pylist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "split",
    [
        ("--mesh.data=2",),
        ("--mesh.fsdp=2",),
        ("--mesh.fsdp=2", "--model.residency=sequential"),
    ],
)
def test_two_processes_train_as_one(tmp_path, one, split):
    for status, said in ended(start_two(command(tmp_path / "many", *split))):
        assert status == 0, said
    got, want = (read_lines(folder / "metrics.jsonl") for folder in (tmp_path / "many", one))
    assert len(got) == len(want) == 4
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4, atol=1e-5)
        assert a["tokens"] == b["tokens"]
    # The same tokens; their log-probs are summed in another order, so the digests of the files differ.
    got, want = drawn_in(tmp_path / "many"), drawn_in(one)
    assert got.keys() == want.keys()
    assert len(got) == 16
    for name, rollout in got.items():
        assert rollout["response_ids"] == want[name]["response_ids"]
        for told in ("behaviour_logprobs", "reward"):
            np.testing.assert_allclose(rollout[told], want[name][told], rtol=1e-4, atol=1e-5)
    _, student = load_pretrained(tmp_path / "many" / "student")
    _, wanted = load_pretrained(one / "student")
    np.testing.assert_allclose(student["embed"], wanted["embed"], atol=2e-3)


PARTS = "import runpy; runpy.run_module('tests.train.two_processes', run_name='__main__'); raise SystemExit"


@pytest.mark.slow
def test_a_state_comes_back_from_the_host_and_the_first_speaks_to_both():
    for status, said in ended(start_two([], first=PARTS, second=PARTS), 120):
        assert status == 0, said
        assert "{'scalar': 14, 'split': [0.0, 2.0, 4.0, 6.0], 'whole': [0.0, 2.0, 4.0]}" in said
        assert "['told', True]" in said
        assert "no: naïve" in said


@pytest.mark.slow
def test_a_process_that_fails_does_not_leave_the_other_waiting():
    (first, said), (second, _) = ended(start_two(["break"], first=PARTS, second=PARTS), 120)
    assert first == 1
    assert second != 0
    assert "RuntimeError: broken" in said


@pytest.mark.slow
def test_what_the_first_process_may_not_do_none_goes_on_without(tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        both = ended(start_two(command(tmp_path / "run", "--mesh.data=2")), 120)
    for status, said in both:
        assert status == 2, said
        assert "opd: one process at a time works on a run" in said


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_an_error_in_one_process_ends_them_all(tmp_path, which):
    broken = {("first", "second")[which]: "from opd_jax.train.run import Run; Run.make_room = None"}
    both = ended(start_two(command(tmp_path / "run", "--mesh.data=2"), **broken), 150)
    assert [status != 0 for status, _ in both] == [True, True]
    assert both[which][0] == 1
    assert "'NoneType' object is not callable" in both[which][1]


@pytest.mark.slow
def test_a_late_process_opens_the_run_that_the_first_did(tmp_path):
    late = f"""
import time
from pathlib import Path
import opd_jax.train.opening as opening
check = opening.check_choices
def check_late(config):
    end = time.monotonic() + 15
    while time.monotonic() < end and not Path({str(tmp_path / "run" / "config.yaml")!r}).exists():
        time.sleep(0.1)
    check(config)
opening.check_choices = check_late
"""
    for status, said in ended(start_two(command(tmp_path / "run", "--mesh.data=2"), second=late)):
        assert status == 0, said


@pytest.mark.parametrize(
    ("told", "rule"),
    [
        ({"OPD_PROCESSES": "2"}, "OPD_PROCESSES needs OPD_COORDINATOR"),
        ({"OPD_PROCESSES": "2", "OPD_COORDINATOR": "a:1"}, "OPD_PROCESSES needs OPD_PROCESS beside it"),
        ({"OPD_PROCESS": "0"}, "OPD_PROCESS needs OPD_PROCESSES"),
        ({"OPD_COORDINATOR": "a:1"}, "OPD_COORDINATOR needs OPD_PROCESSES"),
        *[
            ({"OPD_PROCESSES": "2", "OPD_PROCESS": "0", "OPD_COORDINATOR": place}, "must be host:port of")
            for place in ("a", "a:", "a:0", "a:99999", "http://a:1", "a b:1", ":1", "a:²")
        ],
        ({"OPD_PROCESSES": "two"}, "OPD_PROCESSES must be a whole number"),
        ({"OPD_PROCESSES": "²"}, "OPD_PROCESSES must be a whole number"),
        ({"OPD_PROCESSES": "0"}, "OPD_PROCESSES must be a whole number from 1"),
        (
            {"OPD_PROCESSES": "2", "OPD_PROCESS": "²", "OPD_COORDINATOR": "a:1"},
            "OPD_PROCESS must be a whole number from 0 to 1",
        ),
        (
            {"OPD_PROCESSES": "2", "OPD_PROCESS": "2", "OPD_COORDINATOR": "a:1"},
            "OPD_PROCESS must be a whole number from 0 to 1",
        ),
    ],
)
def test_a_run_that_was_asked_to_be_many_does_not_go_on_alone(tmp_path, monkeypatch, capsys, told, rule):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert main(command(tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert rule in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_whose_companions_do_not_come_says_so(tmp_path, which):
    hasty = "import opd_jax.processes as processes; processes.PATIENCE = 1"
    processes = start_two(command(tmp_path / "run"), first=hasty, second=hasty)
    processes[1 - which].kill()
    status, said = ended([processes[which]])[0]
    ended([processes[1 - which]])
    assert status == 2
    assert said.startswith("opd: a run of many processes needs them all: not all had come after 1 seconds")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_process_that_waits_for_companions_can_be_ended(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as first:  # which hears the second, and never answers
        where = f"127.0.0.1:{first.getsockname()[1]}"
        alone = start(command(tmp_path / "run"), OPD_PROCESSES="2", OPD_PROCESS="1", OPD_COORDINATOR=where)
        first.settimeout(60)
        with first.accept()[0]:
            alone.terminate()
            assert ended([alone], 60)[0][0] == -signal.SIGTERM


def test_a_command_that_one_process_does_waits_for_no_others(tmp_path, monkeypatch, capsys):
    for name, value in {"OPD_PROCESSES": "2", "OPD_PROCESS": "1", "OPD_COORDINATOR": "127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "has no config.yaml" in capsys.readouterr().err


def test_many_processes_of_one_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPD_PROCESSES", "1")
    assert main(command(tmp_path / "run", "--distributed")) == 2
    assert "--distributed and OPD_PROCESSES=1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
