"""Against a real vLLM server: the same weights give the same log-probs there and here."""

import asyncio
import json
import shutil

import httpx2
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax.errors import InputError
from opd_jax.lab import chains, student
from opd_jax.model import load_pretrained
from opd_jax.rollout import Request, make_rows
from opd_jax.rollout.rows import gather
from opd_jax.rollout.score import make_scorer, make_topk_scorer
from opd_jax.rollout.server import ServerEngine
from opd_jax.rollout.server_refresh import Probe, prove, refresh
from opd_jax.rollout.server_score import teacher_rows
from opd_jax.rollout.servers import Servers, poster
from opd_jax.tasks import encode_prompt, load_tokenizer
from tests.rollout.fake_server import together
from tests.rollout.vllm_server import vllm_server

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
P, R = 61, 144


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One server of the lab's student, whose caches are on and whose cap is the default."""
    folder = tmp_path_factory.mktemp("vllm")
    with vllm_server(student(), folder / "log") as url:
        yield url


@pytest.fixture(scope="module")
def world(lab_student):
    config, params = lab_student
    tokenizer = load_tokenizer(student())
    problems = chains("heldout", 50)
    wanted = [
        Request(encode_prompt(tokenizer, problem.prompt), problem.key, number)
        for problem in problems
        for number in range(4)
    ]
    return config, params, tokenizer, wanted


def engine(url, world, *, temperature=1.0, top_p=0.9, max_response=R, seed=0):
    config, _, tokenizer, _ = world
    return ServerEngine(
        servers=Servers([url], concurrency=32, timeout=120.0),
        model="policy",
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        max_prompt=P,
        max_response=max_response,
        ends=(config.eos_token_id,),
        usable=len(tokenizer),
        vocabulary=config.vocab_size,
    )


def forced(model, wanted, drawn):
    """The trainer's log-probs of what was drawn, at temperature 1."""
    config, params = model
    rows = make_rows([request.prompt_ids for request in wanted], [one.ids for one in drawn], P + R - 1)
    return gather(np.asarray(make_scorer(config, temperature=1.0)(params, rows)), rows.mask)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.9), (0.7, 0.9)])
def test_the_same_weights_give_the_same_logprobs(served, world, temperature, top_p):
    config, params, _, wanted = world
    found = dict(engine(served, world, temperature=temperature, top_p=top_p).draw(wanted))
    drawn = [found[index] for index in range(200)]
    old = forced((config, params), wanted, drawn)
    difference = np.abs(np.concatenate([d.logprobs for d in drawn]) - np.concatenate(old))
    print(
        f"\n200 rollouts at temperature {temperature}, top-p {top_p}: {len(difference)} tokens, "
        f"mean |difference| {difference.mean():.2e} nats, largest {difference.max():.2e}"
    )
    assert difference.mean() < 1e-3
    assert difference.max() < 1e-3
    assert len({one.ids.tobytes() for one in drawn}) > 60
    assert any(not one.truncated for one in drawn)


def test_seeds_reproduce_and_ids_beyond_the_tokenizer_never_come(served, world):
    _, _, _, wanted = world
    first = dict(engine(served, world, temperature=2.0, top_p=1.0).draw(wanted[:24]))
    again = dict(engine(served, world, temperature=2.0, top_p=1.0).draw(wanted[:24][::-1]))
    other = dict(engine(served, world, temperature=2.0, top_p=1.0, seed=1).draw(wanted[:24]))
    for index in range(24):
        np.testing.assert_array_equal(first[index].ids, again[23 - index].ids)
    assert any(first[index].ids.tolist() != other[index].ids.tolist() for index in range(24))
    # At this temperature padding would come now and then; `draw` refuses it.
    assert sum(len(one.ids) for one in first.values()) > 200


def test_the_limit_marks_a_row_truncated(served, world):
    found = dict(engine(served, world, max_response=7).draw(world[3][:8]))
    assert all(one.truncated and len(one.ids) == 7 for one in found.values())


def test_what_does_not_fit_is_refused_in_the_servers_words(served, world):
    with pytest.raises(InputError, match=rf"{served} answered 400 \(.*512"):
        list(engine(served, world, max_response=600).draw(world[3][:1]))


@pytest.mark.parametrize("k", [1, 8, 15])
def test_its_likeliest_ids_are_ours(served, world, k):
    config, params, tokenizer, wanted = world
    found = dict(engine(served, world).draw(wanted[:16]))
    rows = make_rows(
        [request.prompt_ids for request in wanted[:16]], [found[i].ids for i in range(16)], P + R - 1
    )
    told = teacher_rows(
        Servers([served]), "policy", rows, k, usable=len(tokenizer), vocabulary=config.vocab_size
    )
    theirs = together(told, rows, k)
    ours = make_topk_scorer(config, k=k, temperature=1.0, usable=len(tokenizer))(params, rows)
    on = rows.mask
    np.testing.assert_allclose(theirs.sampled[on], ours.sampled[on], atol=1e-4)
    np.testing.assert_allclose(theirs.logprobs[on], ours.logprobs[on], atol=1e-4)
    same = np.asarray(theirs.ids[on]) == np.asarray(ours.ids[on])
    gaps = -np.diff(np.asarray(ours.logprobs[on]), axis=-1, append=-np.inf)
    near = np.minimum(gaps, np.roll(gaps, 1, axis=-1)) < 1e-4  # whose order rounding may turn
    assert (same | near | (np.arange(k) == k - 1)).all()
    assert same.mean() > 0.99
    worst = np.abs(np.asarray(theirs.logprobs[on] - ours.logprobs[on])).max()
    print(f"\ntop {k} of {on.sum()} tokens: ids equal in {same.mean():.5f}, largest |difference| {worst:.2e}")


def test_its_cap_is_named(served, world):
    rows = make_rows([[1, 2]], [[3, 4]], 4)
    with pytest.raises(InputError, match=r"allows 20, loss.top_k asks for 21; .*--max-logprobs 21"):
        list(teacher_rows(Servers([served]), "policy", rows, 21, usable=40, vocabulary=48))


def probe_of(folder, tokenizer, tolerance=1e-4):
    config, params = load_pretrained(folder)
    text = np.concatenate([encode_prompt(tokenizer, p.prompt) for p in chains("heldout", 3)])[:P].tolist()
    rows = make_rows([text[:1]], [text[1:]], P + R - 1)
    told = gather(np.asarray(make_scorer(config, temperature=1.0)(params, rows)), rows.mask)[0]
    return Probe(text, told, tolerance=tolerance)


def once(url, what, *args):
    """One asynchronous call on a server."""

    async def call():
        async with httpx2.AsyncClient(timeout=60.0) as client:
            await what(url, poster(client, url), *args)

    asyncio.run(call())


def other_weights(folder, to, scale=1.05):
    """A copy of a checkpoint whose weights are others."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    save_file({name: value * scale for name, value in weights.items()}, to / "model.safetensors")
    return to


def test_new_weights_are_proved_and_caches_forgotten(served, world, tmp_path):
    _, _, tokenizer, wanted = world
    other = other_weights(student(), tmp_path / "other")
    old, new = probe_of(student(), tokenizer), probe_of(other, tokenizer)
    assert np.abs(old.expected - new.expected).mean() > 0.01
    once(served, prove, "policy", old)
    list(engine(served, world).draw(wanted[:8]))  # fills the prefix cache
    with pytest.raises(InputError, match=r"differ from the trainer's by .* nats on average, 0.0001 allowed"):
        once(served, prove, "policy", new)
    try:
        once(served, refresh, other, "policy", new)
        found = dict(engine(served, world).draw(wanted[:8]))
        drawn = [found[index] for index in range(8)]
        read = np.concatenate(forced(load_pretrained(other), wanted[:8], drawn))
        difference = np.abs(read - np.concatenate([one.logprobs for one in drawn]))
        print(f"\nafter a refresh: mean |difference| {difference.mean():.2e}, largest {difference.max():.2e}")
        assert difference.max() < 1e-3
    finally:
        once(served, refresh, student(), "policy", old)


def test_a_checkpoint_that_lacks_a_tensor_is_caught_by_the_probe(served, world, tmp_path):
    """The server answers 200, and serves a model of two."""
    other = other_weights(student(), tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "lacks").mkdir()
    save_file(weights, tmp_path / "lacks" / "model.safetensors")
    shutil.copy(other / "config.json", tmp_path / "lacks")
    tokenizer = world[2]
    try:
        with pytest.raises(InputError, match="differ from the trainer's by"):
            once(served, refresh, tmp_path / "lacks", "policy", probe_of(other, tokenizer))
    finally:
        once(served, refresh, student(), "policy", probe_of(student(), tokenizer))


def test_what_a_models_generation_config_says_of_sampling_does_not_count(served, world, tmp_path):
    _, _, tokenizer, wanted = world
    once(served, refresh, student(), "policy", probe_of(student(), tokenizer))
    want = dict(engine(served, world, top_p=1.0).draw(wanted[:16]))
    shutil.copytree(student(), tmp_path / "student")
    penalties = {"repetition_penalty": 3.0, "presence_penalty": 1.0, "frequency_penalty": 1.0}
    config = json.dumps({"eos_token_id": world[0].eos_token_id, "top_k": 2, "min_p": 0.5, **penalties})
    (tmp_path / "student" / "generation_config.json").write_text(config)
    with vllm_server(tmp_path / "student", tmp_path / "log", "--generation-config", "auto") as url:
        found = dict(engine(url, world, top_p=1.0).draw(wanted[:16]))
    for index in range(16):
        np.testing.assert_array_equal(found[index].ids, want[index].ids)


def test_a_server_of_truncated_logprobs_is_caught(world, tmp_path):
    with vllm_server(student(), tmp_path / "log", "--logprobs-mode", "processed_logprobs") as url:
        with pytest.raises(
            InputError, match=r"its own for tokens that it drew .*--logprobs-mode raw_logprobs"
        ):
            once(url, prove, "policy", probe_of(student(), world[2]))
        # Last, because the engine may end with it: a folder that is not there.
        with pytest.raises(InputError, match=r"could not load /.*nowhere .*under the same path"):
            once(url, refresh, tmp_path / "nowhere", "policy", probe_of(student(), world[2]))
