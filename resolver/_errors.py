"""The exceptions of resolver; nothing else lives here, and nothing is imported.

::

    Exception
    └── ResolverError                    anything this package raises on purpose
        ├── InvalidWorkerUrlError        (ValueError) not the URL of a worker
        ├── WorkerConnectError           (ConnectionError) a worker could not be reached
        │   └── WorkerConnectTimeoutError  (TimeoutError) … within the connect deadline
        ├── ResolverClosedError          (RuntimeError) used after close()
        └── ForkedProcessError           (RuntimeError) used in a forked child

Each also inherits the built-in that a Python programmer would catch. Each carries
the worker URL it is about as ``url`` (``None`` where there is none), with any secret
masked, and survives pickling.
"""

from __future__ import annotations


class ResolverError(Exception):
    """Root of every error that resolver raises on purpose.

    ``url`` is the worker URL concerned, a ``str`` with secrets masked, or ``None``.
    """

    def __init__(self, message: str, *, url: str | None = None) -> None:
        super().__init__(message)
        self.url = url

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.url), self._extra()

    def _extra(self) -> dict[str, object] | None:
        """What pickling keeps beside message and URL."""
        return None


def _rebuild(cls: type[ResolverError], args: tuple[str], url: str | None) -> ResolverError:
    return cls(*args, url=url)


class InvalidWorkerUrlError(ResolverError, ValueError):
    """What was given is not the URL of a worker. The message names what to write."""


class WorkerConnectError(ResolverError, ConnectionError):
    """A worker could not be reached; ``__cause__`` is what the transport said.

    ``retry_after`` is the number of seconds, from when this was raised, for which a
    resolver with a ``failure_ttl`` answers for the worker with this error; ``None``
    where nothing is remembered and the next lookup tries at once.
    """

    retry_after: float | None = None

    def _extra(self) -> dict[str, object] | None:
        return None if self.retry_after is None else {"retry_after": self.retry_after}


class WorkerConnectTimeoutError(WorkerConnectError, TimeoutError):
    """A worker did not answer within the connect deadline."""


class ResolverClosedError(ResolverError, RuntimeError):
    """The resolver was used after, or was closed during, the call."""


class ForkedProcessError(ResolverError, RuntimeError):
    """A resolver or gRPC itself was inherited through ``os.fork`` and cannot work here."""
