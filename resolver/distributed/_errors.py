"""The exceptions of distributed queries; nothing else lives here.

::

    ResolverError                        resolver's own root, see resolver._errors
    └── DistributedError                 anything resolver.distributed raises on purpose
        ├── TaskFailedError              (RuntimeError) a worker ran a task and it failed
        ├── WorkerLostError              (ConnectionError) a worker went away during a query
        ├── InsecureListenError          (ValueError) an address that needs TLS and a token
        └── ClusterStartError            (RuntimeError) a LocalCluster did not come up

``url`` is the worker concerned, where there is one.
"""

from __future__ import annotations

from resolver._errors import ResolverError


class DistributedError(ResolverError):
    """Root of every error that resolver.distributed raises on purpose."""


class TaskFailedError(DistributedError, RuntimeError):
    """A worker ran a task and it failed; the message is DataFusion's own.

    It would fail again, and is not tried again. ``url`` is the worker it failed on.
    """


class WorkerLostError(DistributedError, ConnectionError):
    """A worker stopped answering, and nobody else could run what it was to run.

    ``__cause__`` is what Flight said. Asking again makes sense once workers are back.
    """


class InsecureListenError(DistributedError, ValueError):
    """A worker was asked to serve other machines without TLS and a token."""


class ClusterStartError(DistributedError, RuntimeError):
    """A worker process of a LocalCluster did not become ready. Carries its stderr."""
