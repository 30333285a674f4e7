"""Which workers there are: the protocol a session asks before every query.

Only names are handled here. Whether a worker answers is found out when it is called,
and how it is reached is the ChannelResolver's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from resolver._urls import parse_worker_url

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["StaticWorkerResolver", "WorkerResolver", "urls_of"]


@runtime_checkable
class WorkerResolver(Protocol):
    """Anything that can name the workers of the moment.

    Asked once per query, possibly from several threads at once, so workers may come and
    go between queries; a query keeps those that it began with. Asked for each plan that
    is shown, too, and by ``explain(analyze=True)`` for the workers' resolver statistics.
    """

    def get_urls(self) -> Sequence[str]:
        """The URLs of all workers, in an order of the resolver's choice.

        Called on the thread that asks for a result or a plan, which waits for it. Two
        equal URLs count once; without any, the query runs on a single node. What it
        raises reaches whoever asked.
        """
        ...


class StaticWorkerResolver:
    """A fixed list of worker URLs.

    URLs are checked here, so that a misspelt one fails where it was written and not in
    the middle of a query (``InvalidWorkerUrlError``). Two spellings of one worker count
    once. Immutable, therefore safe to share between threads.
    """

    __slots__ = ("_urls",)

    def __init__(self, urls: Iterable[str]) -> None:
        if isinstance(urls, str):
            raise TypeError(f"expected a list of worker URLs, got the single string {urls!r}")
        self._urls = tuple(dict.fromkeys(parse_worker_url(url).key for url in urls))

    def get_urls(self) -> Sequence[str]:
        return self._urls

    def __repr__(self) -> str:
        return f"StaticWorkerResolver({list(self._urls)!r})"


def urls_of(resolver: WorkerResolver) -> list[str]:
    """What ``get_urls()`` returns, each once. Raises ``TypeError`` for no list of URLs."""
    urls: object = resolver.get_urls()
    if isinstance(urls, str | bytes) or not isinstance(urls, Iterable):
        raise TypeError(
            f"{type(resolver).__name__}.get_urls() returned {type(urls).__name__}, "
            "not a list of worker URLs"
        )
    return list(dict.fromkeys(map(str, urls)))
