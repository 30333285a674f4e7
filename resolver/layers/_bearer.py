"""The layer that sends a bearer token, renews it in time, and once more when it is refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from resolver._errors import WorkerConnectError
from resolver._headers import time_left

from ._layer import Layer
from ._tokens import Provider, TokenSource

if TYPE_CHECKING:
    from resolver._urls import WorkerUrl

    from ._call import Call, End

_ONCE = frozenset({"DoPut", "DoExchange", "Handshake"})
"""Calls that send a stream."""

_LONGEST = 86_400.0
_BEARER = "Bearer "


class BearerToken(Layer):
    """Sends ``authorization: Bearer <token>`` with every call. Thread-safe; may be shared.

    - ``provider``: returns the token as ``str``, or a `Token` that knows when it ends. An
      ``async`` function runs in an event loop of its own. It is asked on a thread of this
      layer's, by one at a time however many calls wait.
    - ``refresh_before``: seconds before its end in which a token is renewed, while calls go on
      with the old one.
    - ``timeout``: seconds for which a call waits where there is no valid token; less where the
      call's own timeout or a connect's deadline is nearer.
    - ``insecure``: send tokens over plaintext to other machines, too. Otherwise a connector
      refuses such a worker with ``WorkerConnectError``.

    A call that is refused as UNAUTHENTICATED is made once more with another token, if the
    provider has one, unless any of its answer has been read. Calls that send a stream
    (``do_put``, ``do_exchange``) are not: what was written is gone. But another token is asked
    for, and the next such call waits for it.

    A provider that fails is asked again after 0.5 s, then less and less often, at most every
    30 s. One that has not returned after 60 s is asked once more beside, on another thread, and
    after 120 s more again. As long as the token is valid nobody notices; after that, calls are
    refused with `TokenUnavailableError` (through pyarrow: ``FlightInternalError``). No token
    appears in a log, ``repr`` or error. Raises TypeError or ValueError for options that make
    no sense.
    """

    def __init__(
        self,
        provider: Provider,
        *,
        refresh_before: float = 60.0,
        timeout: float = 5.0,
        insecure: bool = False,
    ) -> None:
        if not callable(provider):
            raise TypeError(
                f"provider is a function that returns the token, not {type(provider).__name__}; "
                "for one that never changes, use RequestHeaders"
            )
        if not isinstance(insecure, bool):
            raise TypeError("insecure must be a bool")
        self.provider = provider
        self.refresh_before = _seconds("refresh_before", refresh_before)
        self.timeout = _seconds("timeout", timeout)
        self.insecure = insecure
        self._source = TokenSource(provider, self.refresh_before)

    def begin(self, call: Call) -> End:
        """Add the token."""
        token = self._source.get(self._patience(call), once=call.name in _ONCE)
        return self._sent(call, token)

    async def begin_async(self, call: Call) -> End:
        """Add the token; waits without blocking the event loop."""
        token = await self._source.get_async(self._patience(call), once=call.name in _ONCE)
        return self._sent(call, token)

    def _sent(self, call: Call, token: str) -> End:
        call.headers.append(("authorization", _BEARER + token))

        def end(status: str) -> None:
            if status == "UNAUTHENTICATED":  # and if nobody asks `refused`, the next call is right
                self._source.renew(token)

        return end

    def refused(self, call: Call) -> bool:
        """After ``call`` was answered UNAUTHENTICATED: whether to make it once more."""
        token = _token_of(call)
        return token is not None and self._source.replace(token, self._patience(call))

    async def refused_async(self, call: Call) -> bool:
        """As `refused`."""
        token = _token_of(call)
        return token is not None and await self._source.replace_async(token, self._patience(call))

    def check_worker(self, worker: WorkerUrl) -> None:
        """Refuse to connect where everybody on the way could read the token."""
        if not (worker.is_tls or worker.is_loopback or self.insecure):
            raise WorkerConnectError(
                f"No token is sent to worker {worker.key}, where everybody on the way could read "
                "it: use https://, or say BearerToken(..., insecure=True) on a network you trust",
                url=worker.key,
            )

    def _patience(self, call: Call) -> float:
        given = math.inf if call.timeout is None else call.timeout
        return min(self.timeout, given, time_left())

    def __repr__(self) -> str:
        name = getattr(self.provider, "__qualname__", type(self.provider).__qualname__)
        return f"BearerToken(<callable {name}>, refresh_before={self.refresh_before:g})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (
            self.provider,
            {
                "refresh_before": self.refresh_before,
                "timeout": self.timeout,
                "insecure": self.insecure,
            },
        )


def _made(provider: Provider, options: dict[str, Any]) -> BearerToken:
    return BearerToken(provider, **options)


def _token_of(call: Call) -> str | None:
    for name, value in reversed(call.headers):
        if name == "authorization" and isinstance(value, str) and value.startswith(_BEARER):
            return value.removeprefix(_BEARER)
    return None


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}")
    if not 0 <= value <= _LONGEST:
        raise ValueError(f"{name} is from 0 to {_LONGEST:g} seconds")
    return float(value)
