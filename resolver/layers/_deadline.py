"""The layer that gives a timeout to calls that have none."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._layer import Layer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._call import Call

_LONGEST = 86_400.0


class Deadline(Layer):
    """Calls without a timeout get one of `seconds`; theirs wins where they have one.

    A stream's timeout is for all of it, so one that suits ``GetFlightInfo`` may cut a long
    ``DoGet`` short: with ``methods``, as in ``("GetFlightInfo", "DoAction")``, only those get
    it. Not for pyarrow, whose middleware cannot set a timeout: there it is a TypeError at
    construction of the connector.
    """

    sets_timeout: ClassVar[bool] = True

    def __init__(self, seconds: float, *, methods: Iterable[str] | None = None) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"seconds is a number, not {type(seconds).__name__}")
        if not 0 < seconds <= _LONGEST:
            raise ValueError(f"seconds is more than 0 and at most {_LONGEST:g}")
        if isinstance(methods, str):
            raise TypeError("methods is several names, as in ('GetFlightInfo',)")
        self.seconds = float(seconds)
        self.methods = None if methods is None else frozenset(methods)

    def begin(self, call: Call) -> None:
        """Set the timeout where there is none."""
        if call.timeout is None and (self.methods is None or call.name in self.methods):
            call.timeout = self.seconds

    def __repr__(self) -> str:
        only = "" if self.methods is None else f", methods={sorted(self.methods)}"
        return f"Deadline({self.seconds:g}{only})"
