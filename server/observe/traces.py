"""`--otlp-endpoint`: spans of every request, sent to an OpenTelemetry collector over gRPC.

    request                from admission to the last event; a child of the caller's span, if a W3C traceparent came
    ├─ queue               until its prompt was let in
    ├─ prefill             one for each chunk of the prompt: until the next is begun, the last until the first token
    └─ decode              from the first token on; "resumed" where a pre-empted request was computed once more

A request only notes times while it runs. Spans are made when it has ended, in a thread of their own. What the
collector's client asks of the environment (OTEL_*: headers, certificates, the sampler, resource attributes) holds here.
"""

import logging
import queue
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...engine_impl.errors import RefusedError
from ..request.request import Request
from ..request.trace import Trace
from .metrics import Outcome

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

log = logging.getLogger(__name__)

HEADERS = ("traceparent", "tracestate")
"""W3C's, as gRPC metadata and as HTTP headers."""
WAITING = 2048
"""Requests that have ended and may wait for their spans (count); further ones are dropped and counted."""
FLUSH_S = 3.0
"""How long close() waits for the collector (seconds)."""
SERVICE = "slipstream"
"""What we are called, unless OTEL_SERVICE_NAME says otherwise."""

Header = Callable[[str], str | None]
"""The value of a caller's header, by its name."""


class Traces:
    """start() it, begin() a trace for each request, close() it."""

    def __init__(self, endpoint: str) -> None:
        """Raises RefusedError for an endpoint that is no URL, and without OpenTelemetry's packages."""
        if "@" in endpoint:  # not shown: it is a secret
            raise RefusedError(
                "otlp_endpoint must be http://HOST:PORT without a user and a password, which gRPC would not send; "
                "set OTEL_EXPORTER_OTLP_HEADERS to send some"
            )
        if not re.fullmatch(r"https?://[^/\s]+/?", endpoint):
            raise RefusedError(f"otlp_endpoint={endpoint!r} must be http://HOST:PORT, or https://HOST:PORT with TLS")
        try:
            import opentelemetry.exporter.otlp.proto.grpc
            import opentelemetry.sdk  # noqa: F401
        except ImportError as error:
            raise RefusedError(
                f"--otlp-endpoint needs the package {error.name!r}; pip install 'slipstream-llm[otlp]'"
            ) from error
        self._endpoint = endpoint
        self._ended: queue.Queue[tuple[Request, str] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self.dropped = 0
        """Requests whose spans found no place."""

    def start(self, model: str) -> None:
        """Spans say which model they are of."""
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = Resource({"service.name": SERVICE, "gen_ai.request.model": model})
        self._provider = TracerProvider(
            resource=Resource.create().merge(named).merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(self._endpoint, timeout=FLUSH_S)))
        self._tracer = self._provider.get_tracer("slipstream")
        self._thread.start()
        log.info("spans of requests go to %s", self._endpoint)

    def begin(self, header: Header) -> Trace:
        """For a request whose caller sent these headers."""
        caller = {name: value for name in HEADERS if (value := header(name))}
        return Trace(caller, self._end)

    def close(self) -> None:
        """Sends what there is, as long as the collector takes it."""
        if not self._thread.is_alive():
            return
        self._ended.put(None)
        self._thread.join(FLUSH_S)
        self._provider.force_flush(round(FLUSH_S * 1000))
        self._provider.shutdown()
        if self.dropped:
            log.warning("the spans of %d requests were dropped: more ended than could be told", self.dropped)

    def _end(self, request: Request, outcome: str) -> None:
        try:
            self._ended.put_nowait((request, outcome))
        except queue.Full:
            self.dropped += 1

    def _run(self) -> None:
        while (ended := self._ended.get()) is not None:
            try:
                make_spans(self._tracer, *ended)
            except Exception:  # of one request: no reason to tell nothing of the others
                log.exception("request %s has no spans", ended[0].id)


def make_spans(tracer: "Tracer", request: Request, outcome: str) -> None:
    """Of a request that has ended."""
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    trace, queued, ended = request.trace, request.queued_at, request.ended_at
    assert trace is not None
    assert queued is not None
    assert ended is not None
    since_epoch_ns = time.time_ns() - time.monotonic_ns()

    def span(name: str, start: float, end: float, context: Any, kind: SpanKind, **attributes: Any) -> Any:
        made = tracer.start_span(name, context, kind, attributes, start_time=since_epoch_ns + round(start * 1e9))
        ends.append((made, since_epoch_ns + round(end * 1e9)))
        return made

    ends: list[tuple[Any, int]] = []
    caller = TraceContextTextMapPropagator().extract(trace.caller)
    root = span("request", queued, ended, caller, SpanKind.SERVER, **told_of(request, outcome))
    if outcome == Outcome.FAILED.value:
        root.set_status(Status(StatusCode.ERROR))
    inside = set_span_in_context(root)
    first, started = request.first_token_at, request.started_at
    span("queue", queued, started or ended, inside, SpanKind.INTERNAL)
    prefill = [chunk for chunk in trace.chunks if first is None or chunk.started < first]
    until = [*(chunk.started for chunk in prefill[1:]), first or ended]
    for chunk, end in zip(prefill, until, strict=False):  # one end too many where nothing was computed
        tokens = {"slipstream.start": chunk.start, "slipstream.tokens": chunk.tokens}
        span("prefill", chunk.started, end, inside, SpanKind.INTERNAL, **tokens)
    if first is not None:
        tokens = {"gen_ai.usage.output_tokens": request.delivered}
        decode = span("decode", first, ended, inside, SpanKind.INTERNAL, **tokens)
        for chunk in trace.chunks[len(prefill) :]:
            tokens = {"slipstream.start": chunk.start, "slipstream.tokens": chunk.tokens}
            decode.add_event("resumed", tokens, since_epoch_ns + round(chunk.started * 1e9))
    for made, end_ns in ends:
        made.end(end_ns)


def told_of(request: Request, outcome: str) -> dict[str, Any]:
    """Attributes, under OpenTelemetry's names for generative models where it has one. Never a text."""
    return {
        "slipstream.request_id": request.id,
        "slipstream.outcome": outcome,
        "slipstream.cached_tokens": request.cached_tokens,
        "slipstream.num_samples": request.num_samples,
        "gen_ai.usage.input_tokens": len(request.prompt_ids),
        "gen_ai.usage.output_tokens": request.delivered,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": request.sampling.temperature,
    }
