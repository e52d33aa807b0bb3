"""Ports, and the connections behind them."""

import asyncio

import grpc
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server import doors
from slipstream.server.config import ServerConfig
from slipstream.server.lifecycle import Serving

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S, LoadedServing


def test_a_port_in_use_is_refused_before_the_load():
    async def scenario():
        async with Serving(lambda: (FakeEngine(), None), ServerConfig(port=0)) as first:
            port = int(first.address.rsplit(":", 1)[1])
            with pytest.raises(RefusedError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
                await Serving(lambda: pytest.fail("loaded"), ServerConfig(port=port)).__aenter__()

    asyncio.run(scenario())


def test_a_host_that_is_not_here_is_refused():
    async def scenario():
        with pytest.raises(RefusedError, match=r"cannot listen on 192\.0\.2\.1:0"):
            await Serving(lambda: pytest.fail("loaded"), ServerConfig(host="192.0.2.1", port=0)).__aenter__()

    asyncio.run(scenario())


async def forward(reader, writer, is_cut):
    """Bytes, until the line is cut: then they go nowhere, and nobody is told."""
    while data := await reader.read(65536):
        if not is_cut.is_set():
            writer.write(data)
    writer.close()


def test_a_peer_that_vanishes_without_a_word_gives_its_slot_back(monkeypatch):
    monkeypatch.setattr(doors, "KEEPALIVE_S", 0.4)

    async def scenario():
        is_cut, engine = asyncio.Event(), FakeEngine(step_s=0.02, cache_length=10_000)
        config = ServerConfig(port=0, grace_s=0, probe_interval_s=0)
        async with LoadedServing(lambda: (engine, None), config) as serving:

            async def through(reader, writer):
                to_server = await asyncio.open_connection(*serving.address.split(":"))
                await asyncio.gather(forward(reader, to_server[1], is_cut), forward(to_server[0], writer, is_cut))

            proxy = await asyncio.start_server(through, "127.0.0.1", 0)
            port = proxy.sockets[0].getsockname()[1]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                endless = pb.DecodeRequest.TextContent(text="a")
                request = pb.DecodeRequest(text_content=endless, max_tokens=5000, ignore_eos=True)
                call = OrchestratorStub(channel).Decode(request)
                await call.read()
                is_cut.set()
                while serving.orchestrator.slots_in_use:
                    await asyncio.sleep(0.02)
            proxy.close()

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
