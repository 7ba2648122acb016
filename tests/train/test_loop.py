"""The loop: what the first update sees, and that parts, interruptions and arms agree to the bit."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted
from opd_jax.model import load_pretrained
from opd_jax.rollout import make_rows
from opd_jax.study.report import write_report
from opd_jax.train.collect import draws_of_round, minibatch_plan
from opd_jax.train.loop import (
    check_extras,
    counted_rows,
    distill,
    do_part,
    export_student,
    is_diagnosed,
    next_part,
    special_ids,
)
from opd_jax.train.metrics import read_lines
from opd_jax.train.opening import exclusive, open_run
from opd_jax.train.run import Run
from opd_jax.train.scoring import score_round
from tests.conftest import tiny_config
from tests.train.conftest import WHOLE, ignore, never


def same_bits(a, b):
    """Assert that two runs did exactly the same, wall-clock times aside."""
    assert (a.folder / "metrics.jsonl").read_bytes() == (b.folder / "metrics.jsonl").read_bytes()
    for store in ("rollouts", "scored"):
        left, right = (
            sorted(file.relative_to(run.folder) for file in (run.folder / store).rglob("*.parquet"))
            for run in (a, b)
        )
        assert left == right  # their names hold digests of their content
        assert left
    for x, y in zip(jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_first_update_of_a_round_sees_no_drift_and_later_ones_do(finished):
    lines = read_lines(finished.metrics_file)
    assert [line["update"] for line in lines] == list(range(8))
    for line in lines:
        if line["pass"] == line["minibatch"] == 0:
            assert line["drift_max"] == 0.0
            assert line["weight_min"] == line["weight_max"] == 1.0
            assert line["effective_token_ratio"] == 1.0
        else:
            assert line["drift_max"] > 1e-4
            assert line["weight_min"] < 1.0 < line["weight_max"]
            assert line["effective_token_ratio"] < 1.0


def test_part_by_part_in_fresh_processes_worth_of_state_is_the_loop(finished, tmp_path):
    config = tiny_config(*WHOLE)
    while (part := next_part(open_run(tmp_path / "parts", config))) != "done":
        run = open_run(tmp_path / "parts")
        do_part(run, part, ignore, never)
        run.checkpoints.close()
    same_bits(finished, open_run(tmp_path / "parts"))


@pytest.mark.parametrize("stop_at", [6, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 4))])
def test_an_interrupted_run_goes_on_to_the_same_end(finished, tmp_path, stop_at):
    run = open_run(tmp_path / "cut", tiny_config(*WHOLE))
    seen = []
    with pytest.raises(Interrupted):
        distill(run, seen.append, lambda: len(seen) >= stop_at)
    assert int(run.state.update) == stop_at
    run.checkpoints.close()
    again = open_run(tmp_path / "cut")
    distill(again, ignore, never)
    same_bits(finished, again)


@pytest.mark.parametrize("killed_at", [6, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_forgets_the_updates_it_did_not_save(finished, tmp_path, killed_at):
    run = open_run(tmp_path / "killed", tiny_config(*WHOLE))
    seen = []

    def report(line):
        seen.append(line)
        if len(seen) == killed_at:  # before anything is saved, and inside the second round
            raise SystemExit

    with pytest.raises(SystemExit):
        distill(run, report, never)
    run.checkpoints.close()
    assert len(read_lines(run.metrics_file)) == killed_at
    again = open_run(tmp_path / "killed")
    assert int(again.state.update) == killed_at // 4 * 4
    assert len(read_lines(run.metrics_file)) == killed_at  # to look at a run is not to change it
    distill(again, ignore, never)
    same_bits(finished, again)


def test_one_process_at_a_time(tmp_path):
    first, second = (open_run(tmp_path / "run", tiny_config()) for _ in range(2))
    with exclusive(first), pytest.raises(InputError, match="is in use"):
        do_part(second, "sample", ignore, never)
    do_part(second, "sample", ignore, never)


def test_a_run_that_lost_its_state_does_not_begin_again(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match="has none in checkpoints after 8 updates"):
        distill(open_run(tmp_path / "run"), ignore, never)
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)  # orbax made it anew
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(InputError, match="checkpoints must be a folder"):
        distill(open_run(tmp_path / "run"), ignore, never)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    [newest] = (tmp_path / "run" / "checkpoints").glob("8")
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"checkpoints/8 is not .*remove it to go on from the one before"):
        distill(open_run(tmp_path / "run"), ignore, never)
    shutil.rmtree(newest)
    again = open_run(tmp_path / "run")
    distill(again, ignore, never)
    same_bits(finished, again)


def test_training_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    run = open_run(tmp_path / "run", tiny_config("--schedule.rounds=3"))
    for part in ("sample", "score", "train", "sample", "score"):
        do_part(run, part, ignore, never)
    honest = run.train_step

    def broken(state, batch, frozen):
        lost = batch.signal.replace(old=np.full_like(batch.signal.old, np.nan))
        return honest(state, batch.replace(signal=lost), frozen)

    run.train_step = broken
    with pytest.raises(InputError, match="update 4 has loss nan"):
        do_part(run, "train", ignore, never)
    assert len(read_lines(run.metrics_file)) == run.checkpoints.latest == 4


def test_a_run_goes_on_with_what_it_began_with(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a+1b+1\\n", "answer": "2"}\n')
    config = tiny_config(f"--problems.train={tmp_path / 'p.jsonl'}", "--sampling.prompts=1")
    run = open_run(tmp_path / "run", config)
    do_part(run, "sample", ignore, never)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a+1b+2\\n", "answer": "3"}\n')
    with pytest.raises(InputError, match=r"problems\.train of .* has changed"):
        open_run(tmp_path / "run")


def test_a_round_must_hold_what_training_asks_for_but_not_what_logging_does(tmp_path):
    once = ("--schedule.rounds=1", "--schedule.passes=1", "--schedule.minibatches=1")
    run = open_run(tmp_path / "run", tiny_config(*once))
    for part in ("sample", "score"):
        do_part(run, part, ignore, never)
    assert run.scored.shard(0)["extras"] == []
    asking = Run(run.folder, tiny_config(*once, "--gate.control=noise"))
    with pytest.raises(InputError, match=r"gate\.control=noise needs again, round 0 .* has none such"):
        check_extras(asking, 0)
    run = open_run(run.folder, tiny_config(*once, "--log.diagnose_every=1"))
    do_part(run, "train", ignore, never)
    [line] = read_lines(run.metrics_file)  # without drift: gate or none, the same
    assert "null_drift_abs" not in line["diagnosis"]
    assert line["diagnosis"]["ungated_gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-5)


def test_the_paper_is_diagnosed_where_drift_is_largest(tmp_path):
    """With the default's two updates a round and one diagnosis in ten, the paper's readings are there."""
    default = Config()
    assert (default.schedule.passes, default.schedule.minibatches, default.log.diagnose_every) == (2, 1, 10)
    shape = ("--schedule.passes=2", "--schedule.minibatches=1", "--log.diagnose_every=10")
    run = open_run(tmp_path / "run", tiny_config(*shape, "--schedule.rounds=5"))
    distill(run, ignore, never)
    *others, first, last = read_lines(run.metrics_file)
    assert not any("diagnosis" in line for line in (*others, first))
    told = last["diagnosis"]
    assert {"1", "8"} <= set(told["autocorrelation"])
    assert set(told["block_variance"]) == set(told["cancellation"])
    assert 0 < told["cancellation"]["16"] < told["cancellation"]["1"]
    assert told["ungated_gradient_norm"] != pytest.approx(last["gradient_norm"], rel=1e-5)
    assert told["null_drift_max"] < last["drift_max"]


@pytest.mark.parametrize(
    ("every", "want"), [(10, [9, 19, 29]), (8, [7, 15, 23, 31]), (1, list(range(32))), (0, [])]
)
def test_which_updates_are_diagnosed(every, want):
    config = tiny_config(f"--log.diagnose_every={every}")
    assert [update for update in range(32) if is_diagnosed(config, update)] == want


def test_special_tokens_may_be_listed(tmp_path):
    listing = ("--loss.special_tokens=all_out", "--schedule.rounds=1")
    run = open_run(tmp_path / "run", tiny_config(*listing, "--loss.special_ids=[5,3]"))
    assert special_ids(run) == (3, 5)
    end = run.tokenizer.eos_token_id
    assert special_ids(Run(run.folder, tiny_config(*listing, f"--loss.special_ids=[3,{end}]"))) == (3,)
    with pytest.raises(InputError, match="loss.special_ids has 9999, the tokenizer"):
        open_run(tmp_path / "other", tiny_config(*listing, "--loss.special_ids=[9999]"))


def test_special_tokens_leave_the_mask_but_not_the_record(finished, tmp_path, monkeypatch):
    config = tiny_config("--schedule.rounds=1", "--loss.special_tokens=all_out")
    run = open_run(tmp_path / "run", config)
    assert special_ids(run) == ()  # the lab's only one ends a response
    [newline] = run.tokenizer.encode("\n")
    monkeypatch.setattr("opd_jax.train.loop.special_ids", lambda run: (newline,))
    distill(run, ignore, never)
    plan, rollouts = minibatch_plan(config, 0), run.scored.read(0)
    for line, whole in zip(read_lines(run.metrics_file), read_lines(finished.metrics_file), strict=False):
        members = [rollouts[index] for index in plan[line["minibatch"]]]
        lines = sum(int((rollout.response_ids == newline).sum()) for rollout in members)
        assert line["tokens"] == whole["tokens"] - lines
        assert lines > 10
    [file] = (run.folder / "tokens").iterdir()
    table = pq.read_table(file).to_pylist()
    for row in table:
        weights = np.asarray(row["weights"])
        np.testing.assert_array_equal(weights == 0, np.asarray(row["response_ids"]) == newline)


def test_special_tokens_are_the_tokenizers_but_for_ends(finished):
    stub = SimpleNamespace(
        tokenizer=SimpleNamespace(all_special_ids=[9, 3, 0, 7], eos_token_id=9),
        stop_ids=(0,),
        config=tiny_config("--loss.special_tokens=first_out"),
    )
    assert special_ids(stub) == (3, 7)
    rows = make_rows([[1]], [[7, 3, 7, 9]], 5)
    np.testing.assert_array_equal(counted_rows(stub, rows).mask, [[0, 0, 1, 1, 0]])
    assert counted_rows(finished, rows) is rows


def test_where_and_how_long_a_run_is_computed_may_change(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    run = open_run(tmp_path / "run", tiny_config(*WHOLE, "--schedule.rounds=3", "--mesh.data=2"))
    distill(run, ignore, never)
    lines = read_lines(run.metrics_file)
    assert len(lines) == 12
    assert lines[:8] == read_lines(finished.metrics_file)
    assert lines[8]["drift_max"] < 1e-6
    assert open_run(tmp_path / "run").config.schedule.rounds == 3


@pytest.mark.parametrize(
    ("segments", "loss"),
    [
        ("none", "sampled_token"),
        ("newline", "teacher_topk"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("token", "sampled_token"),
                ("newline", "sampled_token"),
                ("sequence", "sampled_token"),
                ("block", "teacher_topk"),
                ("none", "teacher_topk"),
            )
        ),
    ],
)
def test_arms_share_prompts_noise_and_first_update(finished, tmp_path, loss, segments):
    config = tiny_config(f"--gate.segments={segments}", f"--loss.kind={loss}", "--schedule.rounds=1")
    run = open_run(tmp_path / "arm", config)
    distill(run, ignore, never)
    first = finished.scored.read(0)
    for a, b in zip(first, run.scored.read(0), strict=True):
        np.testing.assert_array_equal(a.response_ids, b.response_ids)
        np.testing.assert_array_equal(a.score.old_logprobs, b.score.old_logprobs)
    mine, theirs = read_lines(run.metrics_file), read_lines(finished.metrics_file)
    assert (mine[0]["loss"] == theirs[0]["loss"]) == (loss == "sampled_token")
    for line in mine[1:]:
        assert (line["effective_token_ratio"] == 1.0) == (segments == "none")


@pytest.mark.parametrize("surrogate", ["is", pytest.param("reinforce", marks=pytest.mark.slow)])
def test_other_surrogates_train(tmp_path, surrogate):
    config = tiny_config(f"--loss.surrogate={surrogate}", "--loss.advantage=cur", "--schedule.rounds=1")
    run = open_run(tmp_path / "arm", config)
    distill(run, ignore, never)
    assert all(np.isfinite(line["loss"]) for line in read_lines(run.metrics_file))


@pytest.mark.slow
def test_other_readings_of_the_paper_train(tmp_path, finished):
    """Per-sequence means and weights, and drift against the sampler's own log-probs."""
    config = tiny_config(
        "--gate.scope=sequence",
        "--loss.reduction=seq_mean_token_mean",
        "--loss.old_source=sampler",
        "--schedule.rounds=1",
    )
    run = open_run(tmp_path / "arm", config)
    distill(run, ignore, never)
    first, other = read_lines(run.metrics_file)[0], read_lines(finished.metrics_file)[0]
    assert first["drift_max"] < 1e-6  # the two engines agree
    assert first["loss"] != other["loss"]


def test_stale_rollouts_carry_drift_from_their_first_update(tmp_path):
    run = open_run(tmp_path / "stale", tiny_config("--schedule.staleness=1", "--schedule.rounds=3"))
    parts = []
    while (part := next_part(run)) != "done":
        parts.append(part)
        do_part(run, part, ignore, never)
    collect, train = ["sample", "score"], ["train"]
    assert parts == collect + collect + train + collect + train + train
    assert [run.rollouts.shard(r)["update"] for r in range(3)] == [0, 0, 4]
    firsts = [line for line in read_lines(run.metrics_file) if line["update"] % 4 == 0]
    assert firsts[0]["drift_max"] == 0.0
    assert firsts[1]["drift_max"] > 1e-4
    assert firsts[2]["drift_max"] > 1e-4


def test_parts_come_in_turn(tmp_path, finished):
    run = open_run(tmp_path / "run", tiny_config())
    for part in ("score", "train"):
        with pytest.raises(InputError, match=f"is due for sample, not {part}"):
            do_part(run, part, ignore, never)
    with pytest.raises(InputError, match="has done all 2 rounds"):
        do_part(finished, "sample", ignore, never)


def test_old_is_scored_by_the_policy_that_sampled(tmp_path):
    run = open_run(tmp_path / "run", tiny_config())
    do_part(run, "sample", ignore, never)
    params = jax.tree.map(lambda x: x + 1e-6, run.state.params)
    run.state = run.state.replace(params=params)
    with pytest.raises(InputError, match="not the one that drew round 0"):
        score_round(run, never)


def test_a_run_keeps_its_config(finished):
    with pytest.raises(InputError, match=r"optimizer\.learning_rate = 0\.003, not 0\.01"):
        open_run(finished.folder, tiny_config(*WHOLE, "--optimizer.learning_rate=0.01"))
    assert open_run(finished.folder, tiny_config(*WHOLE)).config == finished.config


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path):
    for bad in (
        "--model.student=/nowhere",
        "--problems.train=/nowhere.jsonl",
        "--model.teacher=lab:tutor",
        "--sampling.max_prompt=3",
        "--loss.top_k=44",
        "--mesh.data=16",
    ):
        with pytest.raises(InputError):
            open_run(tmp_path / "run", tiny_config(bad))
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="a new run needs a config"):
        open_run(tmp_path / "run")


def test_the_trained_student_is_exported_whole(finished):
    config, params = load_pretrained(export_student(finished))
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(finished.state.params), strict=True):
        np.testing.assert_array_equal(x, y)
    assert config.vocab_size == finished.model.vocab_size
    assert (finished.folder / "student" / "tokenizer.json").exists()


def test_prompts_come_in_epochs_and_never_with_the_same_noise():
    config = tiny_config()
    problems = [f"problem {i}" for i in range(10)]
    draws = [draw for round_ in range(5) for draw in draws_of_round(config, problems, round_)]
    assert len(set(draws)) == len(draws) == 5 * 4 * 4
    firsts = [problem for problem, _ in draws[::4]]
    assert sorted(firsts[:10]) == sorted(firsts[10:]) == problems
    assert firsts[:10] != firsts[10:]


def test_minibatches_split_a_round_and_differ_between_rounds():
    config = tiny_config()
    plans = [minibatch_plan(config, round_) for round_ in (0, 1)]
    for plan in plans:
        assert plan.shape == (2, 8)
        assert sorted(plan.ravel()) == list(range(16))
    assert not np.array_equal(*plans)


def test_rollouts_that_are_compared_share_a_minibatch():
    config = tiny_config("--weights.members=[scope_opd]")
    plans = [minibatch_plan(config, round_) for round_ in range(4)]
    for plan in plans:
        assert sorted(plan.ravel()) == list(range(16))
        for minibatch in plan:
            problems, counts = np.unique(minibatch // 4, return_counts=True)
            assert len(problems) == 2
            assert (counts == 4).all()
    assert any(not np.array_equal(plans[0], plan) for plan in plans)
    apart = np.unique(minibatch_plan(tiny_config(), 0)[0] // 4, return_counts=True)[1]
    assert not (apart == 4).all()


def test_rollouts_may_lie_in_an_object_store(finished, tmp_path):
    config = tiny_config(*WHOLE, "--store.at=memory://bucket/run/")
    run = open_run(tmp_path / "run", config)
    seen = []
    with pytest.raises(Interrupted):
        distill(run, seen.append, lambda: len(seen) >= 5)
    run.checkpoints.close()
    again = open_run(tmp_path / "run")
    distill(again, ignore, never)
    assert not (again.folder / "rollouts").exists()
    assert again.metrics_file.read_bytes() == finished.metrics_file.read_bytes()
    for ours, theirs in ((again.rollouts, finished.rollouts), (again.scored, finished.scored)):
        names = [[shard["file"] for shard in store.shards] for store in (ours, theirs)]
        assert names[0] == names[1]  # which hold digests of their content
    write_report([again.folder], tmp_path / "report.html")
    assert json.loads((tmp_path / "report.json").read_text())["runs"][0]["rounds"][1]["reward"] >= 0
    other = tiny_config(*WHOLE, "--store.at=memory://bucket/run", "--sampling.temperature=0.5")
    with pytest.raises(InputError, match=r"memory://bucket/run/rollouts was written for 1\.0"):
        distill(open_run(tmp_path / "other", other), ignore, never)


def test_sampler_and_trainer_agree(finished):
    for round_ in (0, 1):
        assert 0 <= finished.scored.shard(round_)["mismatch"]["max"] < 1e-5
