"""Spans of requests, as a collector gets them."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from aiohttp import ClientSession
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as wire
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.config import WatchConfig
from slipstream.server.observe import traces
from slipstream.server.observe.traces import Traces
from slipstream.server.request.events import FinishReason

from tests.fakes import FakeEngine
from tests.server.calls import answer, serving, text_request
from tests.server.scheduler.loop import Asked, running

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = (f"00-{TRACE}-{PARENT}-{flags}" for flags in ("01", "00"))


class Collector(collector.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans = []
        self.resources = []

    def Export(self, request, context):
        for resource in request.resource_spans:
            self.resources.append(values(resource.resource))
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return wire.ExportTraceServiceResponse()

    def of(self, name):
        return [span for span in self.spans if span.name == name]


def values(owner):
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in owner.attributes}


@pytest.fixture
def collecting():
    """(the collector, its URL)"""
    server, kept = grpc.server(ThreadPoolExecutor(1)), Collector()
    collector.add_TraceServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def serve(endpoint, scenario, engine=None, **config):
    """Everything has been sent when it returns."""

    async def whole():
        async with serving(engine, watch=WatchConfig(otlp_endpoint=endpoint), **config) as (server, channel):
            await scenario(server, channel)

    asyncio.run(whole())


def test_a_request_over_grpc(collecting):
    """40 tokens in chunks of 16, under the caller's span."""
    kept, endpoint = collecting
    engine = FakeEngine(max_prefill_length=64)
    metadata = (("traceparent", SAMPLED), ("x-request-id", "mine"))

    async def scenario(server, channel):
        await answer(channel, text_request("a" * 40, max_tokens=5), metadata=metadata)

    serve(endpoint, scenario, engine)
    assert {span.trace_id.hex() for span in kept.spans} == {TRACE}
    (request,), (queue,), prefill, (decode,) = (kept.of(name) for name in ("request", "queue", "prefill", "decode"))
    assert len(kept.spans) == 6
    assert request.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in (queue, *prefill, decode)} == {request.span_id}
    assert values(request) == {
        "slipstream.request_id": "mine", "slipstream.outcome": "ok", "slipstream.cached_tokens": 0,
        "slipstream.num_samples": 1, "gen_ai.usage.input_tokens": 40, "gen_ai.usage.output_tokens": 5,
        "gen_ai.request.max_tokens": 5, "gen_ai.request.temperature": 0.0,
    }  # fmt: skip
    assert [(values(one)["slipstream.start"], values(one)["slipstream.tokens"]) for one in prefill] == [
        (0, 16), (16, 16), (32, 8)
    ]  # fmt: skip
    assert values(decode) == {"gen_ai.usage.output_tokens": 5}
    assert kept.resources[0]["service.name"] == "slipstream"
    assert kept.resources[0]["gen_ai.request.model"] == "fake"
    first, second, third = prefill
    times = [
        *(request.start_time_unix_nano, queue.start_time_unix_nano, queue.end_time_unix_nano),
        *(first.start_time_unix_nano, first.end_time_unix_nano, second.start_time_unix_nano),
        *(second.end_time_unix_nano, third.start_time_unix_nano, third.end_time_unix_nano),
        *(decode.start_time_unix_nano, decode.end_time_unix_nano, request.end_time_unix_nano),
    ]
    assert times == sorted(times)
    assert first.end_time_unix_nano == second.start_time_unix_nano
    assert third.end_time_unix_nano == decode.start_time_unix_nano


def test_requests_over_http_with_a_state_of_the_callers_vendor(collecting):
    kept, endpoint = collecting
    headers = {"traceparent": SAMPLED, "tracestate": "vendor=1"}

    async def scenario(server, channel):
        body = {"prompt": ["a", "b"], "max_tokens": 2}
        async with (
            ClientSession() as session,
            session.post(f"http://{server.http_address}/v1/completions", json=body, headers=headers) as reply,
        ):
            assert reply.status == 200

    serve(endpoint, scenario, http_port=0)
    requests = kept.of("request")
    assert len({values(span)["slipstream.request_id"] for span in requests}) == 2
    for span in requests:
        assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "vendor=1")


@pytest.mark.parametrize("sent", [(), (("traceparent", "nonsense"),)], ids=["none", "nonsense"])
def test_without_a_callers_span_a_trace_begins_here(collecting, sent):
    kept, endpoint = collecting

    async def scenario(server, channel):
        for _ in range(2):
            await answer(channel, text_request("a"), metadata=sent)

    serve(endpoint, scenario)
    requests = kept.of("request")
    assert [span.parent_span_id for span in requests] == [b"", b""]
    assert len({span.trace_id for span in requests}) == 2


def test_a_caller_that_does_not_sample_is_heeded(collecting):
    kept, endpoint = collecting

    async def scenario(server, channel):
        await answer(channel, text_request("a"), metadata=(("traceparent", NOT_SAMPLED),))

    serve(endpoint, scenario)
    assert kept.spans == []


def test_a_failure_is_an_error_and_one_that_waited_has_no_prefill(collecting):
    kept, endpoint = collecting

    def on_prefill(prompt):
        raise RuntimeError("broken")

    async def scenario(server, channel):
        with pytest.raises(grpc.aio.AioRpcError):
            await answer(channel, text_request("a"))

    serve(endpoint, scenario, FakeEngine(on_prefill=on_prefill))
    assert [span.name for span in kept.spans] == ["request", "queue"]
    (request,) = kept.of("request")
    assert request.status.code == request.status.STATUS_CODE_ERROR
    assert values(request)["slipstream.outcome"] == "failed"


def test_one_that_was_computed_once_more_says_so_in_its_decode(collecting):
    """Two answers of 40 tokens in a cache of four pages of 16 rows: one gives its pages back."""
    kept, endpoint = collecting
    tracer = Traces(endpoint)
    tracer.start("fake")
    with running(FakeEngine(pages=4, cache_length=64, max_prefill_length=64)) as orchestrator:
        requests = [Asked("a" * 8, 40) for _ in range(2)]
        for request in requests:
            request.trace = tracer.begin({}.get)
        orchestrator.submit(*requests)
        assert {request.answer()[1].finish_reason for request in requests} <= {FinishReason.STOP, FinishReason.LENGTH}
    tracer.close()
    resumed = [[event.name for event in span.events] for span in kept.of("decode")]
    assert sum(map(len, resumed)) >= 1
    assert {name for events in resumed for name in events} == {"resumed"}
    assert len(kept.of("prefill")) == 2


def test_without_the_flag_requests_note_nothing():
    asked = []

    async def scenario():
        async with serving() as (server, channel):
            submit = server.orchestrator.submit

            def noted(*requests):
                asked.extend(requests)
                submit(*requests)

            server.orchestrator.submit = noted
            await answer(channel, text_request("a"), metadata=(("traceparent", SAMPLED),))

    asyncio.run(scenario())
    assert [request.trace for request in asked] == [None]


def test_a_collector_that_is_not_there_holds_up_neither_requests_nor_the_end(monkeypatch):
    monkeypatch.setattr(traces, "FLUSH_S", 0.2)

    async def scenario(server, channel):
        assert (await answer(channel, text_request("a")))[0] == "bcd"

    serve("http://127.0.0.1:1", scenario)


def test_spans_that_find_no_place_are_counted(monkeypatch, caplog):
    monkeypatch.setattr(traces, "WAITING", 1)
    tracer = Traces("http://127.0.0.1:1")
    trace = tracer.begin({}.get)
    for _ in range(3):
        trace.end(Asked("a"), "ok")
    assert tracer.dropped == 2


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "grpc://a:1", "http://a:1/v1/traces", "http://", ""])
def test_an_endpoint_that_is_no_url(endpoint):
    with pytest.raises(RefusedError, match=r"otlp_endpoint=.* must be http://HOST:PORT"):
        Traces(endpoint)


def test_a_password_in_an_endpoint_is_told_to_nobody():
    with pytest.raises(RefusedError, match="without a user and a password") as refused:
        Traces("http://us:secret@collector:4317")
    assert "secret" not in str(refused.value)


def test_without_the_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc", None)
    with pytest.raises(RefusedError, match=r"--otlp-endpoint needs the package .*slipstream-llm\[otlp\]"):
        Traces("http://127.0.0.1:4317")
