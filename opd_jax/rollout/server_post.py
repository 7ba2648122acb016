"""One request to one HTTP server, once: what its status means, and whether another attempt may help."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import re
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2

from opd_jax.errors import InputError

LONGEST = 60.0  # seconds, of a server's being set aside, for whatever it asks
BUSY = 429
PASSING = (408, 425)  # statuses that another attempt may not meet, beside those from 500 on


class Failure(Exception):
    """An attempt failed in a way that another one, or another server, may not."""

    def __init__(self, reason: str, *, wait: float = 0.0, status: int | None = None) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds that the server asks to be left alone
        self.status = status  # of its answer, where there was one


class Busy(Failure):
    """A server is well, but has no room for another request."""


class Wrong(InputError):
    """A server's answer cannot be right; another server's may be."""


class Refused(InputError):
    """A server understood a request and will not do it."""

    def __init__(self, url: str, status: int, reason: str) -> None:
        super().__init__(
            f"a server must do what it is asked: {url} answered {status} ({reason}); start it with other "
            "flags, or change the setting it names"
        )
        self.url, self.status, self.reason = url, status, reason


# Posts ``body`` to ``path`` of one server, once: (path, body) -> answer.
Post = Callable[[str, Any], Awaitable[Any]]


def address(url: str) -> str:
    """A server's address, without the /v1 that the base URLs of OpenAI's clients end in.

    Raises:
      InputError: it has another path, or a user's name, or is no address.
    """
    base, rest = "", ""
    with contextlib.suppress(ValueError, httpx2.InvalidURL):  # of what is no address, or has no such port
        parts = urllib.parse.urlsplit(url)
        user, at, place = parts.netloc.rpartition("@")
        path = parts.path.rstrip("/").removesuffix("/v1")
        rest = parts._replace(scheme="", netloc=user + at, path=path).geturl()
        odd = re.search(r"[\s\\]", place) or parts.scheme not in ("http", "https")
        httpx2.URL(url)  # would refuse it later
        if parts.hostname and parts.port != 0 and not odd:
            base = f"{parts.scheme}://{place}"
    if rest or not base:
        shown = re.sub("//.*@", "//...@", url)  # without a password
        raise InputError(
            f"a server's address is a host and a port: got {shown!r}; write it as "
            f"{base or 'http://host:8000'}"
        )
    return base


def poster(client: httpx2.AsyncClient, url: str) -> Post:
    """What posts to one server, once."""

    async def post(path: str, body: Any) -> Any:
        try:
            response = await client.post(url + path, json=body)
        except httpx2.HTTPError as error:
            raise Failure(f"{url} broke off ({_short(str(error) or type(error).__name__)})") from None
        status = response.status_code
        if status == BUSY or status in PASSING or status >= 500:
            wait = _seconds(response.headers.get("Retry-After"))
            kind = Busy if status == BUSY else Failure
            raise kind(f"{url} answered {status} ({_reason(response)})", wait=wait, status=status)
        if status != 200:
            raise Refused(url, status, _reason(response))
        try:
            return response.json() if response.content else None
        except (ValueError, RecursionError):
            raise Wrong(
                f"a server must answer in JSON: {url}{path} did not ({_short(response.text)}); name the "
                "address of an OpenAI-compatible server"
            ) from None

    return post


def _seconds(header: str | None) -> float:
    """Of a Retry-After header, which holds seconds or a date."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(str(header))
            seconds = (until - datetime.datetime.now(datetime.UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(LONGEST, max(0.0, seconds))


def _reason(response: httpx2.Response) -> str:
    """What a server says of an error."""
    try:
        told = response.json()
        error = told.get("error") or told.get("detail")
        return _short(str(error.get("message") if isinstance(error, dict) else error))
    except (ValueError, AttributeError, RecursionError):
        return _short(response.text) or response.reason_phrase


def _short(text: str) -> str:
    return " ".join(text.split())[:300]
