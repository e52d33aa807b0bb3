"""Bytes that are no message, at every service, and values too large to be told."""

import asyncio
import gc
import weakref
from contextlib import suppress
from typing import Any

import grpc
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.server.config import SecurityConfig
from slipstream.server.errors import LONGEST, TAIL, brief
from slipstream.server.grpc import service
from slipstream.server.request.limits import MAX_MESSAGES

from tests.fakes import FakeEngine
from tests.server.calls import (
    WAIT_S,
    answer,
    chat_request,
    failure,
    refusal,
    serving,
    text_request,
    token_request,
    until,
)
from tests.server.test_raw_bytes import HEADERS, MESSAGE, PREFACE, frame, literal

HEALTH, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
DECODE = "/jetstream_proto.Orchestrator/Decode"

GARBAGE = {
    "random": b"\xff\x17\x80random bytes",
    "not UTF-8": b"\x0a\x02\xff\xfe\x2a\x04\x0a\x02\xff\xfe",  # as text of Health's, and of Decode's
    "deep groups": b"\x0b" * 100_000,
}


async def outcome(channel, method: str, data: bytes, metadata=()) -> tuple[grpc.StatusCode, str]:
    """Of one message sent there."""
    make = {WATCH: channel.unary_stream, DECODE: channel.unary_stream, REFLECTION: channel.stream_stream}
    call: Any = make.get(method, channel.unary_unary)(method)
    replies = call(iter([data]) if method == REFLECTION else data, timeout=WAIT_S, metadata=metadata)

    async def read() -> None:
        if method not in make:
            await replies
        else:
            async for _ in replies:
                pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    return caught.value.code(), caught.value.details() or ""


@pytest.mark.parametrize("method", [HEALTH, WATCH, REFLECTION, DECODE])
@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_what_is_no_message_is_an_invalid_argument_and_no_line_of_the_log(method, data, caplog):
    async def scenario():
        async with serving() as (_, channel):
            code, details = await outcome(channel, method, data)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert f"{len(data)} bytes" in details
            assert (await answer(channel, text_request("a")))[0] == "bcd"

    asyncio.run(scenario())
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("method", [REFLECTION, DECODE])
def test_without_a_token_nothing_is_parsed(method, tmp_path):
    (tmp_path / "tokens").write_text("alpha")

    async def scenario():
        async with serving(security=SecurityConfig(auth_token_file=tmp_path / "tokens")) as (_, channel):
            data = GARBAGE["random"]
            assert (await outcome(channel, method, data))[0] is grpc.StatusCode.UNAUTHENTICATED
            known = (("authorization", "Bearer alpha"),)
            assert (await outcome(channel, method, data, known))[0] is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(scenario())


@pytest.mark.parametrize("character", ["x", "é", "😀", "\n"])
def test_a_large_value_is_told_in_part(character):
    """As metadata a character takes up to twelve bytes; gRPC's clients take 8,192 in all."""

    async def scenario():
        async with serving() as (_, channel):
            error = await failure(channel, text_request("a", lora_adapter_id=character * 1_000_000))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            details = error.details() or ""
            assert details.startswith("lora_adapter_id='")
            assert details.endswith("must be empty: there are no adapters; serve with --max-adapters N")
            assert len(details) <= LONGEST

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("name", "value"),
    [(b"x-\xa9", b"a"), (b"x-a", b"\xa9"), (b"authorization", b"Bearer \xff"), (b"x-request-id", b"\xff")],
)
def test_metadata_that_is_no_text_is_no_line_of_the_log(name, value, caplog):
    """gRPC's own Python logs a traceback for each."""

    async def scenario():
        async with serving() as (server, channel):
            reader, writer = await asyncio.open_connection(*server.address.split(":"))
            data = b"\x00" + len(MESSAGE).to_bytes(4, "big") + MESSAGE
            writer.write(PREFACE + frame(1, 4, 1, HEADERS + literal(name, value)) + frame(0, 1, 1, data))
            came = b""
            with suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    while piece := await reader.read(65536):
                        came += piece
            writer.close()
            assert came, "it is answered, in whatever way"
            assert (await answer(channel, text_request("a")))[0] == "bcd"

    asyncio.run(scenario())
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


class Megabytes(list):
    """What a call brought."""


def test_what_was_refused_is_let_go_at_once(monkeypatch):
    """Not only when garbage is collected, which may be never while a server is quiet."""
    kept = []

    def read_request(*args, **known):
        brought = Megabytes()
        kept.append(weakref.ref(brought))
        try:
            raise ValueError("too much")
        except ValueError as error:
            raise RefusedError("the prompt is too long") from error

    monkeypatch.setattr(service, "read_request", read_request)

    async def scenario():
        async with serving() as (_, channel):
            gc.disable()
            try:
                for text in ("a", "a" * 100_000):
                    assert (await refusal(channel, text_request(text)))[1] == "the prompt is too long"
                await until(lambda: [brought() for brought in kept] == [None, None])
            finally:
                gc.enable()

    asyncio.run(scenario())


@pytest.mark.parametrize("length", [0, LONGEST, LONGEST + 1, 10**6])
def test_messages_are_cut_in_the_middle(length):
    message = "".join(chr(97 + number % 26) for number in range(length))
    told = brief(message)
    assert told == message if length <= LONGEST else (len(told), told[-TAIL:]) == (LONGEST, message[-TAIL:])


def test_counts_are_checked_before_anything_is_made_of_them():
    async def scenario():
        async with serving() as (_, channel):
            many = pb.DecodeRequest(max_tokens=3)
            many.messages.messages.extend([pb.DecodeRequest.Message()] * (MAX_MESSAGES + 1))
            message = f"messages has {MAX_MESSAGES + 1} entries and may have {MAX_MESSAGES}"
            assert message in (await refusal(channel, many))[1]
            assert "the prompt has 2000000 tokens" in (await refusal(channel, token_request([1] * 2_000_000)))[1]
            assert "messages is empty" in (await refusal(channel, chat_request()))[1]

    asyncio.run(scenario())


def test_long_messages_are_answered_as_short_ones_are():
    async def scenario():
        engine = FakeEngine(cache_length=1 << 18, max_prefill_length=150_000, prefill_chunk=1 << 17, page_rows=1024)
        async with serving(engine) as (_, channel):
            assert (await answer(channel, text_request("a" * 100_000)))[0] == "bcd"
            error = await failure(channel, text_request("a" * 150_001))
            assert "the prompt has 150001 tokens" in (error.details() or "")

    asyncio.run(scenario())
