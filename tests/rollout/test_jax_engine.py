"""The sampler against the trainer, and against itself in other company and other slots."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from opd_jax.errors import InputError
from opd_jax.keys import stream
from opd_jax.model import forward, make_mesh, param_shardings
from opd_jax.rollout import JaxEngine, Request, in_order, make_sampler, sample, stop_finder
from opd_jax.rollout import jax_engine as module
from tests.conftest import said_by_a_program

P, R, V = 5, 24, 40
DRAWN = [f"{temperature},{top_p}" for temperature in (1.0, 0.7) for top_p in (1.0, 0.9)] + ["0.0,1.0"]


def keystone(count, cases):
    return json.loads(said_by_a_program("tests.rollout.keystone", count, *cases))


def check_keystone(found):
    for name, case in found.items():
        model, dtype, temperature, _ = name.split(",")
        # A trained model's log-probs go down to -30, where one step of float32 is 2e-6: rows that hold
        # several rollouts, whose sums have other terms, differ by some of them.
        packed = 5e-5 if model == "lab" else 1e-5
        padded, packed = (1e-5, packed) if dtype == "float32" else BFLOAT16[model]
        assert case["padded"] < padded, (name, case)
        assert case["packed"] < packed, (name, case)
        assert case["tokens"] > 500
        if model != "lab" and temperature != "0.0":
            # Ragged, some cut short, and some with PAD, which is the config's end of text, before their end.
            assert case["lengths"] > 10
            assert case["truncated"] > 0
            assert case["pad_midway"] > 10


# Measured over 1000 rollouts in bfloat16: 1e-6 and 0.013 for the tiny models; for the lab's 0.022 and, by the
# machine, 0.072 to 0.155 (6e-5 on average).
BFLOAT16 = {"dense": (0.03, 0.03), "moe": (0.03, 0.03), "lab": (0.05, 0.3)}


def test_keystone_cached_logprobs_are_teacher_forced_ones():
    check_keystone(keystone(64, ["dense,float32,1.0,1.0", "moe,float32,0.7,0.9", "lab,float32,1.0,0.9"]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keystone_over_a_thousand_rollouts(dtype):
    check_keystone(
        keystone(1000, [f"{m},{dtype},{drawn}" for m in ("dense", "moe", "lab") for drawn in DRAWN])
    )


def requests(count, samples=2, **fields):
    draw = np.random.default_rng(1)
    prompts = [draw.integers(1, V, draw.integers(1, P + 1)) for _ in range(count)]
    return [
        Request(prompt, 100 + index, number, **fields)
        for index, prompt in enumerate(prompts)
        for number in range(samples)
    ]


def sampler_of(model, *, slots=4, max_response=R, temperature=1.0, top_p=1.0, stop_ids=(0, 3, 9), **settings):
    return make_sampler(
        model[0],
        slots=slots,
        max_prompt=P,
        max_response=max_response,
        temperature=temperature,
        top_p=top_p,
        usable=settings.pop("usable", V),
        stop_ids=stop_ids,
        **settings,
    )


def draw(model, wanted, *, seed=0, **settings):
    return list(sample(sampler_of(model, **settings), model[1], wanted, stream(seed, "sample")))


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert a.truncated == b.truncated


@pytest.fixture(scope="module")
def drawn(small):
    """24 rollouts of 1 to R tokens in 4 slots."""
    found = draw(small, requests(12))
    lengths = [len(one.ids) for one in found]
    assert len(set(lengths)) > 8
    assert 0 < sum(one.truncated for one in found) < 12
    return found


def test_log_probs_are_those_of_the_drawn_tokens(small, drawn):
    """By a plain forward pass over each rollout alone, in float64 from its logits on."""
    config, params = small
    read = jax.jit(lambda tokens: forward(params, tokens, config))
    for request, one in zip(requests(12), drawn, strict=True):
        text = np.concatenate([request.prompt_ids, one.ids])[:-1]
        z = np.asarray(read(np.resize(text, (1, P + R))), np.float64)[0, : len(text)]
        z = z[len(request.prompt_ids) - 1 :]
        told = z[np.arange(len(z)), one.ids] - np.log(np.exp(z).sum(-1))
        np.testing.assert_allclose(one.logprobs, told, atol=1e-5)


def test_a_rollout_depends_neither_on_its_company_nor_on_the_order_of_refills(small, drawn):
    wanted = requests(12)
    order = np.random.default_rng(3).permutation(len(wanted))
    shuffled = draw(small, [wanted[index] for index in order])
    same([drawn[index] for index in order], shuffled)
    same(drawn[::5], draw(small, wanted[::5]))
    same(drawn[7:8], draw(small, wanted[7:8]))


def test_nor_on_how_often_the_host_looks(small, drawn, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 3)
    same(drawn, draw(small, requests(12)))


def test_other_numbers_of_slots_draw_the_same_here(small, drawn):
    """In distribution everywhere; to the id on a CPU in float32, where rounding has decided no token yet."""
    for slots in (1, 17):
        for a, b in zip(drawn, draw(small, requests(12), slots=slots), strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_refilling_compiles_nothing_again(small):
    sampler = sampler_of(small, slots=5)
    for count in (1, 3, 9):
        list(sample(sampler, small[1], requests(count), stream(count, "sample")))
    assert [f._cache_size() for f in (sampler.begin, sampler.fill, sampler.advance)] == [1, 1, 1]


def test_a_long_cache_is_read_as_far_as_it_is_filled(small, drawn, monkeypatch):
    """What shares the slots decides how much is read, and nothing else."""
    monkeypatch.setattr(module, "STEPS", 4)
    sampler, wanted, read = sampler_of(small, block=4), requests(12), []
    assert sampler.cache_slots == 28

    def watched(params, state, *how):
        live, blocks = ~(state.rows.done | how[0]), how[-1]
        position = jnp.where(live, state.rows.position, 0).max()
        state, told = sampler.advance(params, state, *how)
        read.append(blocks.number)
        # As far as the longest of those slots may get, and to no more than the next power of two.
        assert position + 4 <= blocks.slots or blocks.slots == 28
        assert blocks.number == 1 or 4 * (blocks.number // 2) < position + 4
        return state, told

    engine = JaxEngine(dataclasses.replace(sampler, advance=watched), small[1], stream(0, "sample"))
    found = list(in_order(engine.draw(wanted)))
    assert set(read) == {2, 4, 7}
    assert sampler.advance._cache_size() == 3
    for a, b in zip(drawn, found, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    same(found[::5], draw(small, wanted[::5], block=4))
    shortest = min(range(24), key=lambda index: len(found[index].ids))
    same(found[shortest : shortest + 1], draw(small, wanted[shortest : shortest + 1], block=4))


def test_a_long_response_holds_nothing_up(small):
    """What finishes is handed over while the longest is still being drawn, and its slot is used again."""
    wanted = requests(12)
    limits = [R if index == 0 else 2 for index in range(len(wanted))]
    wanted = [dataclasses.replace(r, max_response=n) for r, n in zip(wanted, limits, strict=True)]
    sampler = sampler_of(small, slots=2, stop_ids=(V - 1,), banned=(V - 1,))
    steps = []

    def counted(params, state, *how):
        before = int(state.rows.drawn.sum())
        state, told = sampler.advance(params, state, *how)
        steps.append(int(told.drawn.sum()) - before)
        return state, told

    engine = JaxEngine(dataclasses.replace(sampler, advance=counted), small[1], stream(0, "sample"))
    order = [index for index, _ in engine.draw(wanted)]
    assert order.index(0) > R // 2 - 3
    assert sum(steps) == sum(limits)
    assert len(steps) > 8


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 1024, marks=pytest.mark.slow),
        pytest.param({"data": 4}, 1024, marks=pytest.mark.slow),
        pytest.param({"tensor": 2}, 1024, marks=pytest.mark.slow),
    ],
)
def test_slots_over_a_mesh_draw_the_same(small, shape, block):
    config, params = small
    wanted, mesh = requests(9), make_mesh(**shape)
    want = draw(small, wanted, slots=8)
    with jax.set_mesh(mesh):
        sampler = sampler_of(small, slots=8, block=block)
        placed = jax.device_put(params, param_shardings(config, mesh))
        got = list(sample(sampler, placed, wanted, stream(0, "sample")))
        programs = sampler.begin, sampler.fill, sampler.advance
        compiled = [f._cache_size() for f in programs]
        list(sample(sampler, placed, wanted[::-1], stream(0, "sample")))
        assert [f._cache_size() for f in programs] == compiled
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_continuations_have_the_frequencies_of_the_model(small):
    """Two tokens from one prompt, 8000 times, against the products of their probabilities."""
    config, params = small
    prompt, count, ids = [5, 6], 8000, 4
    wanted = [Request(prompt, 1, number) for number in range(count)]
    found = draw(small, wanted, slots=500, max_response=2, usable=ids, stop_ids=(V - 1,))
    counts = np.zeros((ids, ids))
    for one in found:
        counts[tuple(one.ids)] += 1

    def after(*text):
        z = np.asarray(forward(params, jnp.array([text]), config), np.float64)[0, -1, :ids]
        return np.exp(z) / np.exp(z).sum()

    want = np.stack([after(*prompt, first) for first in range(ids)]) * after(*prompt)[:, None]
    assert stats.chisquare(counts.ravel(), count * want.ravel()).pvalue > 1e-4


def test_samples_seeds_and_problems_differ(small):
    texts = {
        tuple(draw(small, [Request([1], problem, number, seed=own)], seed=seed)[0].ids.tolist())
        for problem in (1, 2)
        for number in (0, 1)
        for seed, own in ((0, None), (1, None), (0, 5), (0, 6))
    }
    assert len(texts) > 13


def test_a_seed_of_its_own_takes_the_place_of_the_engines(small):
    wanted = requests(3, seed=5)
    same(draw(small, wanted, seed=0), draw(small, wanted, seed=1))


def test_every_stop_id_ends_a_response_and_is_kept(small, drawn):
    ends = [int(one.ids[-1]) for one in drawn if not one.truncated]
    assert len(set(ends)) > 1
    for one in drawn:
        assert len(one.logprobs) == len(one.ids)
        assert not {0, 3, 9} & set(one.ids[:-1].tolist())
        assert one.truncated == (one.ids[-1] not in (0, 3, 9))
        assert not one.truncated or len(one.ids) == R


def test_an_id_that_ends_nothing_changes_nothing_else(small, drawn):
    """PAD and the config's end of text, id 0, is drawn midway where it is no stop id."""
    other = draw(small, requests(12), stop_ids=(3, 9))
    ended = [index for index, one in enumerate(drawn) if one.ids[-1] == 0]
    assert ended
    for index, (a, b) in enumerate(zip(drawn, other, strict=True)):
        np.testing.assert_array_equal(a.ids, b.ids[: len(a.ids)])
        np.testing.assert_array_equal(a.logprobs, b.logprobs[: len(a.ids)])
        assert index in ended or len(a.ids) == len(b.ids)


def test_the_limit_of_a_request_marks_it_truncated(small, drawn):
    limits = [1 + index % 7 for index in range(24)]
    wanted = [
        dataclasses.replace(request, max_response=limit)
        for request, limit in zip(requests(12), limits, strict=True)
    ]
    for whole, cut, limit in zip(drawn, draw(small, wanted), limits, strict=True):
        np.testing.assert_array_equal(cut.ids, whole.ids[:limit])
        assert cut.truncated == (cut.ids[-1] not in (0, 3, 9))


def letters(ids):
    """Some ids are several letters, and id 2 is none, as a special token's would be."""
    return "".join("" if i == 2 else "abc"[i % 3] * (1 + i % 2) for i in ids.tolist())


@pytest.mark.parametrize("steps", [1, 5, 64])
def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(small, drawn, monkeypatch, steps):
    monkeypatch.setattr(module, "STEPS", steps)
    stop = ("ba", "aaca")
    sampler = sampler_of(small)
    engine = JaxEngine(sampler, small[1], stream(0, "sample"), find_stop=stop_finder(stop, letters))
    found, cut = list(in_order(engine.draw(requests(12)))), 0
    for whole, one in zip(drawn, found, strict=True):
        lengths = range(1, len(whole.ids) + 1)
        ends = [n for n in lengths if any(s in letters(whole.ids[:n]) for s in stop)]
        want = ends[0] if ends else len(whole.ids)
        np.testing.assert_array_equal(one.ids, whole.ids[:want])
        np.testing.assert_array_equal(one.logprobs, whole.logprobs[:want])
        assert one.truncated == (whole.truncated and not ends)
        cut += want < len(whole.ids)
    assert cut > 5


def test_what_the_host_ends_is_drawn_no_further(small, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 4)
    sampler, drawn = sampler_of(small, stop_ids=(V - 1,), banned=(V - 1,)), []

    def watched(*args):
        state, told = sampler.advance(*args)
        drawn.append(np.asarray(told.drawn).copy())
        return state, told

    wanted, limits = requests(2), [R, 4, 3, R - 5]
    wanted = [dataclasses.replace(r, max_response=n) for r, n in zip(wanted, limits, strict=True)]
    [first] = [one.ids for one in draw(small, wanted[:1], stop_ids=(V - 1,), banned=(V - 1,))]
    engine = JaxEngine(
        dataclasses.replace(sampler, advance=watched),
        small[1],
        stream(0, "sample"),
        find_stop=lambda ids, before: 2 if ids[0] == first[0] and len(ids) == 4 else None,
    )
    found = dict(engine.draw(wanted))
    assert [len(found[index].ids) for index in range(4)] == [2, 4, 3, R - 5]
    assert drawn[-1].tolist() == [4, 4, 3, R - 5]


def test_stop_strings_are_found_wherever_they_begin():
    texts = ["ab", "c", "", "", "d" * 30, "e\n", "\nf"]

    def text(ids):
        return "".join(texts[i] for i in ids)

    ids = np.arange(len(texts))
    for string, want in (("b", 1), ("bc", 2), ("cd", 5), ("bcddd", 5), ("d", 5), ("\n\n", 7), ("\nf", 7)):
        find = stop_finder([string], text)
        for looked_at in range(want):
            assert find(ids, looked_at) == want, (string, looked_at)
            assert find(ids[: want - 1], min(looked_at, want - 1)) is None
    with pytest.raises(InputError, match="drop the empty one"):
        stop_finder(["a", ""], text)


def test_stop_strings_are_found_behind_a_border_that_cuts_a_character():
    """Bytes that are no whole character read as several, and seem to be enough of what was before."""
    ids = np.frombuffer("ab😀x😀y".encode(), np.uint8)
    find = stop_finder(["😀x😀"], lambda ids: bytes(ids.tolist()).decode(errors="replace"))
    for looked_at in range(11):
        assert find(ids, looked_at) == 11, looked_at


def test_banned_and_unused_ids_never_come(small):
    banned = tuple(range(0, V, 2))
    for temperature in (0.0, 1.0):
        found = draw(small, requests(6), temperature=temperature, usable=31, banned=banned, stop_ids=(V - 1,))
        ids = np.concatenate([one.ids for one in found])
        assert (ids % 2 == 1).all()
        assert ids.max() < 31


def test_prompts_and_limits_must_fit(small):
    for ids in ([], [1] * (P + 1)):
        with pytest.raises(InputError, match=f"1 to {P} tokens"):
            draw(small, [Request(ids, 0, 0)])
    for limit in (0, R + 1):
        with pytest.raises(InputError, match=f"1 to {R} tokens"):
            draw(small, [Request([1], 0, 0, max_response=limit)])
    assert draw(small, []) == []
