"""How a query is distributed: every number and limit that a user may set, in one place.

``SessionStateBuilder.with_distributed_option(name, value)`` takes the field names below.
Values only; who obeys an option is said beside it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Final

__all__ = ["COMPRESSIONS", "DistributedOptions"]

MIB: Final = 1 << 20

COMPRESSIONS: Final = ("none", "lz4", "zstd")


def _option(default: object, doc: str) -> object:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, slots=True)
class DistributedOptions:
    """Options of one session; immutable. Raises ``ValueError`` for a value out of range."""

    broadcast_threshold: int = _option(  # type: ignore[assignment]
        32 * MIB,
        "Bytes. A join's build side that measured at most this is sent whole to every task, "
        "and its probe side is not shuffled. 0: always shuffle.",
    )
    bytes_per_task: int = _option(  # type: ignore[assignment]
        8 * MIB,
        "Bytes. A stage that reads other stages gets one task for each this many bytes of "
        "measured input, up to one per worker: small partitions are merged, and so are stages "
        "that need one task all together. 0: one per worker.",
    )
    coordinator_threshold: int = _option(  # type: ignore[assignment]
        1 * MIB,
        "Bytes. A last stage whose whole input measured at most this runs in the coordinator. "
        "0: never.",
    )
    files_per_task: int = _option(  # type: ignore[assignment]
        1,
        "Files. A stage that scans gets at most one task for each this many file ranges.",
    )
    scan_bytes_per_task: int = _option(  # type: ignore[assignment]
        16 * MIB,
        "Bytes. Nor does it get more than one for each this many bytes of files, at 8 bytes a "
        "row at least, or for each MiB where rows meet in a cross join. 0: size is of no account.",
    )
    stream_bytes: int = _option(  # type: ignore[assignment]
        64 * MIB,
        "Bytes. The last stage of a query that is read as a stream runs in pieces that read about "
        "this many bytes each, of files or of other stages: the first rows come early, and the "
        "next piece is computed while one is read. At most 256 pieces. 0: as a whole.",
    )
    inline_limit: int = _option(  # type: ignore[assignment]
        64 * MIB,
        "Bytes. In-memory tables up to this size travel in the plan; a larger one makes the "
        "query run on a single node.",
    )
    compression: str = _option(  # type: ignore[assignment]
        "none", "How stage output is compressed on disk and on the wire: none, lz4 or zstd."
    )
    task_retries: int = _option(  # type: ignore[assignment]
        3, "How often one task may be started again after a worker was lost."
    )
    task_timeout: float = _option(  # type: ignore[assignment]
        0.0, "Seconds that one attempt at a task may run before it is tried elsewhere. 0: no limit."
    )
    worker_timeout: float = _option(  # type: ignore[assignment]
        10.0, "Seconds without an answer after which a worker counts as lost."
    )
    lease: float = _option(  # type: ignore[assignment]
        60.0,
        "Seconds for which workers keep a query whose coordinator no longer asks for it.",
    )
    python_udfs: bool = _option(  # type: ignore[assignment]
        False,
        "Whether Python functions travel in plans, pickled. Workers refuse them unless they "
        "were built with allow_python_udfs=True.",
    )

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            kind = type(option.default)
            accepted = (int, float) if kind is float else (kind,)
            if type(value) not in accepted:
                raise ValueError(f"{option.name} takes a {kind.__name__}, not {value!r}")
            if kind in (int, float) and not value >= 0:
                raise ValueError(f"{option.name} is {value!r}; it cannot be negative")
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression is {self.compression!r}, not {', '.join(COMPRESSIONS)}")
        if self.files_per_task < 1:
            raise ValueError("files_per_task is 0; at least 1 counts")
        if not self.worker_timeout or not self.lease:
            raise ValueError("worker_timeout and lease must be above 0")

    def replace(self, name: str, value: object) -> DistributedOptions:
        """A copy with one option changed; ``ValueError`` names the options there are."""
        names = [option.name for option in dataclasses.fields(self)]
        if name not in names:
            raise ValueError(f"no option {name!r}; there are {', '.join(names)}")
        return dataclasses.replace(self, **{name: value})  # type: ignore[arg-type]
