"""New weights for servers: in the right order, proved, and proved again by a server that was lost."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from opd_jax.interrupt import Interrupted
from opd_jax.rollout import server_refresh
from opd_jax.rollout.server_refresh import Probe, refresh
from opd_jax.rollout.servers import Servers
from tests.rollout.fake_server import FakeServer, drawn, likelihood
from tests.rollout.test_server import assert_drawn, drain, engine, requests

TEXT = [3, 7, 1, 9, 4]


def probe(weights):
    told = [likelihood(a, weights)[b] for a, b in itertools.pairwise(TEXT)]
    return Probe(TEXT, np.float32(told), tolerance=1e-3, drawn=5)


def refreshing(folder, *urls, weights=0, **settings):
    prepare = functools.partial(refresh, folder=folder, model="policy", probe=probe(weights))
    settings = {"concurrency": 2, "timeout": 20.0, "attempts": 3, "pause": 0.02, **settings}
    servers = Servers(urls, **settings, prepare=prepare)
    return dataclasses.replace(engine(*urls), servers=servers)


def test_a_server_gets_the_weights_before_its_first_request(tmp_path):
    with FakeServer() as server:
        server.loads = lambda path: 1
        found, error = drain(refreshing(tmp_path, server.url, weights=1).draw(requests(3)))
        paths = [path for path, _ in server.seen]
    assert error is None
    assert len(found) == 3
    steps = ["/pause?mode=wait", "/collective_rpc", "/resume", *["/v1/completions"] * 5]
    assert paths == steps  # the last: two of the proof, three requests
    assert server.seen[1][1] == {
        "method": "reload_weights",
        "kwargs": {"weights_path": str(tmp_path.resolve())},
    }
    assert not server.paused


@pytest.mark.parametrize("weights", [0, 2])
def test_other_weights_than_the_trainers_draw_nothing(tmp_path, weights):
    with FakeServer() as server:
        server.loads = lambda path: weights
        found, error = drain(refreshing(tmp_path, server.url, weights=1).draw(requests(3)))
    assert found == {}
    assert f"log-probs of {server.url} on a probe differ from the trainer's by" in str(error)
    assert "\n" not in str(error)


def test_logprobs_that_are_not_raw_are_told_from_raw_ones(tmp_path, monkeypatch):
    def truncated(body, weights=0):
        ids, logprobs = drawn(body, weights)
        return ids, [logprob - np.log(0.9) if logprob < -0.2 else logprob for logprob in logprobs]

    monkeypatch.setattr("tests.rollout.fake_server.drawn", truncated)
    with FakeServer() as server:
        _, error = drain(refreshing(tmp_path, server.url).draw(requests(3)))
    assert "differ from its own for tokens that it drew by 0.1" in str(error)
    assert "--logprobs-mode raw_logprobs" in str(error)


def test_a_server_that_calls_all_it_draws_certain_draws_nothing(tmp_path):
    with FakeServer(lambda number, body: "certain") as server:
        found, error = drain(refreshing(tmp_path, server.url).draw(requests(3)))
    assert found == {}
    assert "differ from its own for tokens that it drew by" in str(error)


def test_a_folder_that_the_server_cannot_read_is_named_and_it_goes_on(tmp_path):
    with FakeServer() as server:
        server.loads = lambda path: None
        found, error = drain(refreshing(tmp_path, server.url).draw(requests(3)))
        assert not server.paused
    assert found == {}
    assert f"{server.url} could not load {tmp_path}" in str(error)
    assert [path for path, _ in server.seen].count("/collective_rpc") == 1


def test_a_server_that_was_lost_is_given_the_weights_again(tmp_path):
    """It may have been started anew meanwhile, with the weights that it was first given."""
    wanted = requests(6)
    with FakeServer(lambda number, body: "500" if number == 4 else None) as server:
        found, error = drain(refreshing(tmp_path, server.url).draw(wanted))
        busy = [path for path, _ in server.seen].count("/collective_rpc")
    assert error is None
    assert busy == 2
    for index, generated in found.items():
        assert_drawn(wanted[index], generated)


def test_a_dead_server_is_not_waited_for(tmp_path):
    with FakeServer() as server, FakeServer(lambda number, body: "503") as broken:
        found, error = drain(refreshing(tmp_path, broken.url, server.url).draw(requests(8)))
    assert error is None
    assert len(found) == 8


def loads(server):
    return [path for path, _ in server.seen].count("/collective_rpc")


@pytest.mark.parametrize("fault", ["die", "503", "stall"])
def test_a_server_that_is_lost_over_the_weights_is_set_aside(tmp_path, fault):
    """Though several requests wait for it, it is given them once, as a minute's pause shows."""
    wanted = requests(12)
    with FakeServer() as lost, FakeServer() as well:
        lost.control = lambda path: fault if path == "/collective_rpc" else None
        settings = {"concurrency": 6, "pause": 60.0, "timeout": 1.0 if fault == "stall" else 20.0}
        found, error = drain(refreshing(tmp_path, lost.url, well.url, **settings).draw(wanted))
        assert not lost.paused
    assert error is None
    for index, request in enumerate(wanted):
        assert_drawn(request, found[index])
    assert (loads(lost), loads(well)) == (1, 1)
    assert lost.bodies == []


def test_a_server_that_says_it_cannot_load_them_is_named_though_it_dies_of_it(tmp_path):
    """As vLLM does."""
    with FakeServer() as server, FakeServer() as well:
        server.loads = lambda path: None
        server.control = lambda path: "die" if path == "/resume" else None
        found, error = drain(refreshing(tmp_path, server.url, well.url, concurrency=1).draw(requests(1)))
    assert found == {}
    assert f"{server.url} could not load {tmp_path}" in str(error)
    assert "\n" not in str(error)


def test_weights_that_no_server_lives_to_load_are_an_error_in_a_line(tmp_path):
    with FakeServer() as one, FakeServer() as other:
        for server in (one, other):
            server.control = lambda path: "die" if path == "/collective_rpc" else None
        found, error = drain(refreshing(tmp_path, one.url, other.url).draw(requests(4)))
        assert not one.paused
        assert not other.paused
    assert found == {}
    assert "a server must answer: http://127.0.0.1:" in str(error)
    assert "\n" not in str(error)


def test_a_server_goes_on_when_the_user_stops_while_it_loads(tmp_path):
    with FakeServer() as server:
        server.control = lambda path: "stall" if path == "/collective_rpc" else None
        stopped = dataclasses.replace(refreshing(tmp_path, server.url), stop=lambda: loads(server) == 1)
        with pytest.raises(Interrupted):
            list(stopped.draw(requests(3)))
        assert [path for path, _ in server.seen] == ["/pause?mode=wait", "/collective_rpc", "/resume"]
        assert not server.paused


def test_a_server_that_does_not_go_on_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(server_refresh, "PATIENCE", 0.1)
    with FakeServer() as server:
        server.control = lambda path: None if path.startswith("/pause") else "stall"
        patient = refreshing(tmp_path, server.url, timeout=60.0)
        stopped = dataclasses.replace(patient, stop=lambda: loads(server) == 1)
        with pytest.raises(Interrupted):
            list(stopped.draw(requests(3)))
        assert server.seen[-1][0] == "/resume"
        assert server.paused  # it has not answered yet
