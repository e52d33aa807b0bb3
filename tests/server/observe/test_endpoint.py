"""Who watches the server over HTTP."""

import asyncio
import socket
import urllib.error
import urllib.request

import grpc
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.config import ServerConfig, WatchConfig
from slipstream.server.observe.endpoint import Endpoint
from slipstream.server.observe.metrics import Metrics

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S, LoadedServing

CONFIG = ServerConfig(port=0, watch=WatchConfig(metrics_port=0))


def get(address: str, path: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=WAIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_request_is_in_the_metrics_when_it_is_answered():
    async def scenario():
        async with LoadedServing(lambda: (FakeEngine(), None), CONFIG) as serving:
            async with grpc.aio.insecure_channel(serving.address) as channel:
                text = pb.DecodeRequest.TextContent(text="a")
                request = pb.DecodeRequest(text_content=text, max_tokens=3)
                replies = [reply async for reply in OrchestratorStub(channel).Decode(request, timeout=WAIT_S)]
                assert replies
            status, body = await asyncio.to_thread(get, serving.endpoint.address, "/metrics")
            assert status == 200
            for line in (
                'requests_total{outcome="ok"} 1.0', "prompt_tokens_total 1.0", "generated_tokens_total 3.0",
                "slots 2.0", "slots_in_use 0.0", "queue_depth 0.0", "ttft_seconds_count 1.0", "e2e_seconds_count 1.0",
                "prefill_seconds_count 1.0", "decode_slot_steps_total 2.0", "compilations_after_warmup_total 0.0",
            ):  # fmt: skip
                assert f"\nslipstream_{line}\n" in body
            assert "_created" not in body

    asyncio.run(scenario())


def test_ready_means_serving():
    async def scenario():
        serving = LoadedServing(lambda: (FakeEngine(), None), CONFIG)
        async with serving:
            address = serving.endpoint.address
            assert await asyncio.to_thread(get, address, "/readyz") == (200, "ready\n")
            serving.doors.is_ready = False
            assert await asyncio.to_thread(get, address, "/readyz?verbose") == (503, "not ready\n")
            assert await asyncio.to_thread(get, address, "/healthz") == (200, "alive\n")
            assert (await asyncio.to_thread(get, address, "/"))[0] == 404
        with pytest.raises(urllib.error.URLError, match="refused"):
            get(address, "/healthz")

    asyncio.run(scenario())


def test_a_port_in_use_is_refused_before_the_load():
    async def scenario():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            config = ServerConfig(port=0, watch=WatchConfig(metrics_port=port))
            with pytest.raises(RefusedError, match=rf"metrics on 127\.0\.0\.1:{port}.*in use.*another --metrics-port"):
                await LoadedServing(lambda: pytest.fail("loaded"), config).__aenter__()

    asyncio.run(scenario())


def test_a_load_that_is_refused_closes_the_port():
    def refuse():
        raise RefusedError("no such model")

    async def scenario():
        serving = LoadedServing(refuse, CONFIG)
        with pytest.raises(RefusedError, match="no such model"):
            await serving.__aenter__()
        with pytest.raises(urllib.error.URLError, match="refused"):
            get(serving.endpoint.address, "/healthz")

    asyncio.run(scenario())


def test_an_ipv6_host():
    endpoint = Endpoint("::1", 0, Metrics().registry, lambda: True)
    try:
        assert endpoint.address.startswith("[::1]:")
        assert get(endpoint.address, "/readyz")[0] == 200
    finally:
        endpoint.close()
