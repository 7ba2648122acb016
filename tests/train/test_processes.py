"""One run by two real processes over loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
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


def start(words, **environment):
    code = "import sys; from opd_jax.cli import main; sys.exit(main(sys.argv[1:]))"
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


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    many = [
        start(
            command(tmp_path / "many", "--mesh.data=2"),
            OPD_PROCESSES="2",
            OPD_PROCESS=str(number),
            OPD_COORDINATOR=f"127.0.0.1:{port}",
        )
        for number in range(2)
    ]
    one = start(command(tmp_path / "one"))
    for process in (*many, one):
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 0, said
    got, want = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("many", "one"))
    assert len(got) == len(want) == 4
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4, atol=1e-5)
        assert a["tokens"] == b["tokens"]
    manifests = [
        json.loads((tmp_path / name / "rollouts" / ".manifest.json").read_text()) for name in ("many", "one")
    ]
    assert all(m["rounds"][0]["shards"][0]["sha256"] for m in manifests)
    _, student = load_pretrained(tmp_path / "many" / "student")
    _, wanted = load_pretrained(tmp_path / "one" / "student")
    np.testing.assert_allclose(student["embed"], wanted["embed"], atol=2e-3)


def test_a_run_that_was_asked_to_be_many_does_not_go_on_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPD_PROCESSES", "2")
    assert main(command(tmp_path / "run")) == 2
    assert "OPD_PROCESSES needs OPD_COORDINATOR" in capsys.readouterr().err
    monkeypatch.setenv("OPD_PROCESSES", "two")
    assert main(command(tmp_path / "run")) == 2
    assert "must be a whole number" in capsys.readouterr().err
    monkeypatch.setenv("OPD_PROCESSES", "1")
    assert main(command(tmp_path / "run", "--distributed")) == 2
    assert "--distributed and OPD_PROCESSES=1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
