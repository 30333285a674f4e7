"""What a coordinator says to a worker, and what its answers and silences mean.

Every call has a deadline and goes through the session's ChannelResolver; every error
names the worker. Which task runs where is not decided here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pyarrow as pa
from pyarrow import flight

from resolver._errors import ResolverError

from . import _wire
from ._errors import DistributedError, TaskFailedError, WorkerLostError
from ._inputs import InputLostError
from ._reach import reach
from ._threads import call_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from resolver._resolver import ChannelResolver

    from ._inputs import Headers

__all__ = ["TaskRefusedError", "WorkerCalls", "worker_info"]

_T = TypeVar("_T")

POLL: Final = 2.0
"""Seconds for which a worker is asked to wait for a task before it answers."""

_RELEASE_TIMEOUT: Final = 1.0  # seconds


class TaskRefusedError(WorkerLostError):
    """The worker takes no more tasks; it lives on and keeps what it has."""


class WorkerCalls:
    """Calls for one query. Thread-safe. ``worker_timeout`` is in seconds.

    After ``end()`` calls that fail no longer count against a worker: it may only have
    done as it was told.
    """

    def __init__(
        self, resolver: ChannelResolver, *, headers: Headers, worker_timeout: float
    ) -> None:
        self._resolver = resolver
        self._headers = headers
        self._worker_timeout = worker_timeout
        self._lock = threading.Lock()
        self._renewing: set[str] = set()
        self.is_over = False

    def run_task(self, url: str, request: _wire.TaskRequest, time_limit: float) -> _wire.TaskReport:
        """Run a task to its end. ``time_limit`` is in seconds, 0 for none.

        Raises ``TaskFailedError`` with the plan's own message, ``InputLostError``,
        ``WorkerConnectError`` when the worker cannot have got the task, ``TaskRefusedError``
        when it did not take it, and ``WorkerLostError`` when it may have.
        """
        started = time.monotonic()
        data = self._act(url, _wire.EXECUTE_TASK, request.to_bytes(), request.wait)
        await_request = _wire.AwaitRequest(request.output, request.wait).to_bytes()
        while not data:
            if self.is_over:
                raise WorkerLostError(f"query {request.output.query} is over", url=url)
            if time_limit and time.monotonic() - started > time_limit:
                raise WorkerLostError(
                    f"worker {url} had not finished a task after task_timeout={time_limit:g} s",
                    url=url,
                )
            data = self._act(url, _wire.AWAIT_TASK, await_request, request.wait)
        try:
            return _wire.TaskReport.parse(data)
        except _wire.WireError as error:
            raise DistributedError(
                f"worker {url} answered what no worker of this version answers: {error}", url=url
            ) from error

    def release(self, urls: Iterable[str], query: str) -> None:
        """End ``query`` on these workers. One that is gone has, and none is waited for long.

        Not for a connection either: a worker that hung has lost its client.
        """
        deadline = time.monotonic() + _RELEASE_TIMEOUT

        def check() -> None:
            if time.monotonic() > deadline:
                raise TimeoutError

        release = functools.partial(self._release, _wire.RELEASE_QUERY, query.encode())
        calls = [functools.partial(release, url) for url in urls]
        with contextlib.suppress(TimeoutError):
            call_all(calls, name="release", check=check)

    def release_outputs(self, outputs: Mapping[str, Sequence[_wire.OutputKey]]) -> None:
        """Let each worker remove these outputs, by its URL. Waits for none.

        Without a thread to spare they stay until the query ends.
        """
        for url, keys in outputs.items():
            body = _wire.ReleaseRequest(tuple(keys)).to_bytes()
            arguments = (_wire.RELEASE_OUTPUTS, body, url)
            with contextlib.suppress(RuntimeError):
                threading.Thread(
                    target=self._release, args=arguments, name="release", daemon=True
                ).start()

    def _release(self, action: str, body: bytes, url: str) -> None:
        with contextlib.suppress(ResolverError, pa.ArrowException, OSError, EOFError):
            client = self._resolver.get_flight_client_for_url(url)
            options = flight.FlightCallOptions(timeout=_RELEASE_TIMEOUT, headers=self._headers)
            _act(client, action, body, options)

    def renew_lease(self, urls: Iterable[str], query: str) -> None:
        """Tell these workers that the query is still wanted. Failures show up elsewhere.

        Waits for none: others would lose the query while one hangs. A worker that has not
        answered the last time yet is not told again.
        """

        def renew(url: str) -> None:
            try:
                with contextlib.suppress(ResolverError, pa.ArrowException, OSError, EOFError):
                    self._act(url, _wire.RENEW_LEASE, query.encode(), 0.0)
            finally:
                with self._lock:
                    self._renewing.discard(url)

        for url in urls:
            with self._lock:
                is_asked = url in self._renewing
                self._renewing.add(url)
            if not is_asked:
                try:
                    threading.Thread(target=renew, args=(url,), name="renew", daemon=True).start()
                except RuntimeError:  # no thread to spare; perhaps the next time
                    with self._lock:
                        self._renewing.discard(url)

    def _act(self, url: str, action: str, body: bytes, wait: float) -> bytes:
        options = flight.FlightCallOptions(
            timeout=wait + self._worker_timeout, headers=self._headers
        )
        return self._call(url, lambda client: _act(client, action, body, options))

    def _call(self, url: str, call: Callable[[flight.FlightClient], _T]) -> _T:
        """``call`` with the client for ``url``; its errors say which worker it was."""
        try:
            return reach(self._resolver, url, call, may_drop=lambda: not self.is_over)
        except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError) as error:
            raise DistributedError(
                f"worker {url} did not let us in: {_message(error)}; "
                "check the token or the client certificate of the connector",
                url=url,
            ) from error
        except flight.FlightServerError as error:
            lost = _said(error, "lost")
            if lost is not None:
                raise InputLostError(_message(error), url=str(lost)) from error
            raise TaskFailedError(_message(error), url=url) from error
        except (flight.FlightError, pa.ArrowKeyError, EOFError) as error:
            if _said(error, "refused"):
                raise TaskRefusedError(
                    f"worker {url} refused a task: {_message(error)}", url=url
                ) from error
            # Silent, gone, going, or restarted and empty: not to be used now.
            raise WorkerLostError(f"worker {url} was lost: {_message(error)}", url=url) from error
        except pa.ArrowException as error:
            raise DistributedError(f"worker {url} refused: {_message(error)}", url=url) from error


def worker_info(
    resolver: ChannelResolver, url: str, timeout: float = 5.0, *, headers: Headers | None = None
) -> dict[str, Any]:
    """What the worker at ``url`` says of itself, within ``timeout`` seconds."""
    client = resolver.get_flight_client_for_url(url)
    options = flight.FlightCallOptions(timeout=timeout, headers=headers or [])
    info: dict[str, Any] = json.loads(_act(client, _wire.WORKER_INFO, b"", options))
    return info


def _act(
    client: flight.FlightClient, action: str, body: bytes, options: flight.FlightCallOptions
) -> bytes:
    """The one result of an action."""
    results = list(client.do_action(flight.Action(action, body), options))
    if len(results) != 1:
        raise EOFError(f"{action} was answered with {len(results)} results, not one")
    data: bytes = results[0].body.to_pybytes()
    return data


def _said(error: BaseException, what: str) -> object:
    """What a worker's error says beyond its message, if it does."""
    try:
        return json.loads(getattr(error, "extra_info", b""))[what]
    except (ValueError, KeyError, TypeError):
        return None


def _message(error: BaseException) -> str:
    """What the worker said, without Flight's own additions."""
    return str(error).partition(". Detail: ")[0]
