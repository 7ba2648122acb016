"""One or many HTTP servers: many requests in flight, the least loaded first, one that fails set aside.

Knows loads, retries and time limits; what is asked and what an answer must look like is
`opd_jax.rollout.server` and `opd_jax.rollout.server_score`, a single request `opd_jax.rollout.server_post`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import httpx2
from anyio.from_thread import start_blocking_portal

from opd_jax.errors import InputError
from opd_jax.interrupt import Interrupted, Stop, never
from opd_jax.rollout.server_post import LONGEST, Busy, Failure, Post, Wrong, address, poster

CONNECT = 10.0  # seconds to wait for a connection
LOOK = 0.2  # seconds between two looks at whether the user wants to stop


@dataclasses.dataclass(frozen=True)
class Call:
    """One request: where it goes, what it says, and what reads its answer.

    ``read(url, answer)`` raises `Wrong` for an answer that cannot be right, `Failure` for one that another
    attempt may mend.
    """

    path: str
    body: Any
    read: Callable[[str, Any], Any]


@dataclasses.dataclass
class _Server:
    url: str
    allowance: int  # requests in flight that it has room for, as far as is known
    load: int = 0  # requests in flight
    served: int = 0
    failures: int = 0  # since it last answered
    failed_at: float = 0.0
    refusals: int = 0  # since it last answered: busy though nothing was in flight from here
    refused_at: float = 0.0
    rests_until: float = 0.0
    ready: bool = False  # prepared, and not lost since

    def is_free(self, now: float) -> bool:
        """Whether it takes another request; one that failed last is first tried with a single one."""
        return self.rests_until <= now and self.load < (1 if self.failures else self.allowance)


@dataclasses.dataclass
class _Session:
    """What belongs to one `Servers.run`."""

    client: httpx2.AsyncClient
    locks: dict[str, asyncio.Lock]
    answered_at: float  # when any server last answered
    over: bool = False  # a call failed for good: nothing is begun any more
    news: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Wake whoever waits for a server."""
        self.news.set()
        self.news = asyncio.Event()


class Servers:
    """Servers that do the same, by address; what is known of their health is kept from one run to the next.

    Args:
      urls: such as ``http://host:8000``.
      concurrency: requests in flight at a time, over all servers. One that answers 429 is given half of
        what it had, and one more with every answer.
      timeout: seconds for a whole answer; also how long all may be busy without one.
      attempts: at a request; to be told that a server is busy is none.
      pause: seconds of a server's being set aside; doubles from one time to the next.
      prepare: done with a server before its first request, and again once it was lost: it may be another
        one since.

    Raises:
      InputError: one of the addresses is none.
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
        self._fleet = [_Server(url, concurrency) for url in dict.fromkeys(map(address, urls))]
        self._concurrency, self._timeout, self._prepare = concurrency, timeout, prepare
        self._attempts, self._pause = attempts, pause

    def run(self, calls: Sequence[Call], stop: Stop = never) -> Iterator[tuple[int, Any]]:
        """Make all calls; yield ``(index, what was read)`` as they are finished, in any order.

        After a call that failed for good no other is begun; those in flight are finished and yielded
        before the error is raised. Closing breaks off those in flight.

        Raises:
          InputError: a server refused, its answer is wrong, or none answered in all attempts.
          Interrupted: ``stop`` turned true; those in flight were broken off, what was finished yielded.
        """
        if not calls:
            return
        if self._all_dead():  # given up on before, and asked anew
            for server in self._fleet:
                server.failures = 0
        found: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        with start_blocking_portal() as portal:
            future = portal.start_task_soon(self._all, calls, found)
            future.add_done_callback(lambda _: found.put(None))
            try:
                while (one := _next(found, future, stop)) is not None:
                    yield one
                if future.cancelled():
                    raise Interrupted
                future.result()
            finally:
                future.cancel()

    async def _all(self, calls: Sequence[Call], found: queue.SimpleQueue) -> None:
        waiting, errors = iter(enumerate(calls)), list[InputError]()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self._concurrency)
        async with httpx2.AsyncClient(limits=limits, timeout=httpx2.Timeout(None, connect=CONNECT)) as client:
            locks = {server.url: asyncio.Lock() for server in self._fleet}
            session = _Session(client, locks, time.monotonic())

            async def work() -> None:
                while not errors and (one := next(waiting, None)) is not None:
                    index, call = one
                    try:
                        found.put((index, await self._answered(call, session)))
                    except InputError as error:
                        errors.append(error)
                        session.over = True
                        session.tell()

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(calls))):
                    group.create_task(work())
        if errors:
            raise errors[0]

    async def _answered(self, call: Call, session: _Session) -> Any:
        """What one call comes to, tried until it is answered, wrong at two servers, or given up."""
        failed, wrong_at = 0, None
        while True:
            server = await self._choose([one for one in self._fleet if one is not wrong_at], session)
            try:
                return await self._attempt(call, server, session)
            except Busy as busy:
                if session.over or time.monotonic() - session.answered_at >= self._timeout:
                    raise InputError(
                        f"a server must answer: {busy}, and none had an answer for {self._timeout:g} s; wait "
                        "until it has room, and go on with the same command: what is finished is kept"
                    ) from None
            except Failure as failure:
                failed += 1
                if session.over or failed == self._attempts or self._all_dead():
                    raise InputError(
                        f"a server must answer: {failure}, after {self._attempts} attempts; look at its log, "
                        "and go on with the same command: what is finished is kept"
                    ) from None
            except Wrong:
                well = [one for one in self._fleet if one is not server and not one.failures]
                if session.over or wrong_at or not well:
                    raise
                wrong_at = server

    async def _choose(self, fleet: Sequence[_Server], session: _Session) -> _Server:
        """The server with the fewest requests in flight; waits while none is free."""
        while not session.over:
            now = time.monotonic()
            if free := [server for server in fleet if server.is_free(now)]:
                return min(free, key=lambda server: (server.load, server.served))
            rests = [server.rests_until - now for server in fleet if server.rests_until > now]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(session.news.wait(), min(rests, default=None))
        return fleet[0]

    def _all_dead(self) -> bool:
        """Whether every server failed so often in a row, in whoever's hands."""
        return all(server.failures >= self._attempts for server in self._fleet)

    async def _attempt(self, call: Call, server: _Server, session: _Session) -> Any:
        """One attempt at one server."""
        if session.over:
            raise Failure("another request failed for good")
        began, post = time.monotonic(), poster(session.client, server.url)
        server.load += 1
        try:
            async with asyncio.timeout(self._timeout):
                if self._prepare and not server.ready:
                    async with session.locks[server.url]:
                        # What failed in another request's hands meanwhile is not done again at once.
                        if not server.ready and not session.over and began >= server.failed_at:
                            await self._prepare(server.url, post)
                            server.ready = True
                    if not server.ready:
                        raise Failure(f"{server.url} could not be made ready")
                read = call.read(server.url, await post(call.path, call.body))
        except TimeoutError:
            self._set_aside(server, began)
            raise Failure(f"{server.url} did not answer within {self._timeout:g} s") from None
        except Busy as busy:
            self._hold_back(server, began, busy.wait)
            raise
        except Failure as failure:
            self._set_aside(server, began, failure.wait)
            raise
        except Wrong:
            self._set_aside(server, began)
            raise
        finally:
            server.load -= 1
            session.tell()
        server.failures = server.refusals = 0
        server.served += 1
        server.allowance = min(self._concurrency, server.allowance + 1)
        session.answered_at = time.monotonic()
        return read

    def _set_aside(self, server: _Server, began: float, wait: float = 0.0) -> None:
        """Leave a server alone for a while, the longer the more often it failed in a row."""
        now = time.monotonic()
        server.ready = False
        if began >= server.failed_at:  # not once for each of the requests that were in flight together
            server.failures += 1
            server.failed_at = now
        server.rests_until = max(server.rests_until, now + max(wait, self._rest(server.failures)))

    def _hold_back(self, server: _Server, began: float, wait: float) -> None:
        """Give a busy server half at a time; leave it alone where it asks, or is busy with others alone."""
        now = time.monotonic()
        if began >= server.refused_at:  # as above
            server.allowance = max(1, min(server.allowance, server.load) // 2)
            server.refused_at = now
        if server.load == 1:
            server.refusals += 1
            wait = max(wait, self._rest(server.refusals))
        server.rests_until = max(server.rests_until, now + wait)

    def _rest(self, times: int) -> float:
        """Seconds of a server's being set aside for so many times in a row."""
        return min(LONGEST, self._pause * 2.0 ** min(times - 1, 99))


def _next(found: queue.SimpleQueue, future: Future, stop: Stop) -> tuple[int, Any] | None:
    """The next that is finished, or None at the end, which comes soon once the user wants to stop."""
    while True:
        if stop():
            future.cancel()
        with contextlib.suppress(queue.Empty):
            return found.get(timeout=LOOK)
