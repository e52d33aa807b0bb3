"""A real grpc.aio server in this process, real clients, a fake engine."""

import asyncio
import threading
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub

from tests.fakes import BEFORE_LONG, LONG_TEXT, FakeEngine
from tests.server.calls import (
    EOF,
    WAIT_S,
    answer,
    chat_request,
    details_of,
    failure,
    health,
    refusal,
    serving,
    text_request,
    token_request,
)


def test_text_in_text_and_ids_out():
    async def scenario():
        async with serving() as (_, channel):
            text, token_ids, last = await answer(channel, text_request("a"))
            assert (text, token_ids) == ("bcd", list(b"bcd"))
            assert last.stream_content.samples[0].finish_reason == pb.FINISH_REASON_LENGTH
            assert (last.usage.prompt_tokens, last.usage.generated_tokens) == (1, 3)

    asyncio.run(scenario())


def test_ids_in_ids_out_and_the_stop_token_is_left_out():
    async def scenario():
        async with serving() as (_, channel):
            text, token_ids, last = await answer(channel, token_request(list(b"..w"), 50))
            assert (text, token_ids) == ("xyz", list(b"xyz"))
            assert last.stream_content.samples[0].finish_reason == pb.FINISH_REASON_STOP
            assert (last.usage.prompt_tokens, last.usage.generated_tokens) == (3, 3)

    asyncio.run(scenario())


def test_messages_are_templated_and_raw_text_is_not():
    async def scenario():
        engine = FakeEngine()
        async with serving(engine) as (_, channel):
            await answer(channel, chat_request(("system", "be"), ("user", "a")))
            await answer(channel, text_request("a"))
        assert [call for call in engine.log if call.startswith("prefill")] == ["prefill <s>be<u>a", "prefill a"]

    asyncio.run(scenario())


def test_a_reply_never_splits_a_utf8_character():
    async def scenario():
        async with serving() as (_, channel):
            request = token_request([BEFORE_LONG], len(LONG_TEXT.encode()))
            texts = [
                reply.stream_content.samples[0].text
                async for reply in OrchestratorStub(channel).Decode(request, timeout=WAIT_S)
            ]
            assert "".join(texts) == LONG_TEXT
            # Cut off inside the last character: told, but not sent as bytes.
            text, token_ids, _ = await answer(channel, token_request([BEFORE_LONG], 7))
            assert text.startswith("é€\ufffd")
            assert len(token_ids) == 7

    asyncio.run(scenario())


def test_text_arrives_as_it_comes():
    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(0))
        async with serving(engine) as (_, channel):
            call = OrchestratorStub(channel).Decode(text_request("a", 5), timeout=WAIT_S)
            for expected in "bcde":
                assert (await call.read()).stream_content.samples[0].text == expected
                engine.pace.release()
            engine.pace.release(9)

    asyncio.run(scenario())


def test_jetstreams_bytes_at_jetstreams_path():
    """By hand, with what older clients still send."""
    raw = b"".join(
        [
            b"\x0a\x01s",  # session_cache=1 "s"
            b"\x18\x01",  # priority=3 1
            b"\x20\x03",  # max_tokens=4 3
            b"\x2a\x03\x0a\x01a",  # text_content=5 {text=1 "a"}
            b"\x3a\x05\x0d\x00\x00\x80\x3f",  # metadata=7 {start_time=1 1.0}
            b"\x50\x01",  # has_bos=10 true
        ]
    )

    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(0))
        async with serving(engine) as (_, channel):
            call = channel.unary_stream("/jetstream_proto.Orchestrator/Decode")(raw, timeout=WAIT_S)
            # stream_content=3 {samples=1 {text=1 "b", token_ids=2 [98]}}
            assert await call.read() == b"\x1a\x08\x0a\x06\x0a\x01b\x12\x01b"
            engine.pace.release()
            assert await call.read() == b"\x1a\x08\x0a\x06\x0a\x01c\x12\x01c"
            engine.pace.release()
            last = await call.read()
            assert isinstance(last, bytes)
            assert pb.DecodeResponse.FromString(last).stream_content.samples[0].text == "d"
            assert await call.read() is EOF
            assert await channel.unary_unary("/jetstream_proto.Orchestrator/HealthCheck")(b"") == b"\x08\x01"

    asyncio.run(scenario())


NO_UTF8 = b"\x20\x03\x2a\x03\x0a\x01\xff"
"""max_tokens=3, text_content {text "\xff"}."""


@pytest.mark.parametrize("service", ["slipstream.v1.Orchestrator", "jetstream_proto.Orchestrator"])
@pytest.mark.parametrize("data", [b"\xff\xff\xff", NO_UTF8, b"\x20"], ids=["random", "no UTF-8", "cut off"])
def test_bytes_that_are_no_message_are_refused_and_the_server_goes_on(service, data, caplog):
    async def scenario():
        mine = (("x-request-id", "mine"),)
        async with serving() as (_, channel):
            with pytest.raises(grpc.aio.AioRpcError) as decode:
                await channel.unary_stream(f"/{service}/Decode")(data, timeout=WAIT_S, metadata=mine).read()
            check_refused(decode.value, f"these {len(data)} bytes are no DecodeRequest")
            if data != NO_UTF8:  # a HealthCheckRequest has no text
                with pytest.raises(grpc.aio.AioRpcError) as health:
                    await channel.unary_unary(f"/{service}/HealthCheck")(data, timeout=WAIT_S, metadata=mine)
                check_refused(health.value, f"these {len(data)} bytes are no HealthCheckRequest")
            assert (await answer(channel, text_request("a")))[0] == "bcd"

    asyncio.run(scenario())
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def check_refused(error, message):
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in details_of(error)
    assert dict(error.trailing_metadata())["x-request-id"] == "mine"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (text_request(""), "the prompt is empty"),
        (pb.DecodeRequest(max_tokens=3), "the prompt is missing; set text_content, token_content or messages"),
        (chat_request(), "messages is empty"),
        (text_request("a" * 17), "the prompt has 17 tokens, at most 16 are taken"),
        (text_request("a", 256), "ask for at most 255 tokens or serve with a larger --cache-length"),
        (text_request("a", 0), "max_tokens=0 must be at least 1"),
        (text_request("a", -5), "max_tokens=-5 must be at least 1"),
        (token_request([65, 256]), "token id 256 at position 1 is outside the vocabulary; ids go from 0 to 255"),
        (token_request([-1]), "token id -1 at position 0"),
        (text_request("a", temperature=-1), "temperature=-1.0"),
        (text_request("a", temperature=float("nan")), "temperature=nan"),
        (text_request("a", top_p=-0.5), "top_p=-0.5"),
        (text_request("a", top_p=1.5), "top_p=1.5"),
        (text_request("a", top_k=-1), "top_k=-1"),
        (text_request("a", seed=2**32), "seed=4294967296"),
        (text_request("a", num_samples=3), "num_samples=3 needs as many slots and the server has 2"),
        (text_request("a", lora_adapter_id="x"), "lora_adapter_id='x' must be empty"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_bad_requests_are_refused_and_the_server_goes_on(request_, message):
    async def scenario():
        async with serving() as (_, channel):
            code, details = await refusal(channel, request_)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert message in details
            assert (await answer(channel, text_request("a", num_samples=1)))[0] == "bcd"

    asyncio.run(scenario())


def test_the_longest_request_that_fits_is_answered():
    async def scenario():
        async with serving(FakeEngine(cache_length=32)) as (_, channel):
            text, _, _ = await answer(channel, text_request("0" * 16, 16))
            assert text == "123456789:;<=>?@"

    asyncio.run(scenario())


def test_what_all_pages_cannot_hold_is_refused_and_what_fills_them_is_answered():
    async def scenario():
        async with serving(FakeEngine(page_rows=8, pages=4)) as (_, channel):
            code, details = await refusal(channel, text_request("0" * 16, 17))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details == (
                "a prompt of 16 tokens and max_tokens=17 exceed cache_tokens=32; "
                "ask for at most 16 tokens or serve with a larger --cache-tokens"
            )
            text, _, _ = await answer(channel, text_request("0" * 16, 16))
            assert text == "123456789:;<=>?@"

    asyncio.run(scenario())


def test_sampling_defaults_are_greedy_and_an_absent_seed_is_drawn():
    async def scenario():
        engine = FakeEngine()
        async with serving(engine) as (_, channel):
            await answer(channel, text_request("a"))
            await answer(channel, text_request("a", temperature=0.5, top_k=3, top_p=0.25, seed=7))
            await answer(channel, text_request("a", temperature=1))
            await answer(channel, text_request("a", temperature=1))
        greedy, chosen, drawn, drawn_again = engine.samplings
        assert (greedy.temperature, greedy.top_k, greedy.top_p) == (0, 0, 1)
        assert (chosen.temperature, chosen.top_k, chosen.top_p, chosen.seed) == (0.5, 3, 0.25, 7)
        assert drawn.seed != drawn_again.seed

    asyncio.run(scenario())


def test_a_failing_step_is_internal_with_the_requests_id_and_the_next_request_works():
    async def scenario():
        engine = FakeEngine(late_errors={0: RuntimeError("boom")})
        async with serving(engine) as (_, channel):
            code, details = await refusal(channel, text_request("a"))
            assert code is grpc.StatusCode.INTERNAL
            assert details.startswith("request ")
            assert details.endswith("failed in the engine: RuntimeError: boom")
            assert (await answer(channel, text_request("a")))[0] == "bcd"

    asyncio.run(scenario())


def test_many_clients_at_once_get_their_own_answers():
    async def scenario():
        async with serving(FakeEngine(max_concurrent_decodes=4)) as (_, channel):
            prompts = [chr(ord("A") + i) for i in range(20)]
            answers = await asyncio.gather(*(answer(channel, text_request(p, 1 + ord(p) % 6)) for p in prompts))
            for prompt, (text, _, _) in zip(prompts, answers, strict=True):
                assert text == "".join(chr(ord(prompt) + 1 + j) for j in range(1 + ord(prompt) % 6))

    asyncio.run(scenario())


def test_health_and_reflection():
    async def scenario():
        async with serving() as (_, channel):
            for service in ("", "slipstream.v1.Orchestrator", "jetstream_proto.Orchestrator"):
                assert await health(channel, service) == health_pb2.HealthCheckResponse.SERVING
            call = cast(Any, reflection_pb2_grpc.ServerReflectionStub)(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            listed = [service.name for service in (await call.read()).list_services_response.service]
            assert "slipstream.v1.Orchestrator" in listed
            assert (await OrchestratorStub(channel).HealthCheck(pb.HealthCheckRequest())).is_live

    asyncio.run(scenario())


def test_request_ids_are_the_callers_or_ours_and_come_back_whatever_happens():
    async def scenario():
        engine = FakeEngine()
        async with serving(engine) as (_, channel):
            stub, mine = OrchestratorStub(channel), (("x-request-id", "mine-1"),)
            call = stub.Decode(text_request("a"), timeout=WAIT_S, metadata=mine)
            assert dict(await call.initial_metadata())["x-request-id"] == "mine-1"
            ids = set()
            for _ in range(2):
                other = stub.Decode(text_request("a"), timeout=WAIT_S)
                ids.add(dict(await other.initial_metadata())["x-request-id"])
                assert [reply async for reply in other]
            assert len(ids) == 2
            assert [reply async for reply in call]  # or its prefill would be among those that fail below
            error = await failure(channel, text_request(""), metadata=mine)
            assert dict(error.trailing_metadata())["x-request-id"] == "mine-1"
            engine.on_prefill = lambda prompt: 1 / 0
            error = await failure(channel, text_request("a"), metadata=mine)
            assert details_of(error).startswith("request mine-1 failed in the engine: ZeroDivisionError")
            check = stub.HealthCheck(pb.HealthCheckRequest(), metadata=mine)
            assert dict(await check.initial_metadata())["x-request-id"] == "mine-1"
            error = await failure(channel, text_request("a"), metadata=(("x-request-id", "x" * 129),))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "more than 128 characters" in details_of(error)

    asyncio.run(scenario())


def test_two_requests_of_one_name_are_two_requests():
    async def scenario():
        async with serving() as (_, channel):
            mine = (("x-request-id", "mine"),)
            answers = await asyncio.gather(
                *(answer(channel, text_request(c, 30, stop_strings=["Z"]), metadata=mine) for c in "AB")
            )
            assert [text[0] for text, _, _ in answers] == ["B", "C"]
            assert {text[-1] for text, _, _ in answers} == {"Y"}

    asyncio.run(scenario())
