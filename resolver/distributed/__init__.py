"""Distributed DataFusion: SQL planned here, run by Arrow Flight workers elsewhere.

Register the same kind of ChannelResolver in both places: on the session that starts a
query, and on every worker through its session builder. Needs ``resolver[datafusion]``.
"""

from . import _requirements

_requirements.check()  # before anything below imports what may not be there

from ._cluster import LocalCluster  # noqa: E402
from ._dataframe import DataFrame  # noqa: E402
from ._errors import (  # noqa: E402
    ClusterStartError,
    DistributedError,
    InsecureListenError,
    TaskFailedError,
    WorkerLostError,
)
from ._planner import DistributedPhysicalOptimizerRule  # noqa: E402
from ._session import SessionContext  # noqa: E402
from ._stage import DistributedPlan, SingleNodePlan  # noqa: E402
from ._state import SessionState, SessionStateBuilder  # noqa: E402
from ._worker import Worker, WorkerQueryContext, WorkerServer  # noqa: E402
from ._worker_resolver import StaticWorkerResolver, WorkerResolver  # noqa: E402

__all__ = [
    "ClusterStartError",
    "DataFrame",
    "DistributedError",
    "DistributedPhysicalOptimizerRule",
    "DistributedPlan",
    "InsecureListenError",
    "LocalCluster",
    "SessionContext",
    "SessionState",
    "SessionStateBuilder",
    "SingleNodePlan",
    "StaticWorkerResolver",
    "TaskFailedError",
    "Worker",
    "WorkerLostError",
    "WorkerQueryContext",
    "WorkerResolver",
    "WorkerServer",
]
