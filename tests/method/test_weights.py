"""The wider family of weights: loops, literal numbers, and what holds of all of them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.method import (
    WEIGHTS,
    call,
    f_opd,
    fire_opd,
    iw_opd,
    masked_quantile,
    normalise,
    popd,
    prune,
    scope_opd,
    sg_opd,
    tip,
    token_is,
)
from tests.method.batches import (
    LENGTH,
    ROWS,
    SHAPE,
    close,
    compiled,
    few,
    fewer,
    fields,
    floats,
    nats,
    packings,
    typical,
)
from tests.method.checks import behind
from tests.oracle import weights as oracle
from tests.oracle.segments import sequences

# What the sources leave open, set to something.
OPTIONS = {name: {} for name in WEIGHTS} | {
    "sg_opd": {"tau": 0.5},
    "popd": {"start": 2, "growth": 1, "every": 2},
    "f_opd": {"rate": 0.5, "threshold": 0.1},
}
MEMBERS = [
    pytest.param(functools.partial(WEIGHTS[name], **options), id=name) for name, options in OPTIONS.items()
]
unit = typical(0, 1)
top_ids = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).permuted(np.ones((*SHAPE, 1), int) * np.arange(7), axis=-1)[
        ..., :4
    ]
)


@pytest.mark.parametrize("bounds", [(0.0, 2.0), (0.5, 1.5)])
@fewer
@given(nats, nats, packings())
def test_token_is_is_the_clipped_ratio(bounds, cur, old, packing):
    mask, _ = packing
    close(token_is(cur, old, mask, low=bounds[0], high=bounds[1]), oracle.token_is(cur, old, mask, *bounds))


@pytest.mark.parametrize("shares", [(0.5, 0.98), (0.25, 0.6), (1.0, 1.0)])
@fewer
@given(unit, unit, packings())
def test_tip_keeps_the_top_of_the_scores(shares, entropy, kl, packing):
    mask, _ = packing
    keep, clip = shares
    got = compiled(tip, keep=keep, clip_quantile=clip)(entropy, kl, mask)
    if mask.any():
        above = oracle.tip_distance(entropy, kl, mask, keep, clip)
        np.testing.assert_array_equal(np.where(abs(above) > 1e-6, got, above > 0), above > 0)  # but for ties


@few
@given(top_ids, top_ids, packings())
def test_prune_counts_where_the_models_have_parted(student, teacher, packing):
    mask, ids = packing
    constants = {"overlap": 0.5, "drop": 0.3, "base": 0.2}  # half in common is enough
    got = compiled(prune, **constants)(student, teacher, mask, sequence_ids=ids)
    close(got, oracle.prune(student, teacher, mask, **constants, sequence_ids=ids))


@few
@given(nats, nats | floats(-1e4, 0), packings())
def test_iw_opd_weighs_before_the_disagreement(old, tea, packing):
    mask, ids = packing
    for own in (None, ids):
        got = compiled(iw_opd, largest=1.7)(old, tea, mask, sequence_ids=own)
        close(got, oracle.iw_opd(old, tea, mask, 1.7, own))


def test_without_disagreement_no_step_of_iw_opd_is_nan():
    with jax.debug_nans(True):
        assert (iw_opd(jnp.zeros((2, 6)), jnp.zeros((2, 6)), jnp.ones((2, 6)), largest=1.5) == 1.5).all()


def test_prune_compares_sets_of_one_size():
    ids = jnp.ones((1, 2, 3), int)
    with pytest.raises(ValueError, match=r"of one size overlap by a share: got \(3, 2\)"):
        prune(ids, ids[..., :2], jnp.ones((1, 2)))


@pytest.mark.parametrize("tau", [0.3, 10.0])
@fewer
@given(nats, nats, packings())
def test_sg_opd_bounds_the_pull_of_a_token_and_has_mean_one_once_normalised(tau, old, tea, packing):
    mask, _ = packing
    w = np.asarray(compiled(sg_opd, tau=tau)(old, tea, mask))
    a = abs(tea.astype(float) - old)
    close(w, np.where(mask, np.where(a > tau, tau / np.where(a > 0, a, 1), 1), 0))
    np.testing.assert_allclose(np.sum(normalise(w, mask)), mask.sum(), rtol=1e-5)


@few
@given(packings(), st.integers(0, 30))
def test_popd_lets_the_horizon_grow(packing, step):
    mask, ids = packing
    constants = {"start": 1, "growth": 2, "every": 5}
    got = compiled(popd, **constants)(mask, step, sequence_ids=ids)
    np.testing.assert_array_equal(got, oracle.popd(mask, step, **constants, sequence_ids=ids))


@pytest.mark.parametrize("drop", [0.0, 0.2, 0.5])
@fewer
@given(typical(-4, 0), unit, unit, packings())
def test_fire_opd_drops_and_weighs(drop, tea, entropy, teacher_entropy, packing):
    mask, ids = packing
    if not mask.any():
        return
    options = {"drop": drop, "teacher_share": 0.7, "student_share": 0.4}
    got = compiled(fire_opd, **options)(tea, entropy, teacher_entropy, mask, sequence_ids=ids)
    close(got, oracle.fire_opd(tea, entropy, teacher_entropy, mask, drop, 0.7, 0.4, ids))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@few
@given(nats, nats, packings())
def test_scope_opd_is_two_softmaxes_a_group(temperature, cur, tea, packing):
    mask, ids = packing
    # Sequences of four problems, right and wrong ones among each.
    number = ids + np.arange(ROWS)[:, None]
    reward, group = np.float32(number % 3 == 0), number % 4
    got = np.asarray(
        compiled(scope_opd, temperature=temperature)(cur, tea, reward, group, mask, sequence_ids=ids)
    )
    close(got, oracle.scope_opd(cur, tea, reward, group, mask, temperature, ids))
    first = [(b, where[0]) for b, where in sequences(mask, ids)]
    for key in {(group[at], reward[at]) for at in first}:
        total = sum(got[at] for at in first if (group[at], reward[at]) == key)
        np.testing.assert_allclose(total, 1, rtol=1e-5)


@few
@given(nats, nats, packings())
def test_f_opd_fades_what_is_stale(cur, old, packing):
    mask, ids = packing
    constants = {"rate": 0.4, "threshold": 0.2}
    got = compiled(f_opd, **constants)(cur, old, ids, mask, sequence_ids=ids)
    close(got, oracle.f_opd(cur, old, ids, mask, **constants, sequence_ids=ids))


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.98, 1.0])
@fewer
@given(floats(-3, 3) | typical(-3, 3), packings())
def test_masked_quantile_is_numpys(q, x, packing):
    mask, _ = packing
    got = compiled(masked_quantile, q=q)(np.where(mask, x, np.nan), mask)
    close(got, np.quantile(x[mask].astype(float), q) if mask.any() else np.inf)


def test_tip_keeps_the_share_it_is_told():
    entropy, kl = np.random.default_rng(1).random((2, *SHAPE))
    for keep, tokens in ((0.25, 12), (0.5, 24), (1.0, 48)):
        assert np.sum(tip(entropy, kl, jnp.ones(SHAPE), keep=keep)) == tokens


def test_published_test_vector_of_fire_opd():
    h = jnp.array([[0.0, 2.0], [1.0, 2.0]])  # of student and teacher alike: raw weights (2, 2) and (2.25, 2)
    got = fire_opd(jnp.zeros((2, 2)), h, h, jnp.ones((2, 2)), drop=0.0)
    np.testing.assert_allclose(got, [[1, 1], [2.25 / 2.125, 2 / 2.125]], rtol=1e-6)


def test_every_member_has_options():
    assert set(OPTIONS) == set(WEIGHTS)
    assert all(WEIGHTS[name].__name__ == name for name in WEIGHTS)


@pytest.mark.parametrize("member", MEMBERS)
def test_weights_are_nonnegative_detached_and_blind_behind_the_mask(member):
    batch = fields()
    mask = batch["mask"]
    function = jax.jit(lambda batch: call(member, batch))
    w = np.asarray(function(batch))
    chex.assert_shape(w, SHAPE)
    assert np.min(w) >= 0
    assert w.any()
    assert not w[~mask].any()
    np.testing.assert_allclose(np.sum(normalise(w, mask)), mask.sum(), rtol=1e-5)

    np.testing.assert_array_equal(function(batch | {"mask": mask * 2.5}), w)  # any number but 0 is in

    floating = {n: x for n, x in batch.items() if x.dtype == np.float32 and x.ndim > 1}
    whole = {n: x for n, x in batch.items() if x.dtype.kind == "i" and x.ndim > 1}
    for garbage in (np.nan, np.inf, -np.inf):
        dirty = {
            n: np.where(mask.reshape(SHAPE + (1,) * (x.ndim - 2)), x, -(2**30)) for n, x in whole.items()
        }
        dirty |= behind(mask, floating, garbage)
        np.testing.assert_array_equal(function(batch | dirty), w)
        nothing = batch | behind(np.zeros_like(mask), floating, garbage) | {"mask": np.zeros_like(mask)}
        np.testing.assert_array_equal(function(nothing), 0)

    value = np.arange(LENGTH)
    slopes = jax.grad(lambda x: jnp.sum(value * function(batch | x)))(floating)
    chex.assert_trees_all_equal(slopes, jax.tree.map(np.zeros_like, floating))


@pytest.mark.parametrize("member", MEMBERS)
def test_weights_stay_finite_at_ten_thousand_nats(member):
    batch, rng = fields(), np.random.default_rng(1)
    for name, x in batch.items():
        if x.dtype == np.float32 and x.ndim == 2:
            signs = [0, 1e4] if "entropy" in name else [-1e4, -1, 0]
            batch[name] = rng.choice(np.float32(signs), size=x.shape)
    w = jax.jit(lambda batch: call(member, batch))(batch)
    chex.assert_tree_all_finite(w)
    if np.any(w):  # a freshness threshold may drop all
        np.testing.assert_allclose(np.sum(normalise(w, batch["mask"])), batch["mask"].sum(), rtol=1e-5)


@pytest.mark.parametrize("member", MEMBERS)
def test_rows_may_be_permuted_and_packed(member):
    batch = fields(2)
    batch["tea"] = batch["tea"] * np.float32(
        [[1e5], [1], [1], [1]]
    )  # so that its sums round by more than ours
    w = np.asarray(call(member, batch))
    order = [2, 0, 3, 1]
    permuted = call(member, {n: x[order] if x.ndim > 1 else x for n, x in batch.items()})
    np.testing.assert_allclose(permuted, w[order], rtol=1e-6)
    # Two sequences a row, padding between them.
    packed = {
        n: x.reshape(ROWS // 2, 2 * LENGTH, *x.shape[2:]) if x.ndim > 1 else x for n, x in batch.items()
    }
    packed["sequence_ids"] = np.repeat([[1, 2]], LENGTH, axis=1) * np.ones((ROWS // 2, 1), int)
    np.testing.assert_allclose(call(member, packed), w.reshape(2, -1), rtol=1e-5, atol=1e-7)


def test_without_drift_the_ratio_weighs_all_alike():
    batch = fields()
    np.testing.assert_array_equal(token_is(batch["old"], batch["old"], batch["mask"]), batch["mask"])


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_jit_without_and_under_pmap(self):
        batch = fields(3)
        args = [batch[n] for n in ("tea", "entropy", "teacher_entropy", "mask")]
        got = self.variant(fire_opd)(*args)
        chex.assert_shape(got, SHAPE)
        close(got, oracle.fire_opd(*args, 0.2, 1.0, 1.0))


def test_the_share_of_a_long_response_is_that_of_float64():
    rng = np.random.default_rng(0)
    a = rng.exponential(size=(1, 16384)).astype(np.float32)
    got = compiled(iw_opd)(np.zeros_like(a), a, np.ones_like(a))
    before = np.cumsum(a, axis=1, dtype=np.float64) - a
    np.testing.assert_allclose(got, 1 + 0.5 * (1 - before / a.sum(dtype=np.float64)), atol=2e-6)


def test_a_quantile_at_the_end_stops_nobody_who_debugs_with_nans():
    with jax.debug_nans(True):
        assert masked_quantile(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1, 1, 0]]), 1.0) == 2


def test_softmaxes_of_scope_opd_know_no_underflow():
    """Of two sequences a problem only the difference of their scores tells, however low both are."""
    near, far = np.log([0.25, 0.75]), np.log([0.25, 0.75]) - 1e3
    score = np.float32([near[0], near[1], far[0], far[1]])[:, None] * np.ones((1, LENGTH), np.float32)
    mask, wrong = np.ones(SHAPE), np.zeros(SHAPE)
    for numbers in ([1, 1, 0, 0], [0, 0, 1, 1], [47, 47, 3, 3]):  # problems, to the last there may be
        group = np.int32(numbers)[:, None] * np.ones((1, LENGTH), np.int32)
        got = compiled(scope_opd)(score, score, wrong, group, mask)
        np.testing.assert_allclose(got[:, 0], [0.25, 0.75, 0.25, 0.75], rtol=1e-3)
        got = compiled(scope_opd)(score, score, wrong + 1, group, mask)
        np.testing.assert_allclose(got[:, 0], [0.75, 0.25, 0.75, 0.25], rtol=1e-3)


def test_an_entropy_below_zero_is_none_to_fire_opd():
    mask, tea = np.ones((1, 4)), np.zeros((1, 4))
    entropy, teacher_entropy = np.float32([[-0.5, 0, 1, 2]]), np.float32([[4, -2, 0, 1]])
    for shares in (1.0, -0.75):  # of mean one also where the sum of what is weighed is below one
        confidence, confusion = np.array([0, 1, 1, 0.75]), np.array([0, 0, 0.5, 1])
        raw = (1 + shares * confidence) * (1 + shares * confusion)
        options = {"teacher_share": shares, "student_share": shares}
        got = fire_opd(tea, entropy, teacher_entropy, mask, **options)
        np.testing.assert_allclose(got, [raw / raw.mean()], rtol=1e-6)
    alone = fire_opd(tea[:, :1], entropy[:, 3:], 0 * tea[:, :1], mask[:, :1], student_share=-0.75)
    np.testing.assert_allclose(alone, [[1]])  # 2 (1 - 3/4) over its mean


def test_what_lies_behind_the_mask_scales_no_score_of_tip():
    entropy, kl = np.float32([[1, 2, 3, 9]]), np.float32([[1, 4, 2, -9]])
    mask = np.array([[1, 1, 1, 0]])
    # h = 0, 1/2, 1 and k = 0, 1, 1/3: scores of 0, 1, 1
    np.testing.assert_array_equal(tip(entropy, kl, mask, keep=0.5, clip_quantile=1.0), [[0, 1, 1, 0]])
    # A number alone spreads over nothing: all are kept.
    np.testing.assert_array_equal(tip(0 * kl + 3, 0 * kl - 3, mask, keep=0.5), mask)


def test_prune_gives_no_more_than_agreement_does():
    ids = np.arange(4) + np.zeros((1, 2, 1), int)
    np.testing.assert_allclose(prune(ids, ids + 4, np.ones((1, 2)), drop=-0.3, base=0.5), 1.5)
