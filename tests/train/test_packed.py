"""Rollouts that share rows: the update is that of rows of their own, and none sees its neighbour."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from opd_jax.errors import InputError
from opd_jax.model.kernels import choose_kernel
from opd_jax.rollout.rows import gather
from opd_jax.rollout.score import batch_of
from opd_jax.train.collect import minibatch_plan, parts_of_round
from opd_jax.train.computing import kernel_of
from opd_jax.train.layout import SHAPES, layout, parts_of
from opd_jax.train.loop import distill, do_part
from opd_jax.train.metrics import read_lines
from opd_jax.train.opening import open_run
from opd_jax.train.run import Run
from opd_jax.train.step import init_state
from tests.conftest import tiny_config
from tests.train.conftest import ignore, never

# Rows that hold two rollouts and more: the lab's answers have some thirty tokens.
LONG = "--sampling.max_response=90"
WHOLE = ("--schedule.rounds=1", "--schedule.minibatches=1", LONG)
PACKED = (*WHOLE, "--schedule.rows=packed")


def cut(rollout, length):
    """A rollout that ends early."""
    score = {name: None if x is None else x[:length] for name, x in vars(rollout.score).items()}
    return dataclasses.replace(
        rollout,
        response_ids=rollout.response_ids[:length],
        behaviour_logprobs=rollout.behaviour_logprobs[:length],
        score=dataclasses.replace(rollout.score, **score),
    )


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """A run, and its scored rollouts cut to lengths of 1 to 30, as if the policy had moved since."""
    everything = (
        "--loss.top_k=16",
        "--weights.members=[prune]",
        "--log.diagnose_every=10",
        "--loss.terms=[reference_kl]",
        "--loss.kl_weight=1",
    )
    run = open_run(tmp_path_factory.mktemp("packed") / "run", tiny_config(*WHOLE, *everything))
    for part in ("sample", "score"):
        do_part(run, part, ignore, never)
    rng = np.random.default_rng(0)
    rollouts = []
    for number, rollout in enumerate(run.scored.read(0)):
        drift = rng.normal(0, 0.3, rollout.response_ids.shape).astype(np.float32)
        score = dataclasses.replace(
            rollout.score,
            old_logprobs=rollout.score.old_logprobs - drift,
            teacher_logprobs=rollout.score.teacher_logprobs - np.abs(drift),
            teacher_entropy=rng.uniform(0, 1.6, drift.shape).astype(np.float32),
        )
        moved = dataclasses.replace(rollout, score=score, reward=float(number % 3 == 0))
        rollouts.append(cut(moved, 1 + (7 * number) % 30))
    return run, rollouts


KINDS = {
    "drift gate": ("--gate.block=4", "--gate.tau=2"),
    "means by sequence": (
        "--gate.segments=cusum",
        "--gate.span_minimum=2",
        "--gate.scope=sequence",
        "--loss.reduction=seq_mean_token_mean",
        "--weights.members=[scope_opd,f_opd,popd]",
        "--weights.f_opd_rate=1",
        "--weights.f_opd_threshold=0.1",
        "--weights.popd_start=12",
        "--weights.popd_growth=0",
        "--weights.popd_every=1",
    ),
    "family": (
        "--gate.segments=newline",
        "--gate.span_minimum=2",
        "--gate.control=position_mean",
        "--weights.members=[prune,tip,fire_opd,iw_opd]",
        "--loss.kind=teacher_topk_tail",
    ),
}


def updated(run, config, batch):
    """The clipped gradient, as AdamW's first moment holds it after one step, and the readings."""
    stepping = Run(run.folder, config)
    state = init_state(jax.tree.map(jnp.copy, run.base), run.optimizer)
    with jax.set_mesh(run.mesh):
        state, readings = stepping.train_step(state, batch, {})
    moments = [
        x.mu for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")
    ]
    return moments[0], readings


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_update_is_the_padded_one(ragged, kind):
    run, rollouts = ragged
    count = 2 if kind == "drift gate" else 1  # packed rows in micro-batches too
    settings = ("--optimizer.clip_norm=1e6", *KINDS[kind])
    padded = batch_of(rollouts, run.width, staleness=1)
    config = tiny_config(*PACKED, f"--schedule.microbatches={count}", *settings)
    order, counts = layout(config, np.arange(len(rollouts)), rollouts, run.width)
    assert len(counts) < len(rollouts)
    assert max(counts) > 2
    packed = batch_of([rollouts[i] for i in order], run.width, counts=counts, staleness=1)

    want_gradient, want = updated(run, tiny_config(*WHOLE, *settings), padded)
    gradient, got = updated(run, config, packed)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
    for name, (total, of) in want.sums.items():
        told = [float(x) for x in got.sums[name]]
        np.testing.assert_allclose(told, [total, of], rtol=2e-5, atol=1e-5, err_msg=name)
    for name, counts in want.histograms.items():
        assert np.abs(np.asarray(got.histograms[name]) - counts).sum() <= 2  # one on an edge, by rounding
    # Token by token: weights and segment borders are those that the rollout has in a row of its own.
    for name in ("weights", "segments"):
        theirs = gather(getattr(want, name), padded.rows.mask)
        ours = gather(getattr(got, name), packed.rows.mask, packed.rows.sequence_ids)
        for place, index in enumerate(order):
            a, b = ours[place], theirs[index]
            if name == "segments":
                a, b = a - a.min(), b - b.min()
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=f"{name} of {index}")
    assert float(np.std(np.asarray(want.weights)[padded.rows.mask])) > 1e-2


def test_a_packed_run_starts_every_round_without_drift_and_trains_as_a_padded_one(tmp_path):
    lines, runs = {}, {}
    for rows in ("padded", "packed"):
        config = tiny_config(f"--schedule.rows={rows}", LONG, "--log.diagnose_every=3", "--log.rows=3")
        run = runs[rows] = open_run(tmp_path / rows, config)
        distill(run, ignore, never)
        lines[rows] = read_lines(run.metrics_file)
    for line, want in zip(lines["packed"], lines["padded"], strict=True):
        assert line["tokens"] == want["tokens"]
        if line["pass"] == line["minibatch"] == 0:
            assert line["drift_max"] == 0.0
            assert line["weight_min"] == line["weight_max"] == 1.0
        else:
            assert line["drift_max"] > 1e-4
    for name in ("loss", "gradient_norm", "entropy"):
        first, want = lines["packed"][0][name], lines["padded"][0][name]
        assert first == pytest.approx(want, rel=1e-4, abs=1e-6), name
    packed, padded = (runs[rows].scored.read(0) for rows in ("packed", "padded"))
    for a, b in zip(packed, padded, strict=True):
        for name in ("old_logprobs", "again_logprobs", "teacher_logprobs", "teacher_topk_logprobs"):
            np.testing.assert_allclose(getattr(a.score, name), getattr(b.score, name), atol=2e-5)
    _, counts = layout(config, minibatch_plan(config, 0)[0], packed, run.width)
    assert max(counts) > 1
    # The token view shows the same rollouts, each with its own segments from 0.
    tables = [pq.read_table(next((runs[rows].folder / "tokens").iterdir())).to_pylist() for rows in runs]
    for a, b in zip(*tables, strict=True):
        assert a["response_ids"] == b["response_ids"]
        assert a["segments"] == b["segments"]
        assert len(a["drift"]) == len(a["response_ids"])
        np.testing.assert_allclose(a["weights"], b["weights"], atol=0.1)


def test_what_is_computed_together_is_what_the_step_splits(ragged):
    run, rollouts = ragged
    config = tiny_config("--schedule.rounds=1", "--schedule.rows=packed", "--schedule.microbatches=2")
    parts = parts_of_round(config, 0, rollouts, run.width)
    assert len(parts) == 4
    assert sorted(np.concatenate([part.order for part in parts])) == list(range(len(rollouts)))
    for minibatch, chosen in enumerate(minibatch_plan(config, 0)):
        order, counts = layout(config, chosen, rollouts, run.width)
        whole = batch_of([rollouts[i] for i in order], run.width, counts=counts).rows
        for number, part in enumerate(parts[2 * minibatch : 2 * minibatch + 2]):
            rows = batch_of([rollouts[i] for i in part.order], run.width, counts=part.counts).rows
            for a, b in zip(jax.tree.leaves(rows), jax.tree.leaves(whole), strict=True):
                np.testing.assert_array_equal(a, b[number::2])


def test_padded_parts_are_as_they_were():
    config = tiny_config("--schedule.microbatches=2")
    plan = minibatch_plan(config, 0)
    parts = parts_of_round(config, 0, [], 9)
    np.testing.assert_array_equal(
        [part.order for part in parts], np.concatenate([[c[::2], c[1::2]] for c in plan])
    )
    assert all((part.counts == 1).all() for part in parts)


@pytest.mark.parametrize(("mesh", "microbatches"), [(1, 1), (2, 2), (4, 1)])
def test_packed_rows_split_and_have_few_numbers(ragged, mesh, microbatches):
    _, rollouts = ragged
    many = [rollouts[i % len(rollouts)] for i in range(64)]
    config = tiny_config(
        *PACKED,
        "--sampling.prompts=16",
        f"--mesh.data={mesh}",
        f"--schedule.microbatches={microbatches}",
    )
    seen = set()
    for width in range(46, 300, 6):
        order, counts = layout(config, np.arange(64), many, width)
        assert sorted(order) == list(range(64))
        assert counts.sum() == 64
        assert len(counts) % (mesh * microbatches) == 0
        seen.add(len(counts))
        assert (
            sum(len(p.order) for p in parts_of(layout(config, np.arange(64), many, width), microbatches))
            == 64
        )
    assert 2 < len(seen) <= SHAPES
    assert max(seen) <= 64


def test_the_kernel_is_told_that_rows_are_packed(ragged, monkeypatch):
    run, _ = ragged
    asked = []
    monkeypatch.setattr(
        "opd_jax.train.computing.choose_kernel",
        lambda *a, **k: asked.append(k["packed"]) or choose_kernel(*a, **k),
    )
    for rows in ("padded", "packed"):
        assert kernel_of(run.model, tiny_config(f"--schedule.rows={rows}"), run.mesh).name == "xla"
    assert asked == [False, True]
    gpu = dict(platform="gpu", dtype="bfloat16", length=128, head_dim=128, compute_capability="9.0")
    assert choose_kernel("auto", packed=True, **gpu).name == "xla"
    with pytest.raises(InputError, match="got packed rows"):
        choose_kernel("cudnn", packed=True, **gpu)
