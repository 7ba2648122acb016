"""That every setting reaches the place it is meant for: steps, scores and samples against plain NumPy."""

import itertools

import jax
import numpy as np
import pytest

from opd_jax.keys import stream
from opd_jax.method import newline_spans
from opd_jax.model import forward
from opd_jax.rollout import Request, make_sampler, sample
from opd_jax.rollout.score import batch_of
from opd_jax.study.evaluation import evaluate_run
from opd_jax.tasks import encode_prompt, newline_table
from opd_jax.train.collect import minibatch_plan
from opd_jax.train.loop import do_part
from opd_jax.train.opening import open_run
from tests.conftest import tiny_config
from tests.oracle import gates, losses
from tests.train.conftest import ignore, never

TEMPERATURE = 1.6


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A run at a temperature of its own, with one round scored, and its dense log-probs by plain softmax."""
    config = tiny_config(
        f"--sampling.temperature={TEMPERATURE}",
        "--schedule.rounds=1",
        "--gate.control=oracle",
        "--log.diagnose_every=10",
        "--loss.top_k=1",
    )
    run = open_run(tmp_path_factory.mktemp("wiring") / "run", config)
    for part in ("sample", "score"):
        do_part(run, part, ignore, never)
    return run


def dense(model, params, rows):
    """Log-probabilities ``[B, T, V]`` of a model in float64."""
    logits = forward(params, rows.tokens, model, positions=rows.positions, sequence_ids=rows.sequence_ids)
    z = np.asarray(logits, np.float64) / TEMPERATURE
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def of_ids(logprobs, ids):
    return np.take_along_axis(logprobs, np.asarray(ids), axis=-1)


def test_scores_are_log_probs_at_the_sampling_temperature(scored):
    batch = batch_of(scored.scored.read(0), scored.width)
    rows, signal, m = batch.rows, batch.signal, batch.rows.mask
    student, teacher = (
        dense(*model, rows) for model in ((scored.model, scored.base), (scored.teacher_model, scored.teacher))
    )
    assert m.sum() > 100
    for got, want in (
        (signal.old, of_ids(student, rows.targets[..., None])[..., 0]),
        (signal.again, of_ids(student, rows.targets[..., None])[..., 0]),
        (signal.teacher, of_ids(teacher, rows.targets[..., None])[..., 0]),
        (signal.teacher_entropy, -(np.exp(teacher) * teacher).sum(-1)),
        (signal.support_logprobs, -np.sort(-teacher[..., : scored.usable], -1)[..., :1]),
        (signal.student_old, -np.sort(-student[..., : scored.usable], -1)[..., :16]),
        (signal.student_teacher, of_ids(teacher, signal.student_ids)),
    ):
        np.testing.assert_allclose(got[m], want[m], atol=3e-5)
    outside = np.concatenate([r.score.teacher_outside_mass for r in scored.scored.read(0)])
    mass = 1 - np.exp(signal.support_logprobs.astype(np.float64)).sum(-1)
    np.testing.assert_allclose(outside, mass[m], atol=1e-6)
    assert outside.max() > 1e-5


GATES = {
    "newline, rms": (
        "--gate.segments=newline",
        "--gate.span_minimum=4",
        "--gate.span_maximum=9",
        "--gate.statistic=rms",
        "--gate.tau=2",
    ),
    "sequence scope": ("--gate.segments=block", "--gate.scope=sequence", "--gate.tau=0.5"),
}
LOSSES = {
    "ppo": ("--loss.clip_low=0.05", "--loss.clip_high=0.3", "--loss.dual_clip=1.5"),
    "is, recomputed": ("--loss.surrogate=is", "--loss.advantage=cur"),
    "top-K": ("--loss.kind=teacher_topk",),
}


@pytest.mark.parametrize(
    ("gate", "loss"),
    [
        ("newline, rms", "ppo"),
        ("sequence scope", "top-K"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(GATES, LOSSES)
            if case not in (("newline, rms", "ppo"), ("sequence scope", "top-K"))
        ),
    ],
)
def test_a_step_is_the_printed_formulas(scored, tmp_path, gate, loss):
    """Every reading of an update, from the models' dense log-probs and the float64 oracles."""
    config = tiny_config(f"--sampling.temperature={TEMPERATURE}", *GATES[gate], *LOSSES[loss])
    run = open_run(tmp_path / "run", config)
    rollouts = [scored.scored.read(0)[i] for i in minibatch_plan(config, 0)[1]]
    batch = batch_of(rollouts, run.width)
    # Drift, as if the policy had moved: far enough for both clips.
    rng = np.random.default_rng(0)
    old = (batch.signal.old - rng.normal(0, 0.3, batch.signal.old.shape)).astype(np.float32)
    batch = batch.replace(signal=batch.signal.replace(old=old))
    rows, signal, m = batch.rows, batch.signal, batch.rows.mask
    with jax.set_mesh(run.mesh):
        _, readings = run.train_step(run.state, batch, {})
    told = {name: float(a) / float(b) for name, (a, b) in readings.sums.items()}
    told |= {name: float(value) for name, value in readings.whole.items()}

    student = dense(run.model, run.base, rows)
    cur = of_ids(student, rows.targets[..., None])[..., 0]
    if "newline" in gate:
        lines = newline_table(run.tokenizer, run.model.vocab_size)[rows.targets]
        segments = np.asarray(newline_spans(lines, m, minimum=4, maximum=9))
    else:
        segments = np.asarray(readings.segments)
    np.testing.assert_array_equal(readings.segments, segments)
    tau, statistic, scope = config.gate.tau, config.gate.statistic, config.gate.scope
    w = gates.drift_gate(cur, old, m, segments, tau=tau, statistic=statistic, scope=scope)
    np.testing.assert_allclose(readings.weights, w * m, rtol=1e-3, atol=1e-4)
    if loss == "top-K":
        base = losses.topk(of_ids(student, signal.support_ids), signal.support_logprobs)
    elif loss == "ppo":
        base = losses.sampled_token(cur, old, signal.teacher, "ppo", "old", low=0.05, high=0.3, dual=1.5)
    else:
        base = losses.sampled_token(cur, old, signal.teacher, "is", "cur")
    rho = np.exp(cur - old)[m]
    low, high = (0.05, 0.3) if loss == "ppo" else (0.2, 0.2)
    want = {
        "loss": (w * base)[m].sum() / m.sum(),
        "drift_abs": np.abs(cur - old)[m].mean(),
        "clip_fraction": ((rho < 1 - low) | (rho > 1 + high)).mean(),
        "entropy": -(np.exp(student) * student).sum(-1)[m].mean(),
        "student_support_mass": np.exp(of_ids(student, signal.support_ids)).sum(-1)[m].mean(),
        "teacher_support_mass": np.exp(signal.support_logprobs).sum(-1)[m].mean(),
        "weight_max": w[m].max(),
    }
    for name, expected in want.items():
        np.testing.assert_allclose(told[name], expected, rtol=2e-3, atol=2e-5, err_msg=name)


def test_the_gradient_is_clipped_to_its_norm(scored, tmp_path):
    """With plain descent in Adam's place impossible, a clip so low that the first step is far from lr."""
    moved = []
    for clip in ("1e-12", "1"):
        config = tiny_config(f"--optimizer.clip_norm={clip}", "--optimizer.weight_decay=0")
        run = open_run(tmp_path / clip, config)
        batch = batch_of([scored.scored.read(0)[i] for i in minibatch_plan(config, 0)[0]], run.width)
        with jax.set_mesh(run.mesh):
            state, _ = run.train_step(run.state, batch, {})
        steps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, run.base)
        moved.append(max(jax.tree.leaves(steps)))
    # Adam divides by |g| + eps: a gradient far below eps moves by less than lr, a clipped one by lr.
    assert moved[0] < 1e-3 * moved[1]


@pytest.mark.parametrize("temperature", [1.5, pytest.param(3.0, marks=pytest.mark.slow)])
def test_evaluation_draws_by_its_own_settings(tmp_path, temperature):
    config = tiny_config(
        "--sampling.temperature=1.3",
        "--sampling.top_p=0.5",
        f"--evaluation.temperature={temperature}",
        "--evaluation.top_p=0.95",
        "--evaluation.seed=5",
    )
    run = open_run(tmp_path / "run", config)
    answers = []
    evaluate_run(run, "base", answers.append, never)
    sampler = make_sampler(
        run.model,
        slots=16,
        max_prompt=16,
        max_response=40,
        temperature=temperature,
        top_p=0.95,
        usable=len(run.tokenizer),
    )
    requests = [
        Request(encode_prompt(run.tokenizer, problem.prompt), problem.key, number)
        for problem in run.heldout
        for number in range(2)
    ]
    drawn = sample(sampler, run.base, requests, stream(5, "evaluate"))
    want = [run.tokenizer.decode(g.ids.tolist(), skip_special_tokens=True) for g in drawn]
    assert [answer.response for answer in answers] == want
    assert len({answer.problem for answer in answers}) == 6
    assert len(set(want)) > 6
