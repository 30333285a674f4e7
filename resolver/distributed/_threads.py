"""Calls in parallel that nobody has to wait for.

Every thread is a daemon: a worker that hangs must not keep an interpreter from ending. What
the calls do is their own business.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["call_all", "call_interruptibly"]

_T = TypeVar("_T")
_POLL = 0.1  # seconds


def call_all(
    calls: Sequence[Callable[[], _T]],
    *,
    name: str,
    check: Callable[[], object] | None = None,
) -> list[_T]:
    """The results of all ``calls``, in their order, made at the same time.

    Raises the first error at once and leaves the other calls to themselves; whoever made
    them must see to it that they end. ``check`` is called several times a second by this
    thread and may raise too. A single call is made right here.
    """
    if len(calls) == 1 and check is None:
        return [calls[0]()]
    results: dict[int, _T] = {}
    done: queue.SimpleQueue[tuple[int, _T | None, BaseException | None]] = queue.SimpleQueue()

    def call(index: int) -> None:
        try:
            done.put((index, calls[index](), None))
        except BaseException as error:  # noqa: BLE001  # it is raised where it is waited for
            done.put((index, None, error))

    for index in range(len(calls)):
        threading.Thread(target=call, args=(index,), name=f"{name}-{index}", daemon=True).start()
    while len(results) < len(calls):
        try:
            index, value, error = done.get(timeout=_POLL if check is not None else None)
        except queue.Empty:
            assert check is not None
            check()
            continue
        if error is not None:
            raise error
        results[index] = value  # type: ignore[assignment]  # no error: it is the result
    return [results[index] for index in range(len(calls))]


def call_interruptibly(
    call: Callable[[], _T], *, name: str, check: Callable[[], object] = lambda: None
) -> _T:
    """The result of ``call``, made on another thread, so that Ctrl-C need not wait for it.

    Nor ``check``, which is called several times a second and may raise.
    """
    return call_all([call], name=name, check=check)[0]
