"""Control arms: what each keeps of the gate, and what it destroys."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.method import (
    constant,
    disagreement,
    drift_gate,
    drift_weights,
    fixed_blocks,
    inverse,
    noise_a_place,
    normalise,
    position_mean,
    random,
    relative_gate,
    shuffled,
)
from tests.method.batches import LENGTH, SHAPE, close, compiled, few, masks, nats, packings, typical, wild
from tests.oracle import controls as oracle
from tests.oracle import gates
from tests.oracle.segments import members, sequences

DRAWN = (shuffled, random)
seeds = st.integers(0, 2**32 - 1)


def by_segment(g, segments) -> dict[tuple[int, int], float]:
    """(row, number) -> the one value on all tokens of the segment."""
    values = {}
    for b, where in members(np.asarray(segments)):
        [values[b, int(segments[b, where[0]])]] = set(np.asarray(g)[b, where].tolist())
    return values


def arms(g, mask, segments, key, score):
    yield "constant", compiled(constant)(g, mask, segments)
    yield "inverse", compiled(inverse)(g, mask, segments)
    yield "position_mean", compiled(position_mean)(g, mask, segments)
    yield "shuffled", compiled(shuffled)(g, mask, segments, key)
    yield "random", compiled(random)(g, mask, segments, key)
    yield "disagreement", compiled(disagreement)(g, mask, segments, score)


@few
@given(typical(-2, 0), masks, typical(0, 3))
def test_arms_with_one_answer_are_their_rules(cur, mask, score):
    segments = np.asarray(compiled(fixed_blocks, size=3)(mask))
    g = np.asarray(compiled(relative_gate)(cur, 0 * cur, mask, segments))
    dirty = np.where(mask, score, np.nan)
    found = dict(arms(g, mask, segments, jax.random.key(0), dirty))
    np.testing.assert_array_equal(found["constant"], mask)
    close(found["inverse"], oracle.inverse(g, mask))
    close(found["position_mean"], oracle.position_mean(g, segments))
    close(found["disagreement"], oracle.disagreement(g, segments, score))


@few
@given(typical(-2, 0), masks, seeds)
def test_exchanged_gates_are_the_same_gates(cur, mask, seed):
    segments = compiled(fixed_blocks, size=2)(mask)
    g = compiled(relative_gate)(cur, 0 * cur, mask, segments)
    before = by_segment(g, segments)
    for arm in DRAWN:
        after = by_segment(compiled(arm)(g, mask, segments, jax.random.key(seed)), segments)
        assert sorted(after.values()) == sorted(before.values())
        if arm is shuffled:  # at every place of the response, too
            for number in range(LENGTH):
                there = [sorted(v for (_, n), v in x.items() if n == number) for x in (before, after)]
                assert there[0] == there[1]


@pytest.mark.parametrize("arm", DRAWN)
def test_every_seed_draws_another_exchange_and_all_are_as_likely(arm):
    shape = (4, 6)
    mask, segments = jnp.ones(shape), fixed_blocks(jnp.ones(shape), 3)
    g = jnp.repeat(jnp.arange(8.0).reshape(4, 2), 3, axis=1)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: arm(g, mask, segments, key)))(keys))[:, 0, 0]
    np.testing.assert_array_equal(drawn[0], arm(g, mask, segments, keys[0])[0, 0])
    # The first gate of the first row comes from the four first ones, or from all eight: each as often.
    _, counts = np.unique(drawn, return_counts=True)
    sources = 4 if arm is shuffled else 8
    np.testing.assert_allclose(counts, [4000 / sources] * sources, rtol=0.15)


@few
@given(wild, packings(), seeds, st.sampled_from(["sequence", "minibatch"]))
def test_normalised_arms_have_mean_one_at_any_drift(cur, packing, seed, scope):
    mask, ids = packing
    segments = compiled(fixed_blocks, size=3)(mask, sequence_ids=ids)
    dirty = np.where(mask, cur, np.nan)
    g = compiled(relative_gate, scope=scope)(dirty, 0 * cur, mask, segments, sequence_ids=ids)
    for name, arm in arms(g, mask, segments, jax.random.key(seed), dirty):
        w = compiled(normalise, scope="minibatch")(arm, mask)
        chex.assert_tree_all_finite(w)
        assert np.min(w) >= 0
        np.testing.assert_allclose(np.sum(w), mask.sum(), rtol=1e-5, err_msg=name)
        assert not np.asarray(arm)[~mask].any()


@few
@given(nats, masks, seeds)
def test_without_drift_every_arm_is_the_ungated_loss(old, mask, seed):
    segments = compiled(fixed_blocks, size=3)(mask)
    g = compiled(relative_gate)(old, old, mask, segments)
    for _, arm in arms(g, mask, segments, jax.random.key(seed), old):
        np.testing.assert_array_equal(compiled(normalise)(arm, mask), mask)


@few
@given(typical(-2, 0), masks, typical(0, 3), st.permutations(range(SHAPE[0])))
def test_permuting_rows_permutes_arms_that_draw_nothing(cur, mask, score, order):
    def found(*arrays):
        cur, mask, score = arrays
        segments = compiled(fixed_blocks, size=3)(mask)
        g = compiled(relative_gate)(cur, 0 * cur, mask, segments)
        return {n: np.asarray(w) for n, w in arms(g, mask, segments, jax.random.key(0), score)}

    whole, permuted = found(cur, mask, score), found(cur[order], mask[order], score[order])
    for name in ("constant", "inverse", "position_mean", "disagreement"):
        np.testing.assert_allclose(permuted[name], whole[name][order], rtol=1e-6)


@few
@given(typical(-2, 0), packings(), seeds)
def test_sequences_that_share_a_row_are_sequences(cur, packing, seed):
    """At one's own place in the response: a packed batch and its sequences in rows of their own agree."""
    mask, ids = packing
    segments = np.asarray(compiled(fixed_blocks, size=2)(mask, sequence_ids=ids))
    g = np.asarray(compiled(relative_gate)(cur, 0 * cur, mask, segments))
    own = np.full(SHAPE, -1)
    for b, where in sequences(mask, ids):
        own[b, where] = segments[b, where] - segments[b, where[0]]
    close(
        compiled(position_mean)(g, mask, segments, sequence_ids=ids), oracle.position_mean(g, segments, own)
    )
    drawn = compiled(shuffled)(g, mask, segments, jax.random.key(seed), sequence_ids=ids)
    before, after = by_segment(g, segments), by_segment(drawn, segments)
    place = {key: int(x) for key, x in by_segment(own, segments).items()}
    for number in set(place.values()):
        there = [sorted(v for key, v in x.items() if place[key] == number) for x in (before, after)]
        assert there[0] == there[1]


def test_a_gate_may_come_from_any_sequence_of_any_row():
    mask, ids = jnp.ones((2, 4)), jnp.array([[5, 5, 9, 9], [1, 1, 2, 2]])
    segments = fixed_blocks(mask, 1, sequence_ids=ids)
    g = jnp.arange(8.0).reshape(2, 4)
    keys = jax.random.split(jax.random.key(1), 1000)
    drawn = jax.jit(jax.vmap(lambda key: shuffled(g, mask, segments, key, sequence_ids=ids)))(keys)
    values, counts = np.unique(np.asarray(drawn)[:, 0, 2], return_counts=True)
    np.testing.assert_array_equal(values, [0, 2, 4, 6])
    np.testing.assert_allclose(counts, 250, rtol=0.2)


def test_no_gradient_flows_through_arms():
    cur = jnp.array(np.random.default_rng(3).normal(size=SHAPE))
    mask, value = jnp.ones(SHAPE), jnp.arange(LENGTH)
    segments = fixed_blocks(mask, 4)

    def total(cur):
        g = relative_gate(cur, jnp.zeros(SHAPE), mask, segments)
        key, score = jax.random.key(0), jnp.abs(cur)
        return jnp.stack([jnp.sum(value * arm) for _, arm in arms(g, mask, segments, key, score)])

    assert (total(cur) != total(cur + value))[1:].all()  # all but the constant one
    np.testing.assert_array_equal(jax.jacobian(total)(cur), 0)


def test_oracle_and_noise_arms_are_gates_of_other_numbers():
    """As the module says: no functions of their own."""
    rng = np.random.default_rng(4)
    mask = rng.random(SHAPE) < 0.8
    segments = np.asarray(fixed_blocks(mask, 4))
    kl, again, old = rng.exponential(size=(3, *SHAPE)).astype(np.float32)
    close(
        normalise(relative_gate(kl, 0 * kl, mask, segments), mask),
        gates.normalise(np.exp(-gates.over_segments(kl, mask, segments, gates.mean)) * mask, mask),
    )
    close(drift_gate(again, old, mask, segments), gates.drift_gate(again, old, mask, segments))


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_jit_without_and_under_pmap(self):
        mask = np.random.default_rng(5).random(SHAPE) < 0.7
        segments = np.asarray(fixed_blocks(mask, 3))
        g = np.where(mask, (segments + 1) * np.arange(1, 5)[:, None] / 20, 0).astype(np.float32)
        score = np.where(mask, -g, 0)
        got = self.variant(disagreement)(g, mask, segments, score)
        chex.assert_shape(got, SHAPE)
        close(got, oracle.disagreement(g, segments, score))


_COMPILED = {}


def _jitted(function, *which):
    return _COMPILED.setdefault(which, jax.jit(function))


@few
@given(wild | typical(-2, 0), packings(), seeds, masks, st.sampled_from(["sequence", "minibatch"]))
def test_arms_within_the_objective_have_mean_one_in_every_scope(cur, packing, seed, others, scope):
    """Also where a sequence was handed none but gates that float32 does not tell from zero."""
    mask, ids = packing
    segments = compiled(fixed_blocks, size=3)(mask, sequence_ids=ids)
    dirty = np.where(mask, cur, np.nan)
    for number in range(6):

        def weights(cur, mask, segments, ids, key, others, number=number):
            def reweigh(g):
                return list(arms(g, mask, segments, key, jnp.where(mask, jnp.abs(cur), 0.0)))[number][1]

            return drift_weights(
                cur, 0 * cur, mask, segments, scope=scope, sequence_ids=ids, reweigh=reweigh, others=others
            )[1]

        w = _jitted(weights, number, scope)(dirty, mask, segments, ids, jax.random.key(seed), others * 1.0)
        chex.assert_tree_all_finite(w)
        w = np.asarray(w, np.float64)
        assert not w[~(mask & others)].any()
        for positions in gates.scopes(mask, scope, ids):
            if any(others[at] for at in positions):
                np.testing.assert_allclose(sum(w[at] for at in positions), len(positions), rtol=1e-5)


def test_a_scope_of_sequences_takes_nothing_from_what_crosses_them():
    d = jnp.log(jnp.array([[1.0, 2.0], [4.0, 4.0]]))
    mask, segments = jnp.ones((2, 2)), jnp.array([[0, 1], [0, 1]])
    seen = []

    def reweigh(g):
        seen.append(g)
        return position_mean(g, mask, segments)

    _, w = drift_weights(d, 0 * d, mask, segments, scope="sequence", reweigh=reweigh)
    np.testing.assert_allclose(seen[0], [[1, 0.5], [0.25, 0.25]], rtol=1e-6)  # the printed g
    np.testing.assert_allclose(w, [[1.25, 0.75], [1.25, 0.75]], rtol=1e-6)  # (5/8, 3/8) over their mean


@few
@given(typical(-2, 0), masks, seeds)
def test_padding_draws_no_arm_anew(cur, mask, seed):
    def drawn(arm, more):
        wide, inside = (np.pad(x, ((0, more // 4), (0, more))) for x in (cur, mask))
        segments = compiled(fixed_blocks, size=3)(inside)
        g = compiled(relative_gate)(wide, 0 * wide, inside, segments)
        return np.asarray(compiled(arm)(g, inside, segments, jax.random.key(seed)))[: len(cur), :LENGTH]

    for arm in DRAWN:
        np.testing.assert_array_equal(drawn(arm, 0), drawn(arm, LENGTH))


def test_places_draw_alike_from_any_row_on():
    key = jax.random.key(3)
    whole = noise_a_place(key, 8, 40)
    np.testing.assert_array_equal(noise_a_place(key, 2, 7, 5), whole[5:7, :7])
    assert len(np.unique(whole)) == 320
    assert 0 <= float(whole.min()) < 0.05 < 0.95 < float(whole.max()) < 1


def test_a_token_outside_all_segments_gets_nothing_from_another():
    g, mask, segments = jnp.full((2, 4), 0.5), jnp.ones((2, 4)), jnp.array([[0, 0, 1, -1], [0, -1, 1, 1]])
    for name, arm in arms(g, mask, segments, jax.random.key(0), g):
        if name not in ("constant", "inverse"):  # which hand nothing out
            assert not np.asarray(arm)[segments < 0].any()
            assert (np.asarray(arm)[segments >= 0] == 0.5).all()


def test_a_token_that_left_the_mask_after_segments_were_made_gets_nothing():
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 1]])
    g, segments = jnp.full((2, 4), 0.5), jnp.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    for name, arm in arms(g, mask, segments, jax.random.key(0), g):
        want = {"constant": 1, "inverse": 2}.get(name, 0.5)
        np.testing.assert_array_equal(arm, want * mask, err_msg=name)


def test_the_last_place_of_a_response_has_a_mean_like_any():
    g, mask = jnp.array([[0.2, 0.4, 0.6], [0.4, 0.8, 0.0]]), jnp.array([[1, 1, 1], [1, 1, 0]])
    segments = jnp.array([[0, 1, 2], [0, 1, -1]])  # as many segments as positions
    np.testing.assert_allclose(position_mean(g, mask, segments), [[0.3, 0.6, 0.6], [0.3, 0.6, 0]], rtol=1e-6)
