"""One or many HTTP servers: many requests in flight, the least loaded first, one that fails set aside.

Knows addresses, loads, retries and time limits; what is asked and what an answer must look like is
`opd_jax.rollout.server` and `opd_jax.rollout.server_score`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import httpx2
from anyio.from_thread import start_blocking_portal
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from opd_jax.errors import InputError

CONNECT = 10.0  # seconds to wait for a connection
LONGEST = 60.0  # seconds, of a pause between two attempts and of a server's being set aside
BUSY = 429
PASSING = (408, 425, BUSY, 500, 502, 503, 504)  # statuses that another attempt may not meet


class Failure(Exception):
    """An attempt failed in a way that another one, or another server, may not."""

    def __init__(self, reason: str, *, wait: float = 0.0, lost: bool = True) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds that the server asks to be left alone
        self.lost = lost  # False if the server is well, only busy


class Refused(InputError):
    """A server understood a request and will not do it."""

    def __init__(self, url: str, status: int, reason: str) -> None:
        super().__init__(
            f"a server must do what it is asked: {url} answered {status} ({reason}); start it with other "
            "flags, or change the setting it names"
        )
        self.url, self.status, self.reason = url, status, reason


@dataclasses.dataclass(frozen=True)
class Call:
    """One request: where it goes, what it says, and what reads its answer.

    ``read(url, answer)`` raises `InputError` for an answer that is wrong, `Failure` for one that another
    attempt may mend.
    """

    path: str
    body: Any
    read: Callable[[str, Any], Any]


# Posts ``body`` to ``path`` of one server, once: (path, body) -> answer.
Post = Callable[[str, Any], Awaitable[Any]]


@dataclasses.dataclass
class _Server:
    url: str
    load: int = 0  # requests in flight
    served: int = 0
    failures: int = 0  # since it last answered
    failed_at: float = 0.0
    rests_until: float = 0.0
    ready: bool = False  # prepared, and not lost since


class Servers:
    """Servers that do the same, by address.

    Args:
      urls: such as ``http://host:8000``.
      concurrency: requests in flight at a time, over all servers.
      timeout: seconds for a whole answer.
      attempts: at a request.
      pause: seconds before the second attempt where no other server stands in, and of a server's being set
        aside; doubles from one to the next, the former with jitter.
      prepare: done with a server before its first request, and again once it was lost: it may be another
        one since.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        concurrency: int = 64,
        timeout: float = 1800.0,
        attempts: int = 6,
        pause: float = 1.0,
        prepare: Callable[[str, Post], Awaitable[None]] | None = None,
    ) -> None:
        self._fleet = [_Server(url.rstrip("/")) for url in urls]
        self._concurrency, self._timeout, self._prepare = concurrency, timeout, prepare
        self._attempts, self._pause = attempts, pause

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Make all calls; yield ``(index, what was read)`` as they are finished, in any order.

        After a call that failed for good no other is begun; those in flight are finished and yielded
        before the error is raised.

        Raises:
          InputError: a server refused, its answer is wrong, or none answered in all attempts.
        """
        if not calls:
            return
        for server in self._fleet:
            server.failures = 0
        found: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        with start_blocking_portal() as portal:
            future = portal.start_task_soon(self._all, calls, found)
            future.add_done_callback(lambda _: found.put(None))
            try:
                while (one := found.get()) is not None:
                    yield one
                future.result()
            finally:
                future.cancel()

    async def _all(self, calls: Sequence[Call], found: queue.SimpleQueue) -> None:
        waiting, errors, over = iter(enumerate(calls)), list[InputError](), asyncio.Event()
        locks = {server.url: asyncio.Lock() for server in self._fleet}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self._concurrency)
        async with httpx2.AsyncClient(limits=limits, timeout=httpx2.Timeout(None, connect=CONNECT)) as client:

            async def attempt(call: Call) -> Any:
                server = await self._choose(over)
                return await self._attempt(call, server, locks[server.url], client, over)

            async def work() -> None:
                while not errors and (one := next(waiting, None)) is not None:
                    index, call = one
                    try:
                        found.put((index, await self._retried(attempt, call, over)))
                    except InputError as error:
                        errors.append(error)
                        over.set()

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(calls))):
                    group.create_task(work())
        if errors:
            raise errors[0]

    async def _retried(
        self, attempt: Callable[[Call], Awaitable[Any]], call: Call, over: asyncio.Event
    ) -> Any:
        """One call, tried until it is answered or its attempts are spent."""
        exhausted = stop_after_attempt(self._attempts)
        backoff = wait_exponential_jitter(multiplier=self._pause, max=LONGEST, jitter=self._pause)
        retrying = AsyncRetrying(
            sleep=lambda seconds: _nap(over, seconds),
            stop=lambda state: over.is_set() or exhausted(state) or self._all_dead(),
            wait=lambda state: 0.0 if self._rested() else max(backoff(state), _asked_to_wait(state)),
            retry=retry_if_exception_type(Failure),
            reraise=True,
        )
        try:
            return await retrying(attempt, call)
        except Failure as failure:
            raise InputError(
                f"a server must answer: {failure}, after {self._attempts} attempts; look at its log, and go "
                "on with the same command: what is finished is kept"
            ) from None

    async def _choose(self, over: asyncio.Event) -> _Server:
        """The server with the fewest requests in flight; waits where all are set aside."""
        while not (rested := self._rested()) and not over.is_set():
            first = min(server.rests_until for server in self._fleet)
            await _nap(over, max(first - time.monotonic(), self._pause / 10))
        return min(rested or self._fleet, key=lambda server: (server.load, server.served))

    def _rested(self) -> list[_Server]:
        """The servers that are not set aside; one that failed last is first tried with a single request."""
        now = time.monotonic()
        return [
            server
            for server in self._fleet
            if server.rests_until <= now and not (server.failures and server.load)
        ]

    def _all_dead(self) -> bool:
        """Whether every server failed so often in a row, in whoever's hands."""
        return all(server.failures >= self._attempts for server in self._fleet)

    async def _attempt(
        self,
        call: Call,
        server: _Server,
        lock: asyncio.Lock,
        client: httpx2.AsyncClient,
        over: asyncio.Event,
    ) -> Any:
        """One attempt at one server."""
        if over.is_set():
            raise Failure("another request failed for good")
        began, post = time.monotonic(), poster(client, server.url)
        server.load += 1
        try:
            async with asyncio.timeout(self._timeout):
                if self._prepare and not server.ready:
                    async with lock:
                        # What failed for good in another request's hands is not done again.
                        if not server.ready and not over.is_set():
                            await self._prepare(server.url, post)
                            server.ready = True
                    if not server.ready:
                        raise Failure("another request failed for good")
                read = call.read(server.url, await post(call.path, call.body))
        except TimeoutError:
            failure = Failure(f"{server.url} did not answer within {self._timeout:g} s")
            self._set_aside(server, began, failure)
            raise failure from None
        except Failure as failure:
            self._set_aside(server, began, failure)
            raise
        finally:
            server.load -= 1
        server.failures = 0
        server.served += 1
        return read

    def _set_aside(self, server: _Server, began: float, failure: Failure) -> None:
        """Leave a server alone for a while, the longer the more often it failed in a row."""
        now = time.monotonic()
        if failure.lost:
            server.ready = False
        if began >= server.failed_at:  # not once for each of the requests that were in flight together
            server.failures += 1
            server.failed_at = now
        pause = min(LONGEST, self._pause * 2 ** (server.failures - 1))
        server.rests_until = max(server.rests_until, now + max(pause, failure.wait))


async def _nap(over: asyncio.Event, seconds: float) -> None:
    """Sleep, unless all is over."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), seconds)


def _asked_to_wait(state: RetryCallState) -> float:
    """Seconds that the last answer asked for."""
    error = state.outcome.exception() if state.outcome else None
    return error.wait if isinstance(error, Failure) else 0.0


def poster(client: httpx2.AsyncClient, url: str) -> Post:
    """What posts to one server, once."""

    async def post(path: str, body: Any) -> Any:
        try:
            response = await client.post(url + path, json=body)
        except httpx2.HTTPError as error:
            raise Failure(f"{url} broke off ({_short(str(error) or type(error).__name__)})") from None
        status = response.status_code
        if status in PASSING:
            wait = _seconds(response.headers.get("Retry-After")) if status == BUSY else 0.0
            reason = f"{url} answered {status} ({_reason(response)})"
            raise Failure(reason, wait=wait, lost=status != BUSY)
        if status != 200:
            raise Refused(url, status, _reason(response))
        try:
            return response.json() if response.content else None
        except ValueError:
            raise InputError(
                f"a server must answer in JSON: {url}{path} did not ({_short(response.text)}); name the "
                "address of an OpenAI-compatible server"
            ) from None

    return post


def _seconds(text: str | None) -> float:
    """Of a Retry-After header; its other form, a date, is passed over."""
    try:
        return min(LONGEST, max(0.0, float(text or 0)))
    except ValueError:
        return 0.0


def _reason(response: httpx2.Response) -> str:
    """What a server says of an error."""
    try:
        told = response.json()
        error = told.get("error") or told.get("detail")
        return _short(str(error.get("message") if isinstance(error, dict) else error))
    except (ValueError, AttributeError):
        return _short(response.text) or response.reason_phrase


def _short(text: str) -> str:
    return " ".join(text.split())[:300]
