"""The errors of connects, made so that several callers can be told and none is kept alive."""

from __future__ import annotations

from ._errors import (
    ResolverClosedError,
    ResolverError,
    WorkerConnectError,
    WorkerConnectTimeoutError,
)

__all__ = ["as_connect_error", "closed_error", "drop_tracebacks", "without_traceback"]


def closed_error() -> ResolverClosedError:
    """What whoever uses a closed resolver is told."""
    return ResolverClosedError("The resolver is closed; make a new one")


def as_connect_error(key: str, cause: Exception) -> ResolverError:
    """What a connector raised, as one of ours that names the worker ``key``."""
    if isinstance(cause, ResolverError):
        return cause
    kind = WorkerConnectTimeoutError if isinstance(cause, TimeoutError) else WorkerConnectError
    error = kind(f"Could not connect to worker {key}: {type(cause).__name__}: {cause}", url=key)
    error.__cause__ = cause
    return error


def drop_tracebacks(error: BaseException) -> None:
    """Before `error` is remembered: through them it would keep its callers' frames alive."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        each = chain.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            chain += each.__cause__, each.__context__


def without_traceback(error: BaseException) -> BaseException:
    """A copy of `error` of the same type and cause, that nobody has raised."""
    # Not copy.copy, which calls a constructor that may want other arguments.
    kind = type(error)
    duplicate = kind.__new__(kind, *error.args)
    duplicate.args = error.args
    duplicate.__dict__.update(error.__dict__)
    duplicate.__cause__ = error.__cause__
    duplicate.__suppress_context__ = True
    return duplicate
