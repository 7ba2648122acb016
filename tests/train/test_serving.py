"""A run whose rollouts servers draw and score: what is refused, what is stored, what is compared."""

import dataclasses

import jax
import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.keys import stream
from opd_jax.model import load_pretrained
from opd_jax.plan.programs import compile_programs
from opd_jax.rollout.rows import gather, make_rows
from opd_jax.rollout.score import columns_of, make_scorer, make_topk_scorer, mismatch, rows_of
from opd_jax.train import collect, engines, scoring, serving
from opd_jax.train.combinations import check_choices
from opd_jax.train.engines import engine_of
from opd_jax.train.loop import do_part
from opd_jax.train.opening import open_run
from opd_jax.train.run import Run
from opd_jax.train.serving import probe_of, server_engine, teacher_by_servers
from tests.conftest import tiny_config
from tests.rollout.fake_server import FakeServer
from tests.train.conftest import ignore, never

URL = "--engine.urls=[http://127.0.0.1:9]"
SERVER = ("--engine.kind=server", URL)
TEACHER = "--engine.teacher_urls=[http://127.0.0.1:9]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--engine.kind=server"], "engine.kind is server with 0 engine.urls"),
        ([URL], "engine.kind is jax with 1 engine.urls"),
        (["--engine.kind=server", "--engine.urls=[localhost:9]"], "must be addresses, .* got 'localhost:9'"),
        (["--engine.teacher_urls=[http://a,http://a]"], "each named once: got 'http://a'"),
        (["--engine.timeout=0"], "engine.timeout must be above 0"),
        (["--engine.concurrency=0"], "engine.concurrency must be above 0"),
    ],
)
def test_settings_that_make_no_engine_are_refused(overrides, message):
    with pytest.raises(InputError, match=message) as error:
        tiny_config(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*SERVER, "--sampling.temperature=0.7", "--loss.old_source=sampler"), "are no `old`"),
        ((TEACHER, "--sampling.temperature=0.7"), "a server scores at temperature 1"),
        ((TEACHER, "--loss.terms=[entropy_aware]"), "entropy of the teacher, which loss.terms=entropy_aware"),
        ((TEACHER, "--weights.members=[fire_opd]"), "entropy of the teacher, which weights.members=fire_opd"),
        ((*SERVER, "--sampling.stop=[x]"), "servers are asked to stop at ids alone"),
        ((TEACHER, "--schedule.rows=packed"), "a server scores rows of one rollout"),
        ((TEACHER, "--store.teacher_hidden=true"), "does not tell the teacher's hidden states"),
        ((TEACHER, "--loss.kind=student_topk"), "of the student's ids, which loss.kind=student_topk needs"),
        (("--engine.kind=server", "--engine.urls=[http://256.1.1.1:80]"), "got 'http://256.1.1.1:80'"),
        (("--engine.teacher_urls=[http://a,http://me:hush@b]",), r"got 'http://...@b'; write it as http://b"),
    ],
)
def test_what_servers_cannot_tell_is_refused_where_something_asks(overrides, message):
    with pytest.raises(InputError, match=message) as error:
        check_choices(tiny_config(*overrides))
    assert "\n" not in str(error.value)


def test_what_servers_can_tell_is_not():
    check_choices(tiny_config(*SERVER, "--sampling.temperature=0.7"))
    check_choices(tiny_config(*SERVER, "--loss.old_source=sampler"))
    check_choices(tiny_config(TEACHER, "--gate.control=oracle"))  # the student's ids, by the student alone


def always():
    return True


def at_one(run, stop) -> object:
    """An engine that draws as the JAX sampler does and says log-probs of temperature 1, as servers do."""
    inner = engine_of(run, "student", run.config.sampling, stream(run.config.seed, "sample"))

    class Engine:
        name, logprob_temperature = "server", 1.0

        def draw(self, requests):
            drawn = list(inner.draw(requests))[::-1]  # in any order
            rollouts = [
                collect.Rollout(0, "", 0, np.asarray(requests[i].prompt_ids), g.ids, g.logprobs, False, 0.0)
                for i, g in drawn
            ]
            rows = rows_of(rollouts, run.width)
            read = gather(np.asarray(make_scorer(run.model, temperature=1.0)(run.policy, rows)), rows.mask)
            for (index, generated), logprobs in zip(drawn, read, strict=True):
                yield index, dataclasses.replace(generated, logprobs=logprobs)

    return Engine()


def test_a_servers_logprobs_are_labelled_and_compared_at_their_own_temperature(tmp_path, monkeypatch):
    drawn = (*SERVER, "--sampling.temperature=0.7", "--schedule.rounds=1", "--sampling.max_response=20")
    run = open_run(tmp_path / "served", tiny_config(*drawn))
    monkeypatch.setattr(collect, "server_engine", at_one)
    for part in ("sample", "score"):
        do_part(run, part, ignore, never)
    for store in (run.rollouts, run.scored):
        assert store.about_store["behaviour_logprob_temperature"] == 1
        assert (store.about_store["engine"], store.about_store["temperature"]) == ("server", 0.7)
    assert run.scored.shard(0)["mismatch"]["mean"] < 1e-5
    stored = run.scored.read(0)
    assert mismatch(stored)["mean"] > 1e-4  # of two temperatures: `old` itself is that of the sampling
    other = open_run(tmp_path / "here", tiny_config(*drawn[2:]))
    assert other.about["behaviour_logprob_temperature"] == 0.7
    do_part(other, "sample", ignore, never)
    # Scored, they are in the round's order again.
    for a, b in zip(stored, other.rollouts.read(0), strict=True):
        np.testing.assert_array_equal(a.response_ids, b.response_ids)


def test_a_teacher_scored_by_servers_has_no_entropy_and_trains(tmp_path, monkeypatch):
    config = tiny_config(TEACHER, "--schedule.rounds=1", "--sampling.max_response=20", "--loss.top_k=5")
    run = open_run(tmp_path / "run", config)

    def by_servers(run, rows, *, usable, stop):
        here = make_topk_scorer(run.teacher_model, k=5, temperature=1.0, usable=usable)(run.teacher, rows)
        said = jax.device_get(columns_of(here.replace(entropy=None)))
        asked.append(len(rows.mask))
        for count, row in enumerate(reversed(range(len(rows.mask)))):
            if asked == [16] and count == 10:
                raise InputError("the teacher is gone")
            yield row, {name: values[row][rows.mask[row]] for name, values in said.items()}

    asked = []
    monkeypatch.setattr(scoring, "teacher_by_servers", by_servers)
    do_part(run, "sample", ignore, never)
    with pytest.raises(InputError, match="the teacher is gone"):
        do_part(run, "score", ignore, never)
    for part in ("score", "train"):
        do_part(run, part, ignore, never)
    assert asked == [16, 6]  # what was answered is not asked again
    rollout = run.scored.read(0)[0]
    assert rollout.score.teacher_entropy is None
    assert rollout.score.teacher_topk_ids.shape == (len(rollout.response_ids), 5)


def test_servers_are_given_the_student_and_a_probe_of_it(tmp_path):
    served = open_run(tmp_path / "served", tiny_config(*SERVER, "--engine.attempts=1", "--mesh.data=2"))
    with jax.set_mesh(served.mesh):
        engine = server_engine(served, always)
        probe = probe_of(served)
    assert (engine.name, engine.logprob_temperature, engine.stop) == ("server", 1.0, always)
    written, _ = load_pretrained(served.folder / "policy")
    assert written.hidden_size == served.model.hidden_size
    assert len(probe.text) == 16
    assert len(probe.expected) == 15
    assert (probe.expected < 0).all()
    with pytest.raises(InputError, match=r"http://127.0.0.1:9 broke off .* after 1 attempts"):
        do_part(served, "sample", ignore, never)
    assert served.rollouts.rounds == []


def test_servers_draw_as_the_runs_settings_say(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "special_ids", lambda tokenizer, ends: (9, *(20 + i for i in ends)))
    monkeypatch.setattr(engines, "unused_ids", lambda tokenizer: (5,))
    settings = "--sampling.top_p=0.8", "--sampling.top_k=3", "--sampling.ban_special=true", "--seed=7"
    limits = "--sampling.max_response=30", "--sampling.stop_ids=[6]", "--engine.model=policy"
    config = tiny_config(*SERVER, "--sampling.temperature=0.6", *settings, *limits)
    run = open_run(tmp_path / "run", config)
    engine = server_engine(run, always)
    assert (engine.temperature, engine.top_p, engine.top_k, engine.seed) == (0.6, 0.8, 3, 7)
    assert (engine.max_prompt, engine.max_response, engine.model) == (16, 30, "policy")
    assert (engine.ends, engine.banned) == ((0, 6), (5, 9, 20, 26))
    assert (engine.usable, engine.vocabulary) == (len(run.tokenizer), run.model.vocab_size)
    # Servers tell log-probs of temperature 1, whatever they draw at.
    probe = probe_of(run)
    rows = make_rows([probe.text[:1]], [probe.text[1:]], run.width)
    one, own = (
        gather(np.asarray(make_scorer(run.model, temperature=t)(run.policy, rows)), rows.mask)[0]
        for t in (1.0, 0.6)
    )
    np.testing.assert_allclose(probe.expected, one, atol=1e-5)
    assert np.abs(one - own).max() > 0.01


def test_addresses_may_change_when_a_run_goes_on(tmp_path):
    open_run(tmp_path / "run", tiny_config(*SERVER))
    moved = ("--engine.kind=server", "--engine.urls=[http://127.0.0.1:10,http://127.0.0.1:11]")
    assert len(open_run(tmp_path / "run", tiny_config(*moved)).config.engine.urls) == 2
    with pytest.raises(InputError, match="has engine.kind = 'server', not 'jax'"):
        open_run(tmp_path / "run", tiny_config())


def test_a_teacher_that_comes_back_elsewhere_goes_on_but_not_here(tmp_path):
    open_run(tmp_path / "run", tiny_config(TEACHER))
    moved = "--engine.teacher_urls=[http://127.0.0.1:10]", "--engine.teacher_model=teacher"
    engine = open_run(tmp_path / "run", tiny_config(*moved)).config.engine
    assert (engine.teacher_urls, engine.teacher_model) == (("http://127.0.0.1:10",), "teacher")
    with pytest.raises(InputError, match="has engine.teacher_urls = "):
        open_run(tmp_path / "run", tiny_config())


def test_rounds_are_scored_by_the_same_servers(tmp_path, monkeypatch):
    """Which of them failed last is known to all."""
    asked = []
    monkeypatch.setattr(serving, "teacher_rows", lambda servers, *_, **__: asked.append(servers) or [])
    run = open_run(tmp_path / "run", tiny_config(TEACHER))
    for _ in range(2):
        list(teacher_by_servers(run, make_rows([[1]], [[2]], 4), usable=run.usable))
    assert asked[0] is asked[1]


def test_a_server_with_another_model_draws_nothing_for_a_run(tmp_path):
    with FakeServer() as server:
        config = tiny_config("--engine.kind=server", f"--engine.urls=[{server.url}]")
        run = open_run(tmp_path / "run", config)
        with pytest.raises(InputError, match=f"log-probs of {server.url} on a probe differ from the trainer"):
            do_part(run, "sample", ignore, never)
    assert server.seen[1][1]["kwargs"]["weights_path"] == str((tmp_path / "run" / "policy").resolve())
    assert run.rollouts.rounds == []


def test_a_teacher_on_servers_is_not_loaded_here(tmp_path, monkeypatch):
    asked = []
    load = Run._load
    monkeypatch.setattr(
        Run, "_load", lambda self, folder, *a: (asked.append(folder), load(self, folder, *a))[1]
    )
    run = open_run(tmp_path / "run", tiny_config(TEACHER, "--loss.top_k=4"))
    assert asked == [run.student_folder]
    assert "teacher" not in vars(run)
    programs = compile_programs(run.config, run.model, run.teacher_model, run.mesh, run.usable)
    assert "score teacher" not in [program.name for program in programs]
    assert all(program.beside.get("teacher", 0) == 0 for program in programs)
