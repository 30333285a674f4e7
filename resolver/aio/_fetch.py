"""Tasks that fetch endpoints into a bounded buffer; the inside of `read`.

The asyncio twin of `resolver._fetch`: knows nothing of locations or Flight. Batches wait
here in the order of their endpoints or as they come, never more than the bound, and the
first error, or `stop`, ends everything. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from resolver._buffer import NOT_YET, Buffer, interrupted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Fetch(Buffer):
    """Runs ``job(index, fetch)`` for each of `count` endpoints, `concurrency` at a time.

    A job awaits `put` for each batch, and raises what went wrong. At most ``prefetch + 1``
    batches wait and one more is in the hands of each of `concurrency` tasks. Endpoints are
    begun in their order: the task of the endpoint that an ordered reader waits for may always
    put one batch, so a full buffer of later ones is no deadlock.
    """

    def __init__(
        self,
        job: Callable[[int, Fetch], Awaitable[None]],
        count: int,
        *,
        ordered: bool,
        concurrency: int,
        prefetch: int,
    ) -> None:
        super().__init__(count, ordered=ordered, prefetch=prefetch)
        self._loop = asyncio.get_running_loop()
        self._job = job
        self._concurrency = min(concurrency, count)
        self._changed = asyncio.Condition()
        self._indexes = iter(range(count))
        self._tasks: list[asyncio.Task[None]] = []

    def check(self) -> None:
        """Raise where this is of another process or event loop."""
        self._check_process()
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "this reader belongs to the event loop in which read() was awaited; use it there, "
                "with asyncio.run_coroutine_threadsafe() from elsewhere"
            )

    async def take(self) -> Any:
        """The next batch, or None at the end. Raises the first error of any job."""
        self._start()
        async with self._changed:
            while (batch := self._next_locked()) is NOT_YET:
                await self._changed.wait()
            return batch

    async def schema(self) -> Any:
        """The schema of the endpoint that answers first; None without endpoints."""
        self._start()
        async with self._changed:
            while (schema := self._first_schema_locked()) is NOT_YET:
                await self._changed.wait()
            return schema

    async def stop(self) -> None:
        """End every job, and wait until they have ended; idempotent."""
        if self._is_inherited:
            return
        self.check()
        self._cancel()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        if tasks:
            await asyncio.wait(tasks)
        async with self._changed:
            self._changed.notify_all()

    def abandon(self) -> None:
        """End every job, from any thread: nobody reads any more."""
        if not self._is_inherited and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it was closed just now
                self._loop.call_soon_threadsafe(self._cancel)

    def fail(self, error: BaseException) -> None:
        """End every job; who reads on gets `error`, and never a part as if it were all."""
        if not self._stopped:
            self._error = error
            self._cancel(but=asyncio.current_task())
            self._wake()

    def agree(self, schema: Any) -> Any:
        """The schema that counts: the one of the endpoint that answered first."""
        if self._schema is None:
            self._schema = schema
            self._wake()
        return self._schema

    async def put(self, index: int, batch: Any) -> None:
        """Hand over one batch of endpoint `index`. Waits while too many wait."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._has_room_locked(index))
            self._put_locked(index, batch)

    def _start(self) -> None:
        self.check()
        if self._tasks or self._stopped:
            return
        for _ in range(self._concurrency):
            if not self._stopped:  # a task may begin, and fail, as soon as it is made
                task = self._loop.create_task(self._run(), name="resolver-read")
                self._tasks.append(task)

    async def _run(self) -> None:
        for index in self._indexes:
            try:
                await self._job(index, self)
            except Exception as error:  # noqa: BLE001 -- the reader raises it
                self.fail(error)
                return
            except BaseException:  # somebody cancelled this task, or the program ends
                self.fail(interrupted())
                raise
            self._done.add(index)
            await self._notify()

    def _cancel(self, but: asyncio.Task[Any] | None = None) -> None:
        self._stop_locked()
        for task in self._tasks:
            if task is not but:
                task.cancel()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _wake(self) -> None:
        waking = self._loop.create_task(self._notify())
        self._tasks.append(waking)
        waking.add_done_callback(self._tasks.remove)
