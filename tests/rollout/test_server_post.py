"""A single request: the address it goes to, and what its status and headers mean."""

import asyncio
import datetime
import email.utils

import httpx2
import pytest

from opd_jax.errors import InputError
from opd_jax.rollout.server_post import Busy, Failure, Refused, address, poster


def post(status, **headers):
    """Post once to a server that answers so."""

    async def once():
        transport = httpx2.MockTransport(lambda request: httpx2.Response(status, headers=headers, json={}))
        async with httpx2.AsyncClient(transport=transport) as client:
            return await poster(client, "http://a")("/x", None)

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, Busy), *((status, Failure) for status in (408, 425, 500, 501, 503, 504, 529, 599))],
)
def test_statuses_that_pass(status, kind):
    with pytest.raises(Failure, match=f"http://a answered {status}") as error:
        post(status)
    assert type(error.value) is kind


@pytest.mark.parametrize("status", [204, 301, 400, 404])
def test_statuses_that_stay(status):
    with pytest.raises(Refused, match=f"http://a answered {status}"):
        post(status)


def at(seconds):
    return email.utils.format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), usegmt=True
    )


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("1e9", 60, 60),
        ("-5", 0, 0),
        ("nan", 0, 0),
        ("soon", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 0, 0),
        ("Wed, 21 Oct 99999999999999999999 07:28:00 GMT", 0, 0),
        (lambda: at(40), 20, 40),
        (lambda: at(4000), 60, 60),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_how_long_a_server_asks_to_be_left_alone(status, header, least, most):
    with pytest.raises(Failure) as error:
        post(status, **{"Retry-After": header if isinstance(header, str) else header()})
    assert least <= error.value.wait <= most


@pytest.mark.parametrize("url", ["http://a:8000", "http://a:8000/", "http://a:8000/v1", "http://a:8000/v1/"])
def test_an_address_may_be_the_base_url_of_openais_clients(url):
    assert address(url) == "http://a:8000"


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("http://a:8000/v1/completions", "http://a:8000"),
        ("https://a/b/v1", "https://a"),
        ("http://a/?b=1", "http://a"),
        ("http://a:port", "http://host:8000"),
        ("http://", "http://host:8000"),
        ("http://[a", "http://host:8000"),
        ("a:8000", "http://host:8000"),
        ("ftp://a:8000", "http://host:8000"),
        ("http://a b:8000", "http://host:8000"),
        ("http://a\\b:8000", "http://host:8000"),
        ("http://a:8000\n", "http://host:8000"),
        ("http://a:99999", "http://host:8000"),
        ("http://256.1.1.1:80", "http://host:8000"),
        ("http://[v1.a]:80", "http://host:8000"),
        ("http://\N{SNOWMAN}.\N{ONE DOT LEADER}:80", "http://host:8000"),
    ],
)
def test_whatever_else_is_refused(url, remedy):
    with pytest.raises(InputError) as error:
        address(url)
    assert str(error.value).endswith(f"got {url!r}; write it as {remedy}")


@pytest.mark.parametrize("user", ["me:hush@", "me@", "@"])
def test_an_address_holds_no_password_and_the_refusal_shows_none(user):
    with pytest.raises(InputError) as error:
        address(f"https://{user}a:8000/v1")
    assert str(error.value).endswith("got 'https://...@a:8000/v1'; write it as https://a:8000")
