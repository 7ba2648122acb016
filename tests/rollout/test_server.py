"""Drawing from servers that are well, busy, dead, stalled or wrong: the error is clear, nothing is lost."""

import dataclasses
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted
from opd_jax.keys import derived_seed
from opd_jax.rollout import Request
from opd_jax.rollout.server import ServerEngine
from opd_jax.rollout.servers import Servers
from tests.rollout.fake_server import EOS, USABLE, VOCABULARY, FakeServer, drawn

R = 6


def engine(*urls, seed=0, model="", **settings) -> ServerEngine:
    settings = {"concurrency": 1, "timeout": 20.0, "attempts": 3, "pause": 0.02, **settings}
    return ServerEngine(
        servers=Servers(urls, **settings),
        model=model,
        seed=seed,
        temperature=0.7,
        top_p=0.9,
        max_prompt=4,
        max_response=R,
        ends=(EOS,),
        usable=USABLE,
        vocabulary=VOCABULARY,
    )


def requests(count):
    return [Request(np.array([1 + i % 5, 7], np.int32), 100 + i, i % 2) for i in range(count)]


def expected(request, seed=0):
    name = derived_seed(seed, "sample", request.problem, request.sample)
    return drawn({"prompt": np.asarray(request.prompt_ids).tolist(), "seed": name, "max_tokens": R})


def assert_drawn(request, generated):
    ids, logprobs = expected(request)
    np.testing.assert_array_equal(generated.ids, ids)
    np.testing.assert_array_equal(generated.logprobs, np.float32(logprobs))
    assert generated.truncated == (ids[-1] != EOS)
    assert (generated.ids.dtype, generated.logprobs.dtype) == (np.int32, np.float32)


def drain(iterator):
    """What was yielded, and the error that ended it."""
    found = {}
    try:
        for index, one in iterator:
            assert index not in found
            found[index] = one
    except InputError as error:
        return found, error
    return found, None


def test_every_rollout_is_a_request_of_its_own():
    wanted = requests(12)
    with FakeServer() as server:
        found = dict(engine(server.url, concurrency=4, model="policy").draw(wanted))
        again = dict(engine(server.url + "/v1/", concurrency=4).draw(wanted[5:7]))
    assert sorted(found) == list(range(12))
    for index, generated in found.items():
        assert_drawn(wanted[index], generated)
    np.testing.assert_array_equal(again[1].ids, found[6].ids)  # goes on at the prompt where it stopped
    assert {generated.truncated for generated in found.values()} == {True, False}
    body = next(body for body in server.bodies if body["seed"] == derived_seed(0, "sample", 100, 0))
    assert body == {
        "model": "policy",
        "prompt": [1, 7],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "watermarking": False,
        "max_tokens": R,
        "logprobs": 0,
        "return_token_ids": True,
        "seed": derived_seed(0, "sample", 100, 0),
        "stop_token_ids": [EOS],
        "logit_bias": {"12": -100, "13": -100, "14": -100, "15": -100},
    }
    assert "model" not in server.bodies[-1]
    assert len({body["seed"] for body in server.bodies}) == 12


def test_an_id_that_is_banned_is_refused_where_a_server_draws_it_all_the_same():
    [request] = requests(1)
    ids, _ = expected(request)
    with FakeServer() as server:
        limited = dataclasses.replace(engine(server.url), top_k=3, banned=(int(ids[0]), 99))
        found, error = drain(limited.draw([request]))
    assert found == {}
    assert f"{server.url} gave id {ids[0]}, which it was told never to draw; use" in str(error)
    assert "\n" not in str(error)
    assert server.bodies[0]["logit_bias"][str(ids[0])] == -100
    assert server.bodies[0]["top_k"] == 3


def test_a_policy_may_be_certain():
    with FakeServer(lambda number, body: "certain") as server:
        found, error = drain(engine(server.url).draw(requests(1)))
    assert error is None
    assert not found[0].logprobs.any()


def test_prompts_must_fit_before_anything_is_asked():
    with FakeServer() as server:
        for ids in ([], [1] * 5):
            with pytest.raises(InputError, match="1 to 4 tokens"):
                engine(server.url).draw([*requests(1), Request(ids, 0, 0)])
    assert server.seen == []


def test_so_many_requests_are_in_flight_and_no_more():
    with FakeServer(lambda number, body: "hold") as server, ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: dict(engine(server.url, concurrency=5).draw(requests(12))))
        for _ in range(5):
            assert server.arrived.acquire(timeout=10)
        assert not server.arrived.acquire(timeout=0.2)
        server.release.set()
        assert len(found.result(20)) == 12


def test_the_least_loaded_server_comes_first():
    slow, quick = FakeServer(lambda number, body: "hold"), FakeServer()
    with slow, quick, ThreadPoolExecutor(1) as pool:
        several = engine(slow.url, quick.url, concurrency=4)
        found = pool.submit(lambda: dict(several.draw(requests(20))))
        while len(quick.seen) < 17:
            assert quick.arrived.acquire(timeout=10)
        slow.release.set()
        assert len(found.result(20)) == 20
    # A request is given to a server that holds no more than the other, so the slow one never has four.
    assert 2 <= len(slow.seen) <= 3
    assert len(slow.seen) + len(quick.seen) == 20


def test_servers_that_are_alike_share_alike():
    with FakeServer() as one, FakeServer() as other:
        assert len(dict(engine(one.url, other.url).draw(requests(10)))) == 10
    assert len(one.seen) == len(other.seen) == 5


@pytest.mark.parametrize("fault", ["die", "die midway", "429", "500", "501", "503", "529", "stall", "abort"])
def test_a_fault_that_passes_costs_nothing(fault):
    wanted = requests(6)
    with FakeServer(lambda number, body: fault if number == 2 else None) as server:
        found, error = drain(engine(server.url, timeout=0.6 if fault == "stall" else 20.0).draw(wanted))
    assert error is None
    assert len(server.seen) == 7
    for index, request in enumerate(wanted):
        assert_drawn(request, found[index])


@pytest.mark.parametrize("fault", ["429", "503"])
def test_a_busy_server_is_left_alone_as_long_as_it_asks(fault):
    with FakeServer(lambda number, body: fault if number == 1 else None) as server:
        assert len(dict(engine(server.url).draw(requests(4)))) == 4
    refused, after = server.times[1:3]
    assert after - refused >= 0.4  # Retry-After; the pause would be 0.04 at most


@pytest.mark.parametrize(
    ("fault", "message", "tries"),
    [
        ("die", r"must answer: URL broke off \(.*after 3 attempts", 3),
        ("die midway", r"must answer: URL broke off \(.*after 3 attempts", 3),
        ("500", r"must answer: URL answered 500 \(a 500\), after 3 attempts", 3),
        ("429", r"must answer: URL answered 429 \(a 429\), and none had an answer for 0.6 s", 3),
        ("stall", r"must answer: URL did not answer within 0.6 s, after 3 attempts", 3),
        ("abort", r"must answer: URL broke off a response, after 3", 3),
        ("404", r"URL answered 404 \(a 404\)", 1),
        ("page", r"in JSON: URL/v1/completions did not \(<html>welcome</html>\)", 1),
        ("half", r"in JSON: URL/v1/completions did not \({.choices.: \[\)", 1),
        ("deep", r"in JSON: URL/v1/completions did not \(\[\[\[", 1),
        ("nan", "URL gave nan as a log-prob", 1),
        ("floor", "URL gave -9999.0 as a log-prob", 1),
        ("positive", "URL gave 0.5 as a log-prob", 1),
        ("impossible", "URL gave -9998.0 as the log-prob of a token that it drew at temperature 0.7", 1),
        ("count", r"URL gave (\d) tokens and \d log-probs", 1),
        ("empty", "URL gave 0 tokens for a limit of 6", 1),
        ("echo", "URL gave an answer to another prompt", 1),
        ("id", "URL gave id 12 where 12 ids mean something", 1),
        ("no eos", "URL gave finish_reason 'stop' with a response whose last id is 2", 1),
        ("past eos", "URL gave finish_reason 'stop' with a response whose last id is 0", 1),
        ("cut", "URL gave a response cut off at 2 of 6 tokens; raise its --max-model-len", 1),
        ("long", "URL gave 99 tokens for a limit of 6", 1),
        ("float ids", r"URL gave token_ids or token_logprobs that are no numbers \(float\)", 1),
        ("text ids", r"URL gave token_ids or token_logprobs that are no numbers \(str\)", 1),
        ("text logprobs", r"URL gave token_ids or token_logprobs that are no numbers \(str\)", 1),
        ("no ids", "URL gave no token_ids or no token_logprobs", 1),
    ],
)
def test_a_fault_that_stays_is_one_line_and_what_is_finished_is_kept(fault, message, tries):
    wanted = requests(6)
    bad, timeout = derived_seed(0, "sample", 103, 1), 0.6 if fault in ("stall", "429") else 20.0
    with FakeServer(lambda number, body: fault if body["seed"] == bad else None) as server:
        found, error = drain(engine(server.url, timeout=timeout).draw(wanted))
    assert sorted(found) == [0, 1, 2]
    for index, generated in found.items():
        assert_drawn(wanted[index], generated)
    assert error is not None
    assert "\n" not in str(error)
    assert len(str(error)) < 500
    with pytest.raises(InputError, match=message.replace("URL", server.url)):
        raise error
    assert [body["seed"] for body in server.bodies].count(bad) == tries
    assert len(server.bodies) == 3 + tries  # nothing is begun after it


@pytest.mark.parametrize("fault", ["nan", "half", "float ids"])
def test_a_wrong_answer_is_asked_for_once_more_elsewhere(fault):
    with FakeServer(lambda number, body: fault) as wrong, FakeServer() as well:
        found, error = drain(engine(wrong.url, well.url, concurrency=4, pause=60.0).draw(requests(30)))
        assert error is None
        assert sorted(found) == list(range(30))
        assert len(wrong.bodies) <= 4
        with FakeServer(lambda number, body: fault) as too:
            found, error = drain(engine(wrong.url, too.url).draw(requests(3)))
        assert found == {}
        assert too.url in str(error)
        assert len(too.bodies) == 1


def test_a_wrong_answer_is_asked_for_at_two_servers_and_no_more():
    one, two, three = FakeServer(lambda n, body: "nan"), FakeServer(lambda n, body: "nan"), FakeServer()
    with one, two, three:
        found, error = drain(engine(one.url, two.url, three.url, pause=0.0).draw(requests(1)))
    assert found == {}
    assert two.url in str(error)
    assert [len(server.bodies) for server in (one, two, three)] == [1, 1, 0]


def test_a_server_that_failed_is_not_waited_for_to_mend_a_wrong_answer():
    with FakeServer(lambda number, body: "die") as dead, FakeServer(lambda number, body: "nan") as wrong:
        _, error = drain(engine(dead.url, wrong.url, pause=60.0).draw(requests(1)))
    assert f"{wrong.url} gave nan" in str(error)


def test_a_server_with_little_room_loses_nothing():
    wanted = requests(40)
    with FakeServer(lambda number, body: time.sleep(0.01)) as server:
        server.room = 3
        found, error = drain(engine(server.url, concurrency=20, attempts=1).draw(wanted))
    assert error is None
    assert len(server.bodies) > 40
    for index, request in enumerate(wanted):
        assert_drawn(request, found[index])


def test_a_busy_server_is_given_what_it_has_room_for():
    with FakeServer(lambda number, body: "hold") as server, ThreadPoolExecutor(1) as pool:
        server.room = 2
        several = engine(server.url, concurrency=16)
        found = pool.submit(lambda: dict(several.draw(requests(20))))
        for _ in range(16):
            assert server.arrived.acquire(timeout=10)
        while server.arrived.acquire(timeout=0.2):
            assert len(server.seen) <= 16 + 8 + 4  # half as many each time
        server.room = 1000
        server.release.set()
        assert len(found.result(20)) == 20
        # Every answer let it have one more.
        while server.arrived.acquire(blocking=False):
            pass
        server.release.clear()
        found = pool.submit(lambda: dict(several.draw(requests(20))))
        for _ in range(16):
            assert server.arrived.acquire(timeout=2)
        server.release.set()
        assert len(found.result(20)) == 20


def test_what_is_in_flight_when_another_fails_is_kept_too():
    wanted = requests(9)
    bad = derived_seed(0, "sample", 102, 0)

    def fault(number, body):
        return "nan" if body["seed"] == bad else "hold"

    with FakeServer(fault) as server, ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: drain(engine(server.url, concurrency=4).draw(wanted)))
        for _ in range(4):
            assert server.arrived.acquire(timeout=10)
        assert not server.arrived.acquire(timeout=0.2)
        server.release.set()
        found, error = done.result(20)
    assert sorted(found) == [0, 1, 3]
    assert "nan as a log-prob" in str(error)


def test_a_pause_ends_when_another_request_fails_for_good():
    first, bad = (derived_seed(0, "sample", 100 + i, i) for i in range(2))

    def fault(number, body):
        return {first: "500", bad: "nan"}.get(body["seed"])

    with FakeServer(fault) as broken, FakeServer(fault) as server:
        servers = engine(broken.url, server.url, concurrency=2, pause=60.0)
        found, error = drain(servers.draw(requests(2)))  # waits a minute, or fails at once
    assert found == {}
    assert "nan as a log-prob" in str(error)


def dead_url() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_dead_server_is_set_aside_while_another_serves():
    wanted = requests(30)
    with FakeServer() as server, FakeServer(lambda number, body: "500") as broken:
        urls = dead_url(), broken.url, server.url
        # A minute to wait out, if a request stayed with a server that failed it.
        found, error = drain(engine(*urls, concurrency=4, pause=60.0).draw(wanted))
    assert error is None
    assert sorted(found) == list(range(30))
    assert len(broken.bodies) <= 4  # what was in flight when it failed first


def test_no_server_at_all_is_said_in_a_line():
    url = dead_url()
    found, error = drain(engine(url, concurrency=4).draw(requests(5)))
    assert found == {}
    assert str(error).startswith(f"a server must answer: {url} broke off (")


def test_many_waiting_requests_give_up_on_a_dead_server_together():
    with FakeServer(lambda number, body: "503") as server:
        found, error = drain(engine(server.url, concurrency=20, attempts=4).draw(requests(50)))
    assert found == {}
    assert "answered 503 (a 503), after 4 attempts" in str(error)
    assert len(server.bodies) <= 20 + 3  # all at once, and then one at a time


def test_a_server_that_fails_again_is_left_alone_for_twice_as_long():
    with FakeServer(lambda number, body: "500") as server:
        drain(engine(server.url, attempts=4, pause=0.1).draw(requests(1)))
    assert (np.diff(server.times) >= [0.1, 0.2, 0.4]).all()


def test_a_server_is_never_left_alone_for_long(monkeypatch):
    monkeypatch.setattr("opd_jax.rollout.servers.LONGEST", 0.01)
    with FakeServer(lambda number, body: "500" if number < 2 else None) as server:
        assert len(dict(engine(server.url, pause=1000.0).draw(requests(1)))) == 1


def test_a_server_that_comes_back_serves_again():
    with FakeServer(lambda number, body: "500" if number < 2 else None) as lame, FakeServer() as well:
        found = dict(engine(lame.url, well.url, pause=0.01, attempts=9).draw(requests(200)))
    assert len(found) == 200
    assert len(lame.bodies) > 5


def test_what_failed_last_is_known_to_the_next_run():
    with FakeServer(lambda number, body: "die") as dead, FakeServer() as well:
        servers = engine(dead.url, well.url, concurrency=4, pause=0.2)
        assert len(dict(servers.draw(requests(4)))) == 4
        before = len(dead.bodies)
        time.sleep(0.25)
        assert len(dict(servers.draw(requests(4)))) == 4
        assert len(dead.bodies) == before + 1


def test_servers_that_were_given_up_on_are_asked_anew():
    with FakeServer(lambda number, body: "die" if number < 3 else None) as server:
        servers = engine(server.url, attempts=2)
        assert drain(servers.draw(requests(2)))[1] is not None
        assert len(dict(servers.draw(requests(2)))) == 2


def test_a_user_who_wants_to_stop_is_heard_while_requests_are_in_flight():
    found, wanted = {}, requests(9)
    early = [derived_seed(0, "sample", one.problem, one.sample) for one in wanted[:2]]
    with FakeServer(lambda number, body: None if body["seed"] in early else "hold") as server:
        several = dataclasses.replace(
            engine(server.url, concurrency=2, timeout=60.0), stop=lambda: len(server.seen) == 4
        )
        with pytest.raises(Interrupted):
            found.update(several.draw(wanted))
    assert sorted(found) == [0, 1]


def test_a_request_may_have_a_seed_and_a_limit_of_its_own():
    prompt = np.array([1, 7], np.int32)
    wanted = [Request(prompt, 5, sample, max_response=3, seed=9) for sample in range(2)]
    with FakeServer() as server:
        found = dict(engine(server.url).draw([*wanted, Request(prompt, 5, 0)]))
        for limit in (0, R + 1):
            with pytest.raises(InputError, match=f"limit must be 1 to {R} tokens: one is {limit};"):
                engine(server.url).draw([Request(prompt, 5, 0, max_response=limit)])
    names = (9, "request", 5, 0), (9, "request", 5, 1), (0, "sample", 5, 0)
    asked = [{"prompt": [1, 7], "seed": derived_seed(*name)} for name in names]
    for index, (body, limit) in enumerate(zip(asked, (3, 3, R), strict=True)):
        ids, _ = drawn({**body, "max_tokens": limit})
        np.testing.assert_array_equal(found[index].ids, ids)
        assert found[index].truncated == (ids[-1] != EOS)
    assert [body["max_tokens"] for body in server.bodies] == [3, 3, R]


def test_whoever_stops_listening_leaves_nothing_running():
    with FakeServer(lambda number, body: "hold" if number else None) as server:
        iterator = engine(server.url, concurrency=3, timeout=60.0).draw(requests(9))
        next(iterator)
        iterator.close()  # returns although two requests are never answered
        assert len(server.seen) <= 4
