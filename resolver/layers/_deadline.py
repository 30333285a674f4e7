"""The layer that gives a timeout to calls that have none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ._layer import Layer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._call import Call

_LONGEST = 86_400.0


@dataclass(frozen=True)
class Deadline(Layer):
    """Calls without a timeout get one of `seconds`; theirs wins where they have one.

    A stream's timeout is for all of it, so one that suits ``GetFlightInfo`` may cut a long
    ``DoGet`` short: with ``methods``, as in ``("GetFlightInfo", "DoAction")``, only those get
    it. Not for pyarrow, whose middleware cannot set a timeout: there it is a TypeError at
    construction of the connector.
    """

    sets_timeout: ClassVar[bool] = True

    seconds: float
    methods: Iterable[str] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is no timeout."""
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)):
            raise TypeError(f"seconds is a number, not {type(self.seconds).__name__}")
        if not 0 < self.seconds <= _LONGEST:
            raise ValueError(f"seconds is more than 0 and at most {_LONGEST:g}")
        if isinstance(self.methods, str):
            raise TypeError("methods is several names, as in ('GetFlightInfo',)")
        if self.methods is not None:
            object.__setattr__(self, "methods", frozenset(self.methods))

    def begin(self, call: Call) -> None:
        """Set the timeout where there is none."""
        if call.timeout is None and (self.methods is None or call.name in self.methods):
            call.timeout = self.seconds
