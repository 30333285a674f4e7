"""Layers: what happens around every call, whichever client makes it.

A layer is a callable from channel to channel (``grpc.intercept_channel`` underneath), a
pyarrow client middleware, and a set of ``grpc.aio`` interceptors, all in one. Of several, the
first is outermost: it sees a call first and its end last.

Importing this imports neither grpcio nor OpenTelemetry; using them does.
"""

from ._bearer import BearerToken
from ._call import Call, End
from ._deadline import Deadline
from ._in_flight import InFlightLimit, TooManyCallsError
from ._layer import Layer, apply_layers
from ._metrics import CallMetrics, MethodMetrics
from ._request_headers import RequestHeaders
from ._tokens import Token, TokenUnavailableError
from ._tracing import Tracing

__all__ = [
    "BearerToken",
    "Call",
    "CallMetrics",
    "Deadline",
    "End",
    "InFlightLimit",
    "Layer",
    "MethodMetrics",
    "RequestHeaders",
    "Token",
    "TokenUnavailableError",
    "TooManyCallsError",
    "Tracing",
    "apply_layers",
]
