"""How calls begin and end: who may pass, leaving early, the drain."""

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import openai
import pytest
from openai import AuthenticationError, InternalServerError, RateLimitError
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.runtime import tracing
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.config import SecurityConfig, ServerConfig, WatchConfig
from slipstream.server.lifecycle import Serving
from slipstream.server.net import ports
from slipstream.server.net.security import plain_ip

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S, LoadedServing, outcomes, until
from tests.server.http.serving import client_of, serving, url

A: dict[str, Any] = {"model": "fake", "prompt": "a", "max_tokens": 3}
LONG: dict[str, Any] = {"model": "fake", "prompt": "\x01", "max_tokens": 120}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("stage", ["queued", "prefilling", "decoding"])
def test_a_client_that_leaves_frees_what_it_held(stage, is_stream, caplog):
    async def scenario():
        may_prefill = threading.Event()
        engine = FakeEngine(max_concurrent_decodes=2, step_s=0.002)
        async with serving(engine) as (server, client), aiohttp.ClientSession() as session:
            running, expected = None, {"cancelled": 1.0}
            if stage == "queued":
                engine.pace = threading.Semaphore(0)
                running = asyncio.create_task(client.completions.create(**dict(A, max_tokens=9, n=2)))
                await until(lambda: server.orchestrator.slots_in_use == 2)
            if stage == "prefilling":
                engine.on_prefill = lambda prompt: may_prefill.wait(WAIT_S)

            async def ask():
                body = LONG | {"n": 2, "stream": is_stream}
                async with session.post(url(server, "/v1/completions"), json=body) as answer:
                    await answer.read()

            leaving = asyncio.create_task(ask())
            if stage == "decoding":
                await until(lambda: server.orchestrator.slots_in_use == 2)
            elif stage == "prefilling":
                await until(lambda: "prefill \x01" in engine.log)
            else:
                await until(lambda: server.orchestrator.queue_depth == 1)
            leaving.cancel()
            await until(lambda: outcomes(server) == {"cancelled": 1.0})
            may_prefill.set()
            if running is not None:
                assert server.orchestrator.queue_depth == 0
                engine.pace.release(99)
                await running
                expected["ok"] = 1.0
                assert "prefill \x01" not in engine.log
            await until(lambda: server.orchestrator.slots_in_use == 0)
            assert (await client.completions.create(**A)).choices[0].text == "bcd"
            assert outcomes(server) == {**expected, "ok": expected.get("ok", 0.0) + 1}
            assert server._gateway.calls == 0

    asyncio.run(scenario())
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_draining_finishes_what_runs_and_refuses_what_is_new():
    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(0))
        server = LoadedServing(lambda: (engine, None), ServerConfig(port=0, http_port=0, grace_s=WAIT_S))
        await server.__aenter__()
        async with client_of(server) as client:
            stream = await client.completions.create(**dict(A, max_tokens=5), stream=True)
            whole = asyncio.create_task(client.completions.create(**dict(A, prompt="A", max_tokens=5)))
            await until(lambda: server.orchestrator.slots_in_use + server.orchestrator.queue_depth == 2)
            leaving = asyncio.create_task(server.__aexit__())
            await until(lambda: not server.is_ready)
            with pytest.raises(InternalServerError, match="the server is stopping") as refused:
                await client.completions.create(**A)
            assert refused.value.status_code == 503
            engine.pace.release(99)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == "bcdef"
            assert (await whole).choices[0].text == "BCDEF"
            await leaving

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_the_grace_has_an_end(caplog):
    """A stream is told, an answer in one piece has a status."""

    async def scenario():
        engine = FakeEngine(step_s=0.005)
        server = LoadedServing(lambda: (engine, None), ServerConfig(port=0, http_port=0, grace_s=0.05))
        await server.__aenter__()
        async with client_of(server) as client:
            stream = aiter(await client.completions.create(**LONG, stream=True))
            await anext(stream)
            whole = asyncio.create_task(client.completions.create(**LONG))
            await until(lambda: server.orchestrator.slots_in_use == 2)
            leaving = asyncio.create_task(server.__aexit__())
            with pytest.raises(openai.APIError, match="the server is stopping"):
                [chunk async for chunk in stream]
            with pytest.raises(InternalServerError, match="the server is stopping") as told:
                await whole
            assert told.value.status_code == 503
            await leaving

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert "cancelling 2 requests that are not finished" in caplog.text


def test_a_client_that_does_not_read_holds_nobody_up_and_is_cut_in_the_end(monkeypatch):
    """Its answer is made and waits; the slot is free. The model's name is in every chunk, and fills the buffers."""
    monkeypatch.setattr(ports, "UNACKNOWLEDGED_MS", 1000)

    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, cache_length=10_000, step_s=0.0005, model_name="m" * 40_000)
        async with serving(engine) as (server, client):
            host, port = server.http_address.split(":")
            with socket.socket() as deaf:
                deaf.connect((host, int(port)))
                body = b'{"prompt": "a", "max_tokens": 250, "stream": true, "ignore_eos": true}'
                head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                deaf.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                await until(lambda: server.orchestrator.slots_in_use == 1)
                assert (await client.completions.create(prompt="a", max_tokens=3, model=engine.model_name)).choices[
                    0
                ].text == "bcd"
                assert server.orchestrator.slots_in_use == 0
                assert server._gateway.calls == 1, "still being written"
                await until(lambda: server._gateway.calls == 0)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def token_file(folder: Path, *tokens: str) -> Path:
    path = folder / "tokens"
    path.write_text("\n".join(tokens))
    return path


def test_requests_need_a_known_token_and_health_checks_none(tmp_path):
    async def scenario():
        security = SecurityConfig(auth_token_file=token_file(tmp_path, "alpha", "beta"))
        async with serving(security=security) as (server, nobody), client_of(server, "beta") as known:
            with pytest.raises(AuthenticationError, match="send `authorization: Bearer TOKEN`") as caught:
                await nobody.completions.create(**A)
            assert caught.value.code == "invalid_api_key"
            with pytest.raises(AuthenticationError):
                await nobody.models.list()
            assert (await known.completions.create(**A)).choices[0].text == "bcd"
            async with aiohttp.ClientSession() as session:
                async with session.get(url(server, "/health")) as answer:
                    assert answer.status == 200
                for value in ("alpha", "Basic alpha", "Bearer", "Bearer alph", "Bearer \u00e4"):
                    async with session.get(url(server, "/v1/models"), headers={"authorization": value}) as answer:
                        assert answer.status == 401

    asyncio.run(scenario())


@pytest.mark.parametrize("by_token", [False, True])
def test_both_doors_count_one_clients_answers(by_token, tmp_path):
    async def scenario():
        path = token_file(tmp_path, "alpha", "beta") if by_token else None
        security = SecurityConfig(max_streams_per_client=2, auth_token_file=path)
        engine = FakeEngine(step_s=0.02, max_concurrent_decodes=4)
        async with serving(engine, security=security) as (server, _), client_of(server, "alpha") as client:
            metadata = (("authorization", "Bearer alpha"),) if by_token else ()
            async with grpc.aio.insecure_channel(server.address) as channel:
                text = pb.DecodeRequest.TextContent(text="\x01")
                request = pb.DecodeRequest(text_content=text, max_tokens=110)
                call = OrchestratorStub(channel).Decode(request, timeout=WAIT_S, metadata=metadata)
                await call.read()
                stream = await client.completions.create(**LONG, stream=True)
                with pytest.raises(RateLimitError, match="2 answers are under way for this client") as caught:
                    await client.completions.create(**A)
                assert caught.value.response.headers["retry-after"] == "1"
                refused = OrchestratorStub(channel).Decode(request, timeout=WAIT_S, metadata=metadata)
                with pytest.raises(grpc.aio.AioRpcError, match="max_streams_per_client=2"):
                    await refused.read()
                if by_token:
                    async with client_of(server, "beta") as other:
                        assert (await other.completions.create(**A)).choices[0].text == "bcd"
                with pytest.raises(openai.BadRequestError, match="3 prompts at once exceed max_streams_per_client=2"):
                    await client.completions.create(**dict(A, prompt=["a"] * 3))
                call.cancel()
                await stream.close()
                await until(lambda: server._gateway.calls == 0)
                answer = await client.completions.create(**dict(A, prompt=["a"] * 2))
                assert [choice.text for choice in answer.choices] == ["bcd", "bcd"]

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


@pytest.mark.parametrize(
    ("address", "plain"), [("::ffff:192.0.2.1", "192.0.2.1"), ("0::0:1", "::1"), ("192.0.2.1", "192.0.2.1"), ("", "")]
)
def test_one_client_has_one_address(address, plain):
    assert plain_ip(address) == plain


def test_a_port_in_use_is_refused_before_the_load_and_frees_the_others():
    async def scenario():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            server = LoadedServing(
                lambda: pytest.fail("loaded"), ServerConfig(port=0, http_port=port, watch=WatchConfig(metrics_port=0))
            )
            with pytest.raises(RefusedError, match=rf"HTTP on 127\.0\.0\.1:{port}.*in use.*another --http-port"):
                await server.__aenter__()
            with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
                probe.connect(("127.0.0.1", int(server.endpoint.address.split(":")[1])))

    asyncio.run(scenario())


def test_without_the_flag_there_is_no_http():
    async def scenario():
        async with Serving(lambda: (FakeEngine(), None), ServerConfig(port=0)) as server:
            assert server.http_address is None

    asyncio.run(scenario())


@pytest.mark.parametrize("host", ["::1", "::"])
def test_ipv6(host):
    async def scenario():
        async with serving(host=host) as (server, _), aiohttp.ClientSession() as session:
            port = server.http_address.rpartition(":")[2]
            for address in ["[::1]"] + ["127.0.0.1"] * (host == "::"):
                async with session.get(f"http://{address}:{port}/health") as answer:
                    assert answer.status == 200

    asyncio.run(scenario())


def test_the_first_request_is_traced(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(tracing, "start", lambda folder: calls.append(folder))
    monkeypatch.setattr(tracing, "stop", lambda: calls.append("stop"))

    async def scenario():
        async with serving(watch=WatchConfig(profile=tmp_path, profile_s=0.01)) as (_, client):
            await client.models.list()
            assert not calls
            await client.completions.create(**A)
            await until(lambda: calls == [tmp_path, "stop"])

    asyncio.run(scenario())


SERVER = """
import asyncio, sys
from slipstream.server.observe import logs
from slipstream.server.config import ServerConfig
from slipstream.server.serve import serve
from tests.fakes import FakeEngine
logs.configure("text")
load = lambda: (FakeEngine(step_s=0.02), None)
sys.exit(asyncio.run(serve(load, ServerConfig(port=0, http_port=0, grace_s=30))))
"""


def test_a_signal_drains_and_exits_0():
    """The address is in the log; stdout has gRPC's alone."""
    command = [sys.executable, "-W", "error", "-c", SERVER]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stderr.readline()
        base_url = line.split("OpenAI's endpoints on ")[1].strip()
        assert process.stdout.readline().startswith("SERVING on 127.0.0.1:")
        with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="fake", prompt=[64], max_tokens=10, stream=True)
            text = next(stream).choices[0].text
            process.send_signal(signal.SIGTERM)
            text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == "ABCDEFGHIJ"
        assert process.wait(WAIT_S) == 0
        assert process.stdout.read() == ""
        assert " E " not in process.stderr.read()
