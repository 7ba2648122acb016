"""The road with real servers: one draws, one scores, the run trains, and the new weights draw."""

import pytest

from opd_jax.lab import student, teacher
from opd_jax.settings import load_config
from opd_jax.train.loop import export_student
from opd_jax.train.metrics import read_lines
from opd_jax.train.opening import open_run
from tests.conftest import said_by_a_program
from tests.rollout.vllm_server import vllm_server

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]


def opd(*words):
    return said_by_a_program("opd_jax.cli", *words).strip()


def test_two_rounds_by_servers(tmp_path):
    folder = tmp_path / "run"
    with (
        vllm_server(student(), tmp_path / "student.log") as url,
        vllm_server(teacher(), tmp_path / "teacher.log", "--max-logprobs", "-1") as scores,
    ):
        settings = [
            "--engine.kind=server",
            f"--engine.urls=[{url}]",
            f"--engine.teacher_urls=[{scores}]",
            "--engine.tolerance=1e-4",
            "--problems.train=tests.world:short_train",
            "--problems.heldout=tests.world:short_heldout",
            "--sampling.prompts=4",
            "--sampling.samples=4",
            "--sampling.max_response=40",
            "--sampling.slots=16",
            "--sampling.max_prompt=16",
            "--schedule.rounds=2",
            "--optimizer.learning_rate=3e-3",
            "--log.diagnose_every=0",
        ]
        said = [opd("sample", folder, "--config", "configs/lab.yaml", *settings)]
        said += [opd(part, folder) for part in ("score", "train", "sample", "score", "train")]
    print("", *said, sep="\n")
    run = open_run(folder, load_config(folder / "config.yaml"))
    assert run.rollouts.rounds == run.scored.rounds == [0, 1]
    assert run.about["engine"] == "server"
    for round_ in (0, 1):
        found = run.scored.shard(round_)["mismatch"]
        print(
            f"round {round_}: sampler against trainer, mean {found['mean']:.2e}, largest {found['max']:.2e}"
        )
        assert found["max"] < 1e-3
    lines = read_lines(run.metrics_file)
    assert len(lines) == 2 * run.config.schedule.updates_per_round
    assert lines[0]["drift_max"] == 0.0 < lines[1]["drift_max"]
    before, after = ({r.response_ids.tobytes() for r in run.rollouts.read(i)} for i in (0, 1))
    assert before != after
    assert export_student(run).is_dir()
