"""An update in parts, packed into fewer devices or mapped over them, is the same update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.method import WEIGHTS, fixed_blocks, objective
from opd_jax.rollout.score import batch_of
from opd_jax.train.choices import LOSSES, TERMS, base_loss, gate_options
from opd_jax.train.diagnose import null_readings
from opd_jax.train.fields import drawn_fields, read_fields
from opd_jax.train.gradient import gradient_of
from opd_jax.train.loop import do_part
from opd_jax.train.microbatches import gradient_in_parts, join, split
from opd_jax.train.opening import open_run
from opd_jax.train.replicated import AXIS, pmap_step, shard_map_step
from opd_jax.train.step import init_state
from tests.conftest import tiny_config
from tests.oracle import gates as oracle
from tests.oracle import weights as weights_oracle
from tests.train.conftest import ignore, never

# Weights that micro-batches add up in one sweep (the first two), and those that take two. Each is a
# compilation or two, so settings that do not touch each other share one.
KINDS = {
    "drift gate": (),
    "sharp": ("--gate.tau=30", "--gate.statistic=rms", "--loss.kind=teacher_topk_tail"),
    "per sequence": ("--gate.scope=sequence", "--loss.reduction=seq_mean_token_mean"),
    "bounded": ("--gate.clip=[0.8,1.1]", "--gate.residual=0.7", "--gate.target_ratio=0.9"),
    "family": (
        "--weights.members=[prune,tip,fire_opd,iw_opd]",
        "--gate.control=shuffled",
        "--gate.segments=token",
    ),
    "groups": (
        "--loss.kind=scope",
        "--loss.terms=[entropy_aware,trust_region,reference_kl]",
        "--loss.kl_weight=0.1",
        "--weights.members=[scope_opd]",
        "--weights.scope_opd_temperature=0.01",
        "--gate.segments=none",
    ),
    "signs": (
        "--loss.kind=sign_gated",
        "--weights.members=[sg_opd]",
        "--weights.sg_opd_tau=1",
        "--gate.control=oracle",
    ),
    "student support": (
        "--loss.kind=student_topk",
        "--gate.control=noise",
        "--gate.segments=cusum",
        "--gate.span_minimum=2",
    ),
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """One round with every column that anything may ask for."""
    everything = (
        "--weights.members=[prune]",
        "--loss.top_k=16",
        "--loss.terms=[reference_kl]",
        "--loss.kl_weight=1",
    )
    config = tiny_config(
        "--schedule.rounds=1", "--schedule.minibatches=1", "--log.diagnose_every=10", *everything
    )
    run = open_run(tmp_path_factory.mktemp("parts") / "run", config)
    for part in ("sample", "score"):
        do_part(run, part, ignore, never)
    batch = batch_of(run.scored.read(0), run.width)
    rng = np.random.default_rng(0)
    moved = [rng.normal(0, 0.2, x.shape).astype(np.float32) for x in (batch.signal.old, batch.signal.again)]
    signal, shape = batch.signal, batch.signal.old.shape
    # A teacher that is often unsure, would refuse many tokens, and has other favourites here and there.
    other = rng.integers(0, 12, (*shape, 1))
    return run, batch.replace(
        signal=signal.replace(
            teacher=signal.teacher - rng.exponential(1, shape).astype(np.float32),
            teacher_entropy=rng.uniform(0, 1.6, shape).astype(np.float32),
            support_ids=(signal.support_ids + other) % run.usable,
            support_logprobs=signal.support_logprobs - np.float32(0.3),
            reference=signal.reference - moved[1],
            old=signal.old + moved[0],
            again=signal.again + moved[1],
            student_old=signal.student_old - np.abs(moved[0])[..., None],
            reward=np.broadcast_to(rng.integers(2, size=(shape[0], 1)), shape),
        )
    )


def close(got, want, rtol=1e-5):
    """Every array equal up to its own size times ``rtol``."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(np.abs(b).max(), 1e-6))


ALONE = {
    "loss.kind": [kind for kind in LOSSES if kind != "sampled_token"],
    "loss.terms": TERMS,
    "weights.members": WEIGHTS,
}


@pytest.fixture(scope="module")
def read(scored):
    """The fields of the batch as a plain gated step reads them."""
    run, batch = scored
    config, newline = tiny_config(), jnp.zeros(run.model.vocab_size, bool)
    fields = jax.jit(lambda p, b: read_fields(p, b, config, run.model, newline, {}))(run.base, batch)
    return fields | drawn_fields(config, jnp.asarray(3), batch.rows.mask.shape)


def of(fields, *overrides):
    config = tiny_config(*overrides)
    arrays = [fields[name] for name in ("cur", "old", "mask")]
    base = base_loss(config, fields)
    return objective(*arrays, base, fields["segments"], **gate_options(config, fields))


@pytest.mark.parametrize(("setting", "name"), [(s, name) for s, names in ALONE.items() for name in names])
def test_every_loss_term_and_weight_does_something_to_the_batch(read, setting, name):
    """Or the comparisons below would hold of anything."""
    constants = (
        "--loss.kl_weight=0.1 --weights.sg_opd_tau=1 --weights.popd_start=9 --weights.popd_growth=1 "
        "--weights.popd_every=1 --weights.f_opd_rate=1 --weights.f_opd_threshold=0.1"
    ).split()
    plain = of(read, *constants)
    value = name if setting == "loss.kind" else f"[{name}]"
    changed = of(read, *constants, f"--{setting}={value}")
    assert abs(changed.loss - plain.loss) > 1e-4
    if setting == "weights.members":
        assert float(jnp.abs(changed.weights - plain.weights).max()) > 1e-2
    if name == "trust_region":
        kept = read["noise"] < jnp.exp(read["tea"] - read["cur"])
        assert 0.1 < float(kept[read["mask"]].mean()) < 0.9


def test_a_micro_batch_may_be_the_scope_of_its_weights(scored):
    """The one scope whose value changes with micro-batching: each part is gated by itself."""
    run, batch = scored
    newline = jnp.zeros(run.model.vocab_size, bool)
    told = {}
    for count in (1, 4):
        config = tiny_config(
            "--schedule.minibatches=1",
            f"--schedule.microbatches={count}",
            "--gate.scope=microbatch",
            "--weights.members=[tip]",
        )
        function = gradient_of if count == 1 else gradient_in_parts
        told[count] = jax.jit(
            lambda p, b, f=function, c=config: f(p, b, jnp.asarray(3), c, run.model, newline, {})
        )(run.base, batch)[1]
    mask = batch.rows.mask
    whole, parts = (np.asarray(told[count].weights) for count in (1, 4))
    np.testing.assert_allclose(whole.sum(), mask.sum(), rtol=1e-5)
    for part in range(4):
        rows = np.s_[part::4]
        np.testing.assert_allclose(parts[rows].sum(), mask[rows].sum(), rtol=1e-5)
        kept = (parts[rows] > 0).sum()
        assert abs(kept - mask[rows].sum() / 2) <= 2  # tip keeps half of each part
    assert np.abs(whole - parts).max() > 1e-2
    assert float(told[4].whole["loss"]) != pytest.approx(float(told[1].whole["loss"]), rel=1e-4)


@pytest.mark.parametrize(
    "gate",
    [
        (),
        ("--gate.residual=0.6",),
        ("--weights.members=[iw_opd]",),
        ("--weights.members=[token_is,iw_opd]", "--gate.segments=none"),
        ("--gate.control=inverse",),
    ],
)
def test_the_null_reading_is_the_gate_that_is_asked_for(scored, read, gate):
    run, batch = scored
    config, newline = tiny_config("--gate.tau=5", *gate), jnp.zeros(run.model.vocab_size, bool)
    told = null_readings(batch, config, read, newline)
    signal, mask = batch.signal, batch.rows.mask
    w = mask.astype(float)
    if config.gate.segments != "none":
        segments = np.asarray(fixed_blocks(mask, 8))
        w = oracle.gate(signal.again, signal.old, mask, segments, tau=5.0)
        if config.gate.control == "inverse":
            w = np.where(mask, 1 / np.where(mask, w, 1), 0)
    if "iw_opd" in config.weights.members:
        w *= weights_oracle.iw_opd(signal.old, signal.teacher, mask, 1.5)
    if "token_is" in config.weights.members:
        w *= weights_oracle.token_is(signal.again, signal.old, mask, 0.0, 2.0)
    w = oracle.normalise(w, mask)
    w = 1 - config.gate.residual + config.gate.residual * w[mask]
    got = [float(told[f"null_weight_{end}"][0]) for end in ("min", "max")]
    np.testing.assert_allclose(got, [w.min(), w.max()], rtol=1e-4)
    assert w.max() - w.min() > 0.1


def test_a_null_gate_may_act_on_rounding_alone(scored, read):
    """With a target ratio it always does, which is what its noise floor has to say."""
    run, batch = scored
    newline = jnp.zeros(run.model.vocab_size, bool)
    low, high = (
        float(null_readings(batch, tiny_config(*gate), read, newline)["null_weight_max"][0])
        for gate in ((), ("--gate.target_ratio=0.3",))
    )
    assert high > 2 * low
    clipped = null_readings(batch, tiny_config("--gate.tau=9", "--gate.clip=[0.9,1.1]"), read, newline)
    assert float(clipped["null_weight_max"][0]) == pytest.approx(1.1)


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("drift gate", "family", "signs") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_parts_are_the_whole(scored, kind):
    run, batch = scored
    newline = jnp.zeros(run.model.vocab_size, bool)

    def compute(count):
        config = tiny_config("--schedule.minibatches=1", f"--schedule.microbatches={count}", *KINDS[kind])
        function = gradient_of if count == 1 else gradient_in_parts
        return jax.jit(lambda p, b: function(p, b, jnp.asarray(3), config, run.model, newline, {}))(
            run.base, batch
        )

    gradient, readings = compute(1)
    assert max(jax.tree.leaves(jax.tree.map(lambda x: float(jnp.abs(x).max()), gradient))) > 1e-4
    if "segments=none" not in " ".join(KINDS[kind]):
        assert float(np.std(np.asarray(readings.weights)[batch.rows.mask])) > 1e-3
    for count in (2, 8) if kind == "drift gate" else (4,):
        in_parts, told = compute(count)
        # The tail bucket is what 1 - sum leaves of float32 digits.
        close(in_parts, gradient, rtol=6e-5 if "topk_tail" in " ".join(KINDS[kind]) else 3e-5)
        close(told.weights, readings.weights)
        loss, want = (float(r.whole["loss"]) for r in (told, readings))
        np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)


def test_parts_take_rows_in_turn():
    x = np.arange(12).reshape(6, 2)
    parts = split(x, 3)
    np.testing.assert_array_equal(parts[1], x[[1, 4]])
    np.testing.assert_array_equal(join(parts), x)


@pytest.mark.parametrize(
    ("kind", "devices"),
    [
        ("drift gate", 8),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("drift gate", 1), ("drift gate", 2), ("family", 8), ("groups", 8))
        ),
    ],
)
def test_replicated_steps_are_the_step(scored, devices, kind):
    run, batch = scored
    config = tiny_config("--schedule.minibatches=1", *KINDS[kind])
    newline = np.zeros(run.model.vocab_size, bool)
    gradient, readings = jax.jit(
        lambda p, b: gradient_of(p, b, jnp.asarray(0), config, run.model, jnp.asarray(newline), {})
    )(run.base, batch)
    updates, _ = run.optimizer.update(gradient, run.optimizer.init(run.base), run.base)
    want = jax.tree.map(jnp.add, run.base, updates)
    state = lambda: init_state(jax.tree.map(jnp.copy, run.base), run.optimizer)  # noqa: E731

    mesh = jax.make_mesh(
        (devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    replicated = jax.device_put(state(), jax.NamedSharding(mesh, jax.P()))
    mapped, loss = shard_map_step(run.model, config, run.optimizer, newline, mesh)(replicated, batch)
    np.testing.assert_allclose(loss, readings.whole["loss"], rtol=1e-5)
    moved_alike(mapped.params, want)
    if devices == 8 and kind == "drift gate":
        copies = jax.tree.map(lambda x: np.broadcast_to(x, (devices, *np.shape(x))), state())
        parts = jax.tree.map(lambda x: np.reshape(x, (devices, -1, *x.shape[1:])), batch)
        mapped, loss = pmap_step(run.model, config, run.optimizer, newline)(copies, parts)
        np.testing.assert_allclose(loss, np.full(devices, readings.whole["loss"]), rtol=1e-5)
        moved_alike(jax.tree.map(lambda x: x[0], mapped.params), want)


def moved_alike(got, want):
    """Adam turns rounding of tiny gradients into steps of up to lr, 3e-3 here: almost all must agree."""
    differences = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).ravel(), got, want)
    assert np.quantile(np.concatenate(jax.tree.leaves(differences)), 0.999) < 1e-5
