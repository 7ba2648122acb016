"""Scores from servers against the distribution that the server draws from, and every way they go wrong."""

import itertools

import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted
from opd_jax.rollout import make_rows
from opd_jax.rollout.server_score import teacher_rows
from opd_jax.rollout.servers import Servers
from tests.rollout.fake_server import CAP, USABLE, VOCABULARY, FakeServer, likelihood, together

PROMPTS, RESPONSES = [[3, 7], [5], [1, 2, 3]], [[4, 11, 0], [9], [2, 2, 8, 6]]


def score(server, k, usable=USABLE):
    rows = make_rows(PROMPTS, RESPONSES, 8)
    told = teacher_rows(Servers([server.url], pause=0.01), "", rows, k, usable=usable, vocabulary=VOCABULARY)
    return rows, together(told, rows, k)


@pytest.mark.parametrize("k", [1, 3, CAP])
def test_the_likeliest_ids_and_the_target_of_every_position(k):
    with FakeServer() as server:
        rows, told = score(server, k)
    assert told.entropy is None
    for row, position in zip(*np.nonzero(rows.mask), strict=True):
        want = likelihood(int(rows.tokens[row, position]))
        best = np.argsort(-want, kind="stable")[:k]
        np.testing.assert_array_equal(told.ids[row, position], best)
        np.testing.assert_allclose(told.logprobs[row, position], want[best], rtol=1e-6)
        assert told.sampled[row, position] == pytest.approx(want[rows.targets[row, position]], rel=1e-6)
    assert not np.any(told.sampled[~rows.mask])
    assert rows.mask.sum() == 8


def test_where_padding_is_likely_more_are_asked_for(monkeypatch):
    usable = VOCABULARY - 5  # id 11 is padding now, and likely after some ids
    with FakeServer() as server:
        with pytest.raises(InputError, match=r"loss.top_k asks for 4 and 5 ids of vocabulary padding; .* 9"):
            score(server, 4, usable)
        monkeypatch.setattr("tests.rollout.fake_server.CAP", 99)
        rows, told = score(server, 4, usable)
        asked = [body["prompt_logprobs"] for body in server.bodies]
    assert sorted(set(asked)) == [4, 9]
    for row, position in zip(*np.nonzero(rows.mask), strict=True):
        want = likelihood(int(rows.tokens[row, position]))[:usable]
        np.testing.assert_array_equal(told.ids[row, position], np.argsort(-want, kind="stable")[:4])


def test_the_cap_is_named():
    with (
        FakeServer() as server,
        pytest.raises(InputError, match=rf"{server.url} allows 5, loss.top_k asks for 6; .*logprobs 6") as e,
    ):
        score(server, 6)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "gave nan as a log-prob"),
        ("count", r"gave \d prompt_logprobs for \d tokens"),
        ("none", r"gave no prompt_logprobs for \d tokens"),
        ("fewer", r"gave (\d of 3 likeliest ids|no log-prob of the token at \d)"),
        ("lacks", r"gave no log-prob of the token at \d"),
        ("-1", "gave id -1 where there are 16"),
        ("16", "gave id 16 where there are 16"),
        ("mass", r"gave ids of [34]\.?\d* in probability together"),
        ("404", r"answered 404 \(a 404\)"),
        ("500", r"must answer: .* answered 500 \(a 500\), after 6 attempts"),
    ],
)
def test_scores_that_cannot_be_trusted_are_refused(fault, message):
    with (
        FakeServer(lambda number, body: fault if len(body["prompt"]) == 7 else None) as server,
        pytest.raises(InputError, match=message) as error,
    ):
        score(server, 3)
    assert "\n" not in str(error.value)
    assert server.url in str(error.value)


def test_rows_come_as_they_are_finished_and_not_all_need_to():
    rows = make_rows(PROMPTS, RESPONSES, 8)
    with FakeServer(lambda number, body: "hold" if len(body["prompt"]) == 7 else None) as server:
        servers = Servers([server.url], timeout=60.0)
        found = teacher_rows(servers, "", rows, 3, usable=USABLE, vocabulary=VOCABULARY)
        early = dict(itertools.islice(found, 2))  # the third row is never answered
        found.close()
        stopped = teacher_rows(
            servers, "", rows, 3, usable=USABLE, vocabulary=VOCABULARY, stop=lambda: len(server.seen) == 6
        )
        with pytest.raises(Interrupted):
            list(stopped)
    assert sorted(early) == [0, 1]
    for row, (sampled, ids, logprobs) in early.items():
        count = len(RESPONSES[row])
        assert (sampled.shape, ids.shape, logprobs.shape) == ((count,), (count, 3), (count, 3))
