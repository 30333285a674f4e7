"""What the options of a resolver may be. Every error names the option."""

from __future__ import annotations

from typing import Any, Final

from ._failures import DEFAULT_CAP

__all__ = ["check_connector", "check_count", "check_seconds", "checked_cap"]

_MAX_SECONDS: Final = 1e9  # 30 years, in nanoseconds well within 64 bits


def check_connector(connector: Any) -> None:
    if isinstance(connector, type):
        raise TypeError(f"pass a {connector.__name__}, not the class: {connector.__name__}(...)")
    if not callable(getattr(connector, "connect", None)):
        raise TypeError(f"{type(connector).__name__} is no Connector: it has no connect(url)")
    timeout = getattr(connector, "connect_timeout", None)
    if timeout is not None:
        check_seconds("the connector's connect_timeout", timeout, at_least="more than 0")


def check_seconds(name: str, value: Any, *, at_least: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}")
    if not (0 <= value <= _MAX_SECONDS and (value > 0 or at_least == "0 or more")):
        shown = f"{value:g}" if isinstance(value, float) else "that"
        raise ValueError(f"{name} is {at_least} and up to {_MAX_SECONDS:g} seconds, not {shown}")


def checked_cap(failure_ttl: float, max_failure_ttl: float | None) -> float:
    """The longest time that a failure is remembered."""
    if max_failure_ttl is None:
        return min(failure_ttl * DEFAULT_CAP, _MAX_SECONDS)
    check_seconds("max_failure_ttl", max_failure_ttl, at_least="0 or more")
    if max_failure_ttl < failure_ttl:
        raise ValueError("max_failure_ttl is less than failure_ttl, where it starts")
    return max_failure_ttl


def check_count(name: str, value: Any, *, at_most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number, not {type(value).__name__}")
    if not 1 <= value <= at_most:
        raise ValueError(f"{name} is from 1 to {at_most}, not {value!r}")
