"""``opd plan`` for the devices at hand, against sizes and products counted by hand."""

import json

import pytest

from opd_jax.cli import main
from opd_jax.lab import student, teacher
from opd_jax.model import load_pretrained, parameter_count
from opd_jax.settings import config_file
from tests.conftest import TINY

ROWS, WIDTH = 8, 16 + 40 - 1  # of a minibatch: TINY has 4 x 4 rollouts in two


@pytest.fixture(scope="module")
def counts():
    return [parameter_count(load_pretrained(folder())[0]) for folder in (student, teacher)]


def planned(tmp_path, *more):
    words = [f"--model={student()}", f"--teacher={teacher()}", "--config", str(config_file("lab.yaml"))]
    file = tmp_path / "plan.json"
    status = main(["plan", *words, *TINY, f"--json={file}", *more])
    return status, {
        program["name"]: program for program in json.loads(file.read_text())
    } if not status else {}


def test_a_plan_counts_what_lies_on_a_device(tmp_path, capsys, counts):
    status, programs = planned(tmp_path)
    assert status == 0
    assert list(programs) == ["prefill", "sample", "score old", "score teacher", "train"]
    ours, theirs = counts
    train = programs["train"]
    # Float32 weights; two moments and two counters; the teacher waits beside the step.
    assert train["arguments"]["student"] == 4 * ours
    assert train["arguments"]["optimizer"] == 8 * ours + 8
    assert train["beside"] == {"teacher": 4 * theirs}
    assert programs["sample"]["beside"] == {"optimizer": 8 * ours + 8, "teacher": 4 * theirs}
    assert train["fits"] is None  # a CPU does not say how much it has
    # Of each parameter but the embedding, which is looked up, a multiply and an add a position: once to
    # read, in training again to recompute it, and twice backward. Attention comes on top.
    products = 2 * ROWS * WIDTH * ours
    assert products < programs["score old"]["flops"] < 1.5 * products
    assert 3.5 * products < train["flops"] < 1.5 * 4 * products
    said = capsys.readouterr().out
    assert "1 of 8 devices" in said
    assert "attention kernel xla" in said


@pytest.mark.slow
def test_what_a_loss_asks_of_the_store_is_planned_too(tmp_path, counts):
    more = (
        "--loss.kind=student_topk --loss.student_k=4 --loss.terms=[reference_kl] --loss.kl_weight=1".split()
    )
    status, programs = planned(tmp_path, *more, "--log.diagnose_every=2")
    assert status == 0
    assert {"score student's ids", "teacher of those ids", "score reference"} < set(programs)
    assert programs["score reference"]["arguments"]["base"] == 4 * counts[0]
    assert programs["train"]["beside"]["base"] == 4 * counts[0]


def test_a_mesh_splits_it_and_one_model_at_a_time_leaves_the_other_out(tmp_path, counts):
    """The teacher may be split over the data axis too."""
    wide = ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.spread_teacher=true")
    _, programs = planned(tmp_path, *wide, "--model.residency=sequential")
    train = programs["train"]
    assert 2 * counts[0] < train["arguments"]["student"] < 2.1 * counts[0]  # norms are whole everywhere
    assert counts[1] < programs["score teacher"]["arguments"]["teacher"] < 1.1 * counts[1]
    assert train["beside"] == {}
    assert train["traffic"]["all-gather"] > 3 * counts[0]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ["--topology=v9:1x1"],
            "a topology must be local, GPUs (t4, a100-40gb, a100-80gb, h100, h200, b200), or one that",
        ),
        (["--model=nowhere"], "or name one of qwen3-0.6b"),
        (
            ["--mesh.fsdp=8", "--schedule.minibatches=4"],
            "use sampling.prompts 8, or a mesh that splits rows 4",
        ),
        (["--mesh.tensor=16"], "needs 16, there are 8"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_in_a_line(tmp_path, capsys, more, line):
    assert planned(tmp_path, *more)[0] == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
