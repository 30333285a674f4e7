"""The layer that makes each call an OpenTelemetry span and tells the worker about it.

Follows OpenTelemetry's conventions for gRPC. Nothing of a request, an answer or a header
becomes an attribute. OpenTelemetry is imported when a `Tracing` is made, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ._layer import Layer

if TYPE_CHECKING:
    from opentelemetry.propagators.textmap import TextMapPropagator
    from opentelemetry.trace import TracerProvider

    from ._call import Call, End

_CODES: Final = {
    name: number
    for number, name in enumerate(
        (
            "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
            "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
            "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
            "UNAUTHENTICATED",
        )
    )
}  # fmt: skip


class Tracing(Layer):
    """Each call is a client span, a child of the caller's, and carries its context along.

    The span lasts until the call ends, which for a stream is its end, and is an error when
    the status is not ``OK``. ``tracer_provider`` and ``propagator`` default to the global ones
    (W3C ``traceparent`` headers, unless configured otherwise). Needs ``opentelemetry-api``.

    Raises ImportError when that is not installed.
    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        propagator: TextMapPropagator | None = None,
    ) -> None:
        try:
            from opentelemetry import propagate, trace  # noqa: PLC0415 -- optional
        except ImportError as error:
            raise ImportError(
                "layers.Tracing needs OpenTelemetry: pip install 'resolver[tracing]'"
            ) from error
        self._trace = trace
        self._tracer = trace.get_tracer("resolver", tracer_provider=tracer_provider)
        self._propagator = propagator
        self._global_propagator = propagate.get_global_textmap

    def begin(self, call: Call) -> End:
        """Start the span and add its context to the headers."""
        span = self._tracer.start_span(
            f"{call.service}/{call.name}",
            kind=self._trace.SpanKind.CLIENT,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": call.service,
                "rpc.method": call.name,
            },
        )
        carrier: dict[str, str] = {}
        propagator = self._propagator or self._global_propagator()
        try:
            propagator.inject(carrier, context=self._trace.set_span_in_context(span))
        except BaseException:
            self._end(span, "UNKNOWN")  # the call is refused
            raise
        call.headers += [(name.lower(), value) for name, value in carrier.items()]

        def end(status: str) -> None:
            self._end(span, status)

        return end

    def _end(self, span: Any, status: str) -> None:
        span.set_attribute("rpc.grpc.status_code", _CODES.get(status, _CODES["UNKNOWN"]))
        if status != "OK":
            span.set_attribute("error.type", status)
            span.set_status(self._trace.StatusCode.ERROR, status)
        span.end()

    def __repr__(self) -> str:
        return "Tracing()"
