"""Rollouts that share rows: the update is that of rows of their own, and none sees its neighbour."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from opd_jax.errors import InputError
from opd_jax.method import objective
from opd_jax.model.kernels import choose_kernel
from opd_jax.rollout import Rollout, Score
from opd_jax.rollout.rows import gather, lengths_of, pack
from opd_jax.rollout.score import batch_of, make_scorer, rows_of
from opd_jax.train.choices import SEGMENTS, base_loss, gate_options
from opd_jax.train.collect import minibatch_plan
from opd_jax.train.computing import kernel_of
from opd_jax.train.fields import read_fields
from opd_jax.train.identity import params_digest
from opd_jax.train.layout import SHAPES, layout, parts_of
from opd_jax.train.loop import distill, do_part
from opd_jax.train.metrics import read_lines
from opd_jax.train.opening import open_run
from opd_jax.train.run import Run
from opd_jax.train.scoring import parts_of_round
from opd_jax.train.step import init_state
from tests.conftest import tiny_config
from tests.train.conftest import ignore, never

WHOLE = ("--schedule.rounds=2", "--schedule.minibatches=1", "--optimizer.clip_norm=1e6", "--gate.block=4")
PACKED = (*WHOLE, "--schedule.rows=packed")


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """A run, and scored rollouts of 1 to 29 tokens, as if the policy had moved since they were drawn."""
    run = open_run(tmp_path_factory.mktemp("packed") / "run", tiny_config(*WHOLE))
    rng = np.random.default_rng(0)
    drawn = [
        Rollout(
            round=0,
            problem=f"p{number // 4}",
            sample=number,
            prompt_ids=rng.integers(1, run.usable, 8 + number % 5).astype(np.int32),
            response_ids=rng.integers(1, run.usable, 1 + 7 * number % 29).astype(np.int32),
            behaviour_logprobs=np.zeros(1 + 7 * number % 29, np.float32),
            truncated=False,
            reward=float(number % 3 == 0),
        )
        for number in range(16)
    ]
    rows = rows_of(drawn, run.width)
    cur = gather(make_scorer(run.model, temperature=1.0)(run.base, rows), rows.mask)

    def score(cur):
        noise = lambda *k: rng.normal(0, 0.3, (len(cur), *k)).astype(np.float32)  # noqa: E731
        ids = lambda k: np.array([rng.permutation(run.usable)[:k] for _ in cur], np.int32)  # noqa: E731
        nats = lambda k: np.sort(-2 - np.abs(noise(k)))[:, ::-1] - np.float32(np.log(k))  # noqa: E731
        return Score(
            old_logprobs=cur - noise(),
            teacher_logprobs=cur + np.abs(noise()),
            teacher_entropy=np.abs(noise()),
            teacher_topk_ids=ids(16),
            teacher_topk_logprobs=nats(16),
            teacher_outside_mass=np.abs(noise()),
            again_logprobs=cur - noise(),
            reference_logprobs=cur - noise(),
            student_topk_ids=ids(16),
            student_topk_logprobs=nats(16),
            student_topk_teacher_logprobs=nats(16),
        )

    return run, [dataclasses.replace(x, score=score(c)) for x, c in zip(drawn, cur, strict=True)]


def both(run, rollouts, rows=None):
    """The rollouts in rows of their own, packed into a number of rows, and which lies where."""
    order, counts = pack(
        lengths_of(*zip(*((r.prompt_ids, r.response_ids) for r in rollouts), strict=True)), run.width, rows
    )
    assert max(counts) > 2
    packed = batch_of([rollouts[i] for i in order], run.width, counts=counts, staleness=1)
    return batch_of(rollouts, run.width, staleness=1), packed, order


def same_tokens(got, want, packed, padded, order, **tolerance):
    """Assert that every token has the value that it has in a row of its own."""
    ours = gather(got, packed.rows.mask, packed.rows.sequence_ids)
    theirs = gather(want, padded.rows.mask)
    for place, index in enumerate(order):
        np.testing.assert_allclose(ours[place], theirs[index], err_msg=f"rollout {index}", **tolerance)


def same_borders(got, want, packed, padded, order):
    first = lambda x: x - np.maximum(np.where(x < 0, np.inf, x).min(), 0)  # noqa: E731
    ours = gather(got, packed.rows.mask, packed.rows.sequence_ids)
    theirs = gather(want, padded.rows.mask)
    for place, index in enumerate(order):
        np.testing.assert_array_equal(first(ours[place]), first(theirs[index]))
    last = [x.max() for x in ours]
    for place in range(1, len(order)):  # in one row a neighbour's segments are others
        if ours[place].min() > 0:
            assert ours[place].min() == last[place - 1] + 1


def test_a_packed_step_is_the_padded_one(ragged):
    """The step that trains: fewer rows, and those in micro-batches."""
    run, rollouts = ragged
    parted = tiny_config(*PACKED, "--schedule.microbatches=2")
    rows = len(layout(parted, np.arange(16), rollouts, run.width).counts)
    assert rows < 12
    padded, packed, order = both(run, rollouts, rows)

    def step(batch, config):
        stepping = Run(run.folder, config)
        state = init_state(jax.tree.map(jnp.copy, run.base), run.optimizer)
        with jax.set_mesh(run.mesh):
            state, readings = stepping.train_step(state, batch, {})
        # AdamW's first moment after one step is the gradient, times 1 - b1.
        states = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        return next(x.mu for x in states if hasattr(x, "mu")), readings

    want_gradient, want = step(padded, run.config)
    gradient, got = step(packed, parted)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
        assert float(jnp.abs(b).max()) > 1e-6
    for name, (total, count) in want.sums.items():
        told = [float(x) for x in got.sums[name]]
        np.testing.assert_allclose(told, [total, count], rtol=1e-5, atol=1e-5, err_msg=name)
    for name, value in want.whole.items():
        np.testing.assert_allclose(got.whole[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for name, bins in want.histograms.items():
        assert np.abs(np.asarray(got.histograms[name]) - bins).sum() <= 2  # one on an edge, by rounding
    same_tokens(got.weights, want.weights, packed, padded, order, rtol=1e-4)
    same_borders(np.asarray(got.segments), np.asarray(want.segments), packed, padded, order)
    assert float(np.std(np.asarray(want.weights)[padded.rows.mask])) > 1e-2


# Losses, weights, segments and scopes that look beyond a token. What is drawn at random (shuffled, random,
# trust_region) has other draws in other rows, and is left out.
KINDS = {
    "blocks": ("--gate.block=4", "--gate.target_ratio=0.8", "--loss.kind=student_topk"),
    "lines": (
        "--gate.segments=newline",
        "--gate.span_minimum=2",
        "--gate.span_chunk=3",
        "--gate.control=position_mean",
    ),
    "cusum": (
        "--gate.segments=cusum",
        "--gate.span_minimum=2",
        "--gate.cusum_limit=1",
        "--gate.scope=sequence",
    ),
    "sequences": (
        "--gate.segments=sequence",
        "--loss.reduction=seq_mean_token_mean",
        "--gate.control=disagreement",
    ),
    "family": (
        "--gate.segments=token",
        "--weights.members=[prune,tip,fire_opd,iw_opd]",
        "--loss.kind=teacher_topk_tail",
    ),
    "groups": (
        "--weights.members=[scope_opd,f_opd,popd]",
        "--weights.f_opd_rate=1",
        "--weights.f_opd_threshold=0.1",
        "--weights.popd_start=12",
        "--weights.popd_growth=0",
        "--weights.popd_every=1",
        "--loss.kind=scope",
        "--loss.terms=[entropy_aware,reference_kl]",
        "--loss.kl_weight=0.1",
    ),
}


@pytest.fixture(scope="module")
def fields(ragged):
    """What a step reads of the rollouts in rows of their own, and packed; one program, with empty rows."""
    run, rollouts = ragged
    *batches, order = both(run, rollouts, rows=len(rollouts))
    config, newline = tiny_config("--gate.segments=none"), jnp.zeros(run.model.vocab_size, bool)
    read = jax.jit(lambda params, batch: read_fields(params, batch, config, run.model, newline, {}))
    told = [read(run.base, batch) | {"step": jnp.asarray(3)} for batch in batches]
    return batches, told, order


@pytest.mark.parametrize("kind", KINDS)
def test_no_loss_weight_or_segment_sees_a_neighbour(fields, kind):
    (padded, packed), told, order = fields
    config = tiny_config(*KINDS[kind])
    newline = jnp.arange(64) % 5 == 0
    found = []
    for batch, read in zip((padded, packed), told, strict=True):
        d = jnp.where(batch.rows.mask, read["cur"] - read["old"], 0.0)
        read = {**read, "segments": SEGMENTS[config.gate.segments](batch.rows, config.gate, newline, d)}

        def value(cur, read=read):
            read = {**read, "cur": cur}
            arrays = (read[name] for name in ("cur", "old", "mask"))
            options = gate_options(config, read)
            result = objective(
                *arrays, base_loss(config, read), read["segments"], reduction=config.loss.reduction, **options
            )
            return result.loss, (result.weights, read["segments"])

        (loss, (weights, segments)), gradient = jax.value_and_grad(value, has_aux=True)(read["cur"])
        found.append((loss, weights, gradient, np.asarray(segments)))
    (want, *theirs, their_segments), (got, *ours, our_segments) = found
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        same_tokens(a, b, packed, padded, order, rtol=1e-4, atol=1e-6)
    same_borders(our_segments, their_segments, packed, padded, order)
    assert float(np.std(np.asarray(theirs[0])[padded.rows.mask])) > 1e-2


def test_a_packed_round_starts_without_drift(ragged, tmp_path):
    """Two rounds of the same rollouts, by way of the store."""
    config = tiny_config(*PACKED, "--schedule.microbatches=2", "--log.rows=3")
    run = open_run(tmp_path / "run", config)
    drawn = [dataclasses.replace(rollout, score=None) for rollout in ragged[1]]
    for round_ in (0, 1):
        run.rollouts.append([dataclasses.replace(rollout, round=round_) for rollout in drawn])
        policy = params_digest(run.state.params)
        run.rollouts.seal(round_, update=int(run.state.update), policy=policy)
        for part in ("score", "train"):
            do_part(run, part, ignore, never)
    lines = read_lines(run.metrics_file)
    assert [line["update"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert line["tokens"] == sum(len(rollout.response_ids) for rollout in drawn)
        if line["pass"] == 0:
            assert line["drift_max"] == 0.0
            assert line["weight_min"] == line["weight_max"] == 1.0
        else:
            assert line["drift_max"] > 1e-4
    # Scores are those that rows of their own give: that policy's, which the first of these is.
    rows = rows_of(drawn, run.width)
    old = gather(make_scorer(run.model, temperature=1.0)(ragged[0].base, rows), rows.mask)
    for rollout, want in zip(run.scored.read(0), old, strict=True):
        np.testing.assert_allclose(rollout.score.old_logprobs, want, atol=2e-5)
    # The token view shows the rollouts that it would show of padded rows, each with segments of its own.
    [first, _] = sorted((run.folder / "tokens").iterdir())
    for row, index in zip(pq.read_table(first).to_pylist(), minibatch_plan(config, 0)[0][:3], strict=True):
        length = len(drawn[index].response_ids)
        assert row["response_ids"] == drawn[index].response_ids.tolist()
        assert row["segments"] == [t // 4 for t in range(length)]
        assert len(row["drift"]) == len(row["weights"]) == length


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("--mesh.data=2",)])
def test_a_packed_run_is_a_run(tmp_path, mesh):
    # Rows that hold two answers and more: the lab's have some thirty tokens.
    long = ("--sampling.max_response=90", "--schedule.rounds=2", "--log.diagnose_every=4", "--log.rows=3")
    config = tiny_config(*long, "--schedule.rows=packed", "--schedule.microbatches=2", *mesh)
    run = open_run(tmp_path / "run", config)
    distill(run, ignore, never)
    rollouts = run.scored.read(1)
    assert max(layout(config, minibatch_plan(config, 1)[0], rollouts, run.width).counts) > 1
    lines = read_lines(run.metrics_file)
    for line in lines:
        first = line["pass"] == line["minibatch"] == 0
        if first:  # over devices sums are taken in another order
            assert line["drift_max"] <= (1e-5 if mesh else 0.0)
        else:
            assert line["drift_max"] > 1e-4
    assert lines[3]["diagnosis"]["null_drift_max"] < 1e-4 < lines[3]["drift_max"]
    assert run.scored.shard(1)["null_drift"]["max"] < 1e-4


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
