"""Bodies made to cost their reader much, pages from elsewhere, and connections with manners of their own."""

import asyncio
import gzip
import io
import json
import socket
import time
from typing import Any

import aiohttp
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.config import SecurityConfig
from slipstream.server.http import reading
from slipstream.server.http.bodies import ChatBody, CompletionBody
from slipstream.server.http.errors import SHOWN, BadFieldError, HttpError
from slipstream.server.http.reading import unpacked
from slipstream.server.request.limits import MAX_MESSAGES, MAX_PROMPTS

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S, outcomes, until
from tests.server.http.serving import serving, url

JSON = {"content-type": "application/json"}
A: dict[str, Any] = {"prompt": "a", "max_tokens": 3}
MIB = 1 << 20


def error_of(kind, body: bytes) -> str:
    with pytest.raises(BadFieldError) as caught:
        kind.read(body)
    assert len(str(caught.value)) < SHOWN + 200
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "field", "item", "most"),
    [
        (CompletionBody, "prompt", "[1]", MAX_PROMPTS),
        (CompletionBody, "prompt", '"a"', MAX_PROMPTS),
        (ChatBody, "messages", '{"role": "user", "content": "a"}', MAX_MESSAGES),
        (ChatBody, "messages", "{}", MAX_MESSAGES),
    ],
)
def test_lists_have_a_greatest_length(kind, field, item, most):
    def body(count):
        return f'{{"{field}": [{",".join([item] * count)}]}}'.encode()

    assert f"has {most + 1} entries and may have {most}" in error_of(kind, body(most + 1))
    if item == "{}":
        assert "messages[0].role is missing" in error_of(kind, body(most))
    else:
        assert len(getattr(kind.read(body(most)), field)) == most


@pytest.mark.parametrize("field", ["stop", "stop_token_ids", "logit_bias"])
def test_options_of_a_million_entries_are_refused_by_their_number(field):
    entries = {"stop": ["a"] * 100_000, "stop_token_ids": [1] * 100_000, "logit_bias": dict.fromkeys(range(100_000), 1)}
    assert "has 100000 entries" in error_of(CompletionBody, json.dumps(A | {field: entries[field]}).encode())


def test_the_first_wrong_item_is_told_and_no_other():
    wrong = b'{"prompt": [%s]}' % b",".join([b'"a"', *[b"{}"] * 1000])
    assert error_of(CompletionBody, wrong).startswith("prompt[1]={}: ")
    assert "more" not in error_of(CompletionBody, wrong)


@pytest.mark.parametrize(
    ("raw", "encoding", "status"),
    [
        (gzip.compress(b"{}", mtime=0), "gzip", None),
        (gzip.compress(b"{}", mtime=0)[:-4], "gzip", 400),
        (gzip.compress(b"{}", mtime=0)[:-9], "gzip", 400),
        (gzip.compress(b"{}", mtime=0) + b"more", "gzip", 400),
        (b"{}", "gzip", 400),
        (b"", "gzip", 400),
        (gzip.compress(b" " * 1000, mtime=0), "gzip", None),
        (gzip.compress(b" " * 1001, mtime=0), "gzip", 413),
        (gzip.compress(b"{}", mtime=0), "deflate", 400),
        (b"{}", "br", 415),
    ],
)
def test_packed_bodies(raw, encoding, status):
    if status is None:
        assert unpacked(raw, encoding, 1000) == gzip.decompress(raw)
        return
    with pytest.raises(HttpError) as caught:
        unpacked(raw, encoding, 1000)
    assert caught.value.status == status


def test_large_bodies_are_answered_as_small_ones_are():
    """They are read in another process: what it refuses comes back with its field and status."""

    async def scenario():
        engine = FakeEngine(cache_length=1 << 18, max_prefill_length=150_000, prefill_chunk=1 << 17, page_rows=1024)
        async with serving(engine) as (server, _), aiohttp.ClientSession(headers=JSON) as session:

            async def ask(body, path="completions", **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                async with session.post(url(server, f"/v1/{path}"), data=body, headers=headers) as answer:
                    return answer.status, await answer.json()

            status, answer = await ask({"prompt": "a" * 100_000, "max_tokens": 2})
            assert (status, answer["choices"][0]["text"]) == (200, "bc")
            status, answer = await ask(gzip.compress(json.dumps(A).encode()), **{"content-encoding": "gzip"})
            assert (status, answer["choices"][0]["text"]) == (200, "bcd")
            status, answer = await ask({"messages": [{"role": "user"}] * 5000}, "chat/completions")
            assert (status, answer["error"]["param"]) == (400, "messages[0].content")
            status, answer = await ask({"prompt": [65] * 150_001})
            assert (status, answer["error"]["message"][:30]) == (400, "the prompt has 150001 tokens, ")
            status, answer = await ask(gzip.compress(b" " * 5 * MIB), **{"content-encoding": "gzip"})
            assert (status, "max_message_bytes" in answer["error"]["message"]) == (413, True)
            status, answer = await ask(b"{" * 100_000)
            assert (status, "cannot be read" in answer["error"]["message"]) == (400, True)

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b'{"prompt": [%s]}' % b",".join([b"[1]"] * 200), 202),
        (b'{"messages": [%s]}' % b",".join([b"{}"] * 200), 202),
        (b'{"prompt": "%s"}' % (b"[{" * 200), None),
        (b'{"prompt": "%s"}' % (rb"\"[{" * 200), None),
        (b'{"prompt": "\\\\", "x": [%s]}' % b",".join([b"[]"] * 200), 202),
        (b'{"prompt": "%s' % (b"[" * 200), 201),
        (b"[" * 200, 200),
    ],
    ids=lambda value: str(value)[:40],
)
def test_lists_and_objects_are_counted_before_any_is_made(body, count, monkeypatch):
    """But not those that stand in a text."""
    monkeypatch.setattr(reading, "MAX_NESTED", 50)
    if count is None:
        reading.check_nested(body)
        return
    with pytest.raises(BadFieldError, match=f"the body has {count} lists and objects and may have 50; send fewer"):
        reading.check_nested(body)


@pytest.mark.slow
def test_a_million_objects_keep_nobody_waiting():
    """Streams and health checks go on while a body is parsed that would hold the interpreter for seconds."""

    async def scenario():
        body = b'{"messages": [%s]}' % b",".join([b"{}"] * 1_300_000)
        async with serving() as (server, client), aiohttp.ClientSession(headers=JSON) as session:
            await client.completions.create(model="fake", **A)

            async def attack():
                async with session.post(url(server, "/v1/chat/completions"), data=io.BytesIO(body)) as answer:
                    return (await answer.json())["error"]["message"]

            attacks, waits = [asyncio.create_task(attack()) for _ in range(4)], []
            while not all(task.done() for task in attacks):
                begin = time.perf_counter()
                async with session.get(url(server, "/health")) as answer:
                    assert answer.status == 200
                waits.append(time.perf_counter() - begin)
                await asyncio.sleep(0.01)
            assert all("has 1300002 lists and objects" in message for message in await asyncio.gather(*attacks))
            assert max(waits) < 1.0

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_too_many_large_bodies_are_told_to_come_again(monkeypatch):
    monkeypatch.setattr(reading, "MAX_WAITING", 0)

    async def scenario():
        async with serving() as (server, _), aiohttp.ClientSession(headers=JSON) as session:
            body = json.dumps({"prompt": "a" * (reading.SMALL + 1)}).encode()
            async with session.post(url(server, "/v1/completions"), data=body) as answer:
                assert answer.status == 429
                assert "retry-after" in answer.headers

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json"}, 200),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "Application/JSON"}, 200),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "text/plain; application/json"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": ""}, 415),
        ({}, 415),
        (JSON | {"origin": "http://evil.example"}, 403),
        (JSON | {"origin": "null"}, 403),
        (JSON | {"origin": "http://HOST"}, 200),
        (JSON | {"origin": "http://localhost:1", "host": "localhost:1"}, 200),
        (JSON | {"origin": "http://[::1]:1", "host": "[::1]:1"}, 200),
        # A stranger's domain that he lets mean this machine.
        (JSON | {"origin": "http://evil.example:1", "host": "evil.example:1"}, 403),
        (JSON | {"origin": "http://[evil", "host": "[evil"}, 403),
        (JSON | {"host": "evil.example:1"}, 200),  # no page, but a program behind a gateway
        (JSON | {"origin": "http://page.example:8080"}, 200),
        (JSON | {"origin": "http://page.example"}, 403),
        (JSON | {"origin": "http://page.example:8080.evil.example"}, 403),
    ],
    ids=str,
)
def test_what_pages_from_elsewhere_can_send_is_refused(headers, status):
    async def scenario():
        security = SecurityConfig(allow_origin=("http://page.example:8080",))
        async with serving(security=security) as (server, _), aiohttp.ClientSession() as session:
            sent = {name: value.replace("HOST", server.http_address) for name, value in headers.items()}
            skipped = () if "content-type" in sent else ("content-type",)
            where = url(server, "/v1/completions")
            body = json.dumps(A).encode()
            async with session.post(where, data=body, headers=sent, skip_auto_headers=skipped) as answer:
                assert answer.status == status
                named = sent.get("origin") == "http://page.example:8080"
                assert answer.headers.get("access-control-allow-origin") == (sent["origin"] if named else None)
            assert outcomes(server).get("ok", 0) == (status == 200)

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_a_page_that_was_named_may_ask_before_it_sends(tmp_path):
    """A preflight brings no token."""
    (tmp_path / "tokens").write_text("alpha")

    async def scenario():
        security = SecurityConfig(allow_origin=("http://page.example",), auth_token_file=tmp_path / "tokens")
        async with serving(security=security) as (server, _), aiohttp.ClientSession() as session:
            for origin, status in (("http://page.example", 204), ("http://evil.example", 403)):
                headers = {"origin": origin, "access-control-request-method": "POST"}
                async with session.options(url(server, "/v1/completions"), headers=headers) as answer:
                    assert answer.status == status
                    assert ("access-control-allow-origin" in answer.headers) == (status == 204)

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


@pytest.mark.parametrize("origin", ["page.example", "http://", "http://a/b", "*"])
def test_origins_are_checked_at_the_start(origin):
    with pytest.raises(RefusedError, match="must be SCHEME://HOST"):
        SecurityConfig(allow_origin=(origin,))


def test_the_token_is_asked_before_a_body_is_unpacked(tmp_path, monkeypatch):
    (tmp_path / "tokens").write_text("alpha")
    bomb = gzip.compress(bytes(64 * MIB))

    async def scenario():
        security = SecurityConfig(auth_token_file=tmp_path / "tokens")
        async with serving(security=security) as (server, _), aiohttp.ClientSession(headers=JSON) as session:
            before = time.process_time()
            for _ in range(10):
                headers = {"content-encoding": "gzip"}
                async with session.post(url(server, "/v1/completions"), data=bomb, headers=headers) as answer:
                    assert answer.status == 401
            assert time.process_time() - before < 1.0, "640 MiB would take longer"

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def request_of(version="1.1", **more) -> bytes:
    body = json.dumps(A | more)
    lines = f"POST /v1/completions HTTP/{version}", "host: x", "content-type: application/json"
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", body]).encode()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_ends_its_side_gets_its_answer(is_stream, version):
    async def scenario():
        async with serving(FakeEngine(step_s=0.02)) as (server, _):
            reader, writer = await asyncio.open_connection(*server.http_address.split(":"))
            writer.write(request_of(version, stream=is_stream))
            writer.write_eof()
            answer = await reader.read()
            assert b" 200 OK" in answer
            assert (b"[DONE]" if is_stream else b'"text": "bcd"') in answer
            assert (b" 100 " in answer) == (version == "1.1")
            writer.close()

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_a_client_that_ends_both_sides_has_left():
    async def scenario():
        async with serving(FakeEngine(step_s=0.01)) as (server, _):
            _, writer = await asyncio.open_connection(*server.http_address.split(":"))
            writer.write(request_of(prompt="\x01", max_tokens=120))
            await until(lambda: server.orchestrator.slots_in_use == 1)
            writer.close()
            await until(lambda: outcomes(server) == {"cancelled": 1.0})

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


def test_half_a_body_is_no_request():
    async def scenario():
        async with serving() as (server, _):
            reader, writer = await asyncio.open_connection(*server.http_address.split(":"))
            writer.write(request_of()[:-5])
            writer.write_eof()
            assert b" 200 " not in await reader.read()
            writer.close()
            await until(lambda: server._gateway.calls == 0)
            assert outcomes(server) == {}

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: x\r\n" % number for number in range(200)) + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: " + b"x" * 9000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -2\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
    ],
    ids=lambda words: words[:50],
)
def test_heads_that_cannot_be_read_are_answered_as_everything_else_is(words, caplog):
    async def scenario():
        async with serving() as (server, _):
            reader, writer = await asyncio.open_connection(*server.http_address.split(":"))
            writer.write(words)
            answer, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert b" 400 " in answer.partition(b"\r\n")[0]
            assert b"aiohttp" not in answer.lower()
            assert b"python" not in answer.lower()
            assert b"server: slipstream" in answer.lower()
            assert b"x-request-id: " in answer.lower()
            error = json.loads(body)["error"]
            assert error["type"] == "invalid_request_error"
            assert "\n" not in error["message"]

    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_the_kernel_tells_of_a_reset():
    from slipstream.server.net.connections import is_reset

    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        theirs.close()
        assert not is_reset(ours)
        ours.send(b"x")
        begin = time.monotonic()
        while not is_reset(ours):
            assert time.monotonic() - begin < WAIT_S
        ours.close()
