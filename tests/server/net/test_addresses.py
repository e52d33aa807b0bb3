"""More than one address, and Unix domain sockets, for both fronts."""

import asyncio
import socket

import aiohttp
import grpc
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.address import Address
from slipstream.server.config import SecurityConfig, ServerConfig
from slipstream.server.net.ports import listening
from slipstream.server.net.security import FORWARDED

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S
from tests.server.http.serving import serving

REQUEST = pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text="a"), max_tokens=3)
LONG = pb.DecodeRequest(token_content=pb.DecodeRequest.TokenContent(token_ids=[1]), max_tokens=100)


async def over_grpc(target):
    async with grpc.aio.insecure_channel(target) as channel:
        replies = [reply async for reply in OrchestratorStub(channel).Decode(REQUEST, timeout=WAIT_S)]
    return "".join(reply.stream_content.samples[0].text for reply in replies)


async def over_http(base, connector=None):
    body = {"prompt": "a", "max_tokens": 3}
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post(f"{base}/v1/completions", json=body) as answer,
    ):
        return (await answer.json())["choices"][0]["text"]


def test_unix_sockets_of_both_fronts(tmp_path):
    """Beside the ports, or for HTTP alone; they are gone with the server."""
    at_grpc, at_http = tmp_path / "grpc", tmp_path / "http"

    async def scenario():
        async with serving(listen=(f"unix:{at_grpc}",), http_listen=(f"unix:{at_http}",)) as (server, _):
            assert await over_grpc(f"unix:{at_grpc}") == await over_grpc(server.address) == "bcd"
            assert await over_http("http://localhost", aiohttp.UnixConnector(str(at_http))) == "bcd"
            assert await over_http(f"http://{server.http_address}") == "bcd"
        assert not at_http.exists()
        async with serving(http_port=None, http_listen=(f"unix:{at_http}",)) as (server, _):
            assert server.http_address == f"unix:{at_http}"
            assert await over_http("http://localhost", aiohttp.UnixConnector(str(at_http))) == "bcd"

    asyncio.run(scenario())


def test_behind_a_proxy_clients_are_those_whom_it_names(tmp_path):
    """Over both fronts; each may have one answer under way."""
    at_grpc, at_http = tmp_path / "grpc", tmp_path / "http"
    security = SecurityConfig(behind_proxy=True, max_streams_per_client=1)

    async def scenario():
        async with (
            serving(FakeEngine(step_s=0.01), grace_s=0, listen=(f"unix:{at_grpc}",), http_listen=(f"unix:{at_http}",),
                    security=security),
            aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(str(at_http))) as session,
            grpc.aio.insecure_channel(f"unix:{at_grpc}") as channel,
        ):  # fmt: skip

            async def status(forwarded):
                body, headers = {"prompt": "a", "max_tokens": 3, "stream": True}, {FORWARDED: forwarded}
                async with session.post("/v1/completions", json=body, headers=headers) as answer:
                    return answer.status

            first = OrchestratorStub(channel).Decode(LONG, metadata=((FORWARDED, "10.0.0.1"),))
            await first.read()
            assert await status("10.0.0.2, 10.0.0.1") == 429
            assert await status("10.0.0.1, 10.0.0.2") == 200
            second = OrchestratorStub(channel).Decode(LONG, metadata=((FORWARDED, "10.0.0.1"),))
            assert await second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert not first.done()
            first.cancel()
            async with session.get("/") as page:  # for this machine alone
                assert page.status == 404

    asyncio.run(scenario())


def test_a_socket_whose_server_is_gone_is_replaced_and_one_in_use_is_not(tmp_path):
    path = tmp_path / "http"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()

    async def scenario():
        async with serving(http_listen=(f"unix:{path}",)):
            with pytest.raises(RefusedError, match="--http-listen: another server listens on"):
                async with serving(http_listen=(f"unix:{path}",)):
                    pass
            with pytest.raises(RefusedError, match="--listen: another server listens on"):
                async with serving(listen=(f"unix:{path}",)):
                    pass
            assert await over_http("http://localhost", aiohttp.UnixConnector(str(path))) == "bcd"
        path.write_text("somebody's")
        with pytest.raises(RefusedError, match="is there and no socket"):
            async with serving(http_listen=(f"unix:{path}",)):
                pass
        assert path.read_text() == "somebody's"

    asyncio.run(scenario())


def test_several_addresses_of_both_fronts():
    async def scenario():
        port = listening("127.0.0.2", 0, what="HTTP", flag="--http-port")[0]
        other = port.getsockname()[1]
        port.close()
        async with serving(listen=("127.0.0.3:0",), http_listen=(f"127.0.0.2:{other}",)) as (server, _):
            assert await over_http(f"http://127.0.0.2:{other}") == await over_http(f"http://{server.http_address}")

    asyncio.run(scenario())


def test_a_name_stands_for_all_its_addresses(monkeypatch):
    """As gRPC takes localhost: what has ::1 and 127.0.0.1 listens on both, on one port."""
    known = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),  # not this machine's
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: known)
    socks = listening("somebody", 0, what="HTTP", flag="--http-port")
    try:
        names = [sock.getsockname() for sock in socks]
        assert [name[0] for name in names] == ["127.0.0.1", "127.0.0.2"]
        assert len({name[1] for name in names}) == 1
    finally:
        for sock in socks:
            sock.close()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/x", Address(path="/run/x")),
        ("localhost:80", Address("localhost", 80)),
        ("[::1]:0", Address("::1", 0)),
    ],
)
def test_addresses_are_read_and_written(text, address):
    assert Address.parse("listen", text) == address
    assert str(address) == text


@pytest.mark.parametrize("text", ["", "host", "unix:", "unix:/" + "x" * 107, "a:b", "::1:80", "h:65536", "h:-1"])
def test_what_is_no_address_is_refused_by_its_flag(text):
    with pytest.raises(RefusedError, match="http_listen="):
        ServerConfig(http_listen=(text,))


def test_who_is_reached_from_elsewhere_is_not_local():
    assert ServerConfig(listen=("unix:/x", "127.0.0.1:1")).is_local
    assert not ServerConfig(http_listen=("0.0.0.0:80",)).is_local
    proxied = ServerConfig(security=SecurityConfig(behind_proxy=True))
    assert (proxied.listens_locally, proxied.is_local) == (True, False)
    with pytest.raises(RefusedError, match="'unix:/x' is listened on twice"):
        ServerConfig(listen=("unix:/x",), http_listen=("unix:/x",))


def test_a_server_that_cannot_listen_everywhere_listens_nowhere(tmp_path):
    async def scenario():
        taken = listening("127.0.0.1", 0, what="HTTP", flag="--http-port")[0]
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with taken, pytest.raises(RefusedError, match="--http-listen"):
            async with serving(http_listen=(f"unix:{tmp_path / 'x'}", where)):
                pass

    asyncio.run(scenario())
