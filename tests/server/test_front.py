"""A real grpc.aio server in this process, real clients, a fake engine."""

import asyncio
import json
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.config import ServerConfig
from slipstream.server.lifecycle import Serving
from slipstream.server.messages import read_reply

from tests.fakes import BEFORE_LONG, LONG_TEXT, FakeEngine

WAIT_S = 10


@asynccontextmanager
async def serving(engine=None, **config):
    """(Serving, channel)"""
    engine = engine or FakeEngine()
    config = ServerConfig(**{"port": 0, "grace_s": 5.0} | config)
    async with Serving(lambda: (engine, None), config) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield server, channel


def text_request(text, max_tokens=3, **more):
    return pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text=text), max_tokens=max_tokens, **more)


def token_request(token_ids, max_tokens=3, **more):
    return pb.DecodeRequest(
        token_content=pb.DecodeRequest.TokenContent(token_ids=token_ids), max_tokens=max_tokens, **more
    )


def chat_request(*turns, max_tokens=3):
    messages = [pb.DecodeRequest.Message(role=role, content=content) for role, content in turns]
    return pb.DecodeRequest(messages=pb.DecodeRequest.Chat(messages=messages), max_tokens=max_tokens)


async def answer(channel, request, **more):
    """(text, token ids, last reply)"""
    replies = [reply async for reply in OrchestratorStub(channel).Decode(request, timeout=WAIT_S, **more)]
    samples = [reply.stream_content.samples[0] for reply in replies]
    text = "".join(sample.text for sample in samples)
    return text, [token_id for sample in samples for token_id in sample.token_ids], replies[-1]


async def failure(channel, request, **more):
    """The error that the call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(channel, request, **more)
    return caught.value


async def refusal(channel, request):
    """(code, details)"""
    error = await failure(channel, request)
    return error.code(), error.details()


async def events(channel, request, **more):
    """What our own client would read."""
    replies = OrchestratorStub(channel).Decode(request, timeout=WAIT_S, **more)
    return [event async for reply in replies for event in read_reply(reply)]


async def until(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


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
            assert pb.DecodeResponse.FromString(await call.read()).stream_content.samples[0].text == "d"
            assert await call.read() is grpc.aio.EOF
            assert await channel.unary_unary("/jetstream_proto.Orchestrator/HealthCheck")(b"") == b"\x08\x01"

    asyncio.run(scenario())


def test_a_text_that_is_no_utf8_is_refused_and_the_server_goes_on():
    async def scenario():
        async with serving() as (_, channel):
            call = channel.unary_stream("/slipstream.v1.Orchestrator/Decode")(b"\x20\x03\x2a\x03\x0a\x01\xff")
            with pytest.raises(grpc.aio.AioRpcError):
                await call.read()
            assert (await answer(channel, text_request("a")))[0] == "bcd"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (text_request(""), "the prompt is empty"),
        (pb.DecodeRequest(max_tokens=3), "the prompt is missing; set text_content, token_content or messages"),
        (chat_request(), "messages is empty"),
        (text_request("a" * 17), "the prompt has 17 tokens, the largest prefill bucket 16"),
        (text_request("a", 256), "ask for at most 255 tokens or serve with a larger --cache-length"),
        (text_request("a", 0), "max_tokens=0 must be at least 1"),
        (text_request("a", -5), "max_tokens=-5 must be at least 1"),
        (token_request([65, 256]), "token id 256 at position 1 is outside the vocabulary; ids go from 0 to 255"),
        (token_request([-1]), "token id -1 at position 0"),
        (text_request("a", temperature=-1), "temperature=-1.0"),
        (text_request("a", temperature=float("nan")), "temperature=nan"),
        (text_request("a", top_p=0), "top_p=0.0"),
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


def test_a_full_queue_answers_resource_exhausted():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine, max_queued=1) as (server, channel):
            first = OrchestratorStub(channel).Decode(text_request("a"), timeout=WAIT_S)
            await first.read()
            second = asyncio.create_task(answer(channel, text_request("A")))
            await until(lambda: server.orchestrator.queue_depth == 1)
            code, details = await refusal(channel, text_request("a"))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "1 requests wait already and max_queued=1" in details
            engine.pace.release(99)
            assert (await second)[0] == "BCD"

    asyncio.run(scenario())


@pytest.mark.parametrize("way", ["cancel", "disconnect", "deadline"])
def test_a_client_that_leaves_frees_its_slot(way):
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, step_s=0.002)
        async with serving(engine) as (server, channel):
            own = grpc.aio.insecure_channel(server.address)
            call = OrchestratorStub(own).Decode(text_request("A", 200), timeout=0.1 if way == "deadline" else WAIT_S)
            await call.read()
            assert server.orchestrator.slots_in_use == 1
            if way == "cancel":
                call.cancel()
            elif way == "disconnect":
                await own.close()
            await until(lambda: server.orchestrator.slots_in_use == 0)
            assert (await answer(channel, text_request("a")))[0] == "bcd"
            await own.close()

    asyncio.run(scenario())


def test_a_queued_request_that_is_cancelled_is_never_prefilled():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine) as (server, channel):
            first = OrchestratorStub(channel).Decode(text_request("a"), timeout=WAIT_S)
            await first.read()
            queued = OrchestratorStub(channel).Decode(text_request("A"), timeout=WAIT_S)
            reading = asyncio.ensure_future(queued.read())
            await until(lambda: server.orchestrator.queue_depth == 1)
            queued.cancel()
            await until(lambda: server.orchestrator.queue_depth == 0)
            engine.pace.release(99)
            assert (await answer(channel, text_request("B")))[0] == "CDE"
            assert "prefill A" not in engine.log
            with pytest.raises(asyncio.CancelledError):
                await reading

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
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "slipstream.v1.Orchestrator", "jetstream_proto.Orchestrator"):
                reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            listed = [service.name for service in (await call.read()).list_services_response.service]
            assert "slipstream.v1.Orchestrator" in listed
            assert (await OrchestratorStub(channel).HealthCheck(pb.HealthCheckRequest())).is_live

    asyncio.run(scenario())


# Request options.


def test_stop_strings_stop_tokens_and_ignore_eos_over_the_wire():
    async def scenario():
        async with serving() as (server, channel):
            text, token_ids, last = await answer(channel, text_request("a", 20, stop_strings=["nope", "efg"]))
            assert (text, bytes(token_ids)) == ("bcd", b"bcdefg")
            assert last.stream_content.samples[0].finish_reason == pb.FINISH_REASON_STOP
            assert last.usage.generated_tokens == 6
            assert (await answer(channel, text_request("a", 9, stop_token_ids=[ord("d")])))[:2] == ("bc", list(b"bc"))
            assert (await answer(channel, text_request("y", 3, ignore_eos=True)))[1] == list(b"z{|")
            await until(lambda: server.orchestrator.slots_in_use == 0)

    asyncio.run(scenario())


def test_every_message_has_an_entry_for_every_sample_in_order():
    """The fake's samples start ten letters apart."""

    async def scenario():
        async with serving(FakeEngine(max_concurrent_decodes=3)) as (_, channel):
            call = OrchestratorStub(channel).Decode(text_request("A", 4, num_samples=3), timeout=WAIT_S)
            replies = [reply async for reply in call]
            assert {len(reply.stream_content.samples) for reply in replies} == {3}
            texts = ["".join(reply.stream_content.samples[i].text for reply in replies) for i in range(3)]
            assert texts == ["BCDE", "LMNO", "VWXY"]
            reasons = [[r.stream_content.samples[i].finish_reason for r in replies] for i in range(3)]
            assert [[reason for reason in of if reason] for of in reasons] == [[pb.FINISH_REASON_LENGTH]] * 3
            assert [reply.HasField("usage") for reply in replies].count(True) == 1
            assert (replies[-1].usage.prompt_tokens, replies[-1].usage.generated_tokens) == (1, 12)

    asyncio.run(scenario())


def test_a_sample_without_news_is_an_empty_entry():
    """ "p" answers q, and the second sample begins with the stop token: it is over while the first goes on."""

    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(0))
        async with serving(engine) as (_, channel):
            call = OrchestratorStub(channel).Decode(text_request("p", 4, num_samples=2), timeout=WAIT_S)
            read = []
            while (reply := await call.read()) is not grpc.aio.EOF:
                read.append(reply)
                engine.pace.release()
            over = [r.stream_content.samples[1].finish_reason for r in read].index(pb.FINISH_REASON_STOP)
            for reply in read[over + 1 :]:
                assert reply.stream_content.samples[1] == pb.DecodeResponse.StreamContent.Sample()
            assert len(read) > over + 1
            engine.pace.release(99)

    asyncio.run(scenario())


def test_logprobs_and_prompt_logprobs_over_the_wire():
    async def scenario():
        async with serving() as (_, channel):
            found = await events(channel, token_request([80, 64], 2, logprobs=2, prompt_logprobs=True))
            assert found[0].prompt_logprobs == (0.0, -8.0)
            tokens = [token for event in found for token in event.logprobs]
            assert [token.logprob for token in tokens] == [-65 / 8, -66 / 8]
            assert tokens[0].top == ((65, -65 / 8), (66, -65 / 8 - 1))
            assert not any(event.logprobs for event in await events(channel, token_request([64], 2)))

    asyncio.run(scenario())


def test_usage_over_the_wire():
    async def scenario():
        async with serving(FakeEngine(step_s=0.01)) as (_, channel):
            _, _, last = await answer(channel, text_request("abc", 5))
            usage = last.usage
            assert 0 <= usage.queue_ms <= usage.ttft_ms
            assert usage.total_ms - usage.ttft_ms > 36
            _, _, last = await answer(channel, text_request("z", 5))
            assert (usage.prompt_tokens, last.usage.generated_tokens) == (3, 0)

    asyncio.run(scenario())


def test_priority_goes_first():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine) as (server, channel):
            first = OrchestratorStub(channel).Decode(text_request("a"), timeout=WAIT_S)
            await first.read()
            tasks = []
            for number, (text, priority) in enumerate((("A", -1), ("B", 0), ("C", 5)), start=1):
                tasks.append(asyncio.create_task(answer(channel, text_request(text, priority=priority))))
                await until(lambda number=number: server.orchestrator.queue_depth == number)
            engine.pace.release(99)
            await asyncio.gather(*tasks)
            assert [call for call in engine.log if call.startswith("prefill")][1:] == [f"prefill {c}" for c in "CBA"]

    asyncio.run(scenario())


# Names, hints, deadlines.


def test_request_ids_are_the_callers_or_ours_and_come_back_whatever_happens():
    async def scenario():
        engine = FakeEngine()
        async with serving(engine) as (_, channel):
            stub, mine = OrchestratorStub(channel), (("x-request-id", "mine-1"),)
            call = stub.Decode(text_request("a"), timeout=WAIT_S, metadata=mine)
            assert dict(await call.initial_metadata())["x-request-id"] == "mine-1"
            ids = set()
            for _ in range(2):
                call = stub.Decode(text_request("a"), timeout=WAIT_S)
                ids.add(dict(await call.initial_metadata())["x-request-id"])
            assert len(ids) == 2
            error = await failure(channel, text_request(""), metadata=mine)
            assert dict(error.trailing_metadata())["x-request-id"] == "mine-1"
            engine.on_prefill = lambda prompt: 1 / 0
            error = await failure(channel, text_request("a"), metadata=mine)
            assert error.details().startswith("request mine-1 failed in the engine: ZeroDivisionError")
            health = stub.HealthCheck(pb.HealthCheckRequest(), metadata=mine)
            assert dict(await health.initial_metadata())["x-request-id"] == "mine-1"
            error = await failure(channel, text_request("a"), metadata=(("x-request-id", "x" * 129),))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "more than 128 characters" in error.details()

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


def test_a_full_queue_hints_when_to_come_again():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine, max_queued=1) as (server, channel):
            first = OrchestratorStub(channel).Decode(text_request("a"), timeout=WAIT_S)
            await first.read()
            second = asyncio.create_task(answer(channel, text_request("A")))
            await until(lambda: server.orchestrator.queue_depth == 1)
            error = await failure(channel, text_request("a"))
            trailers = dict(error.trailing_metadata())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert 50 <= int(trailers["retry-after-ms"]) <= 30_000
            engine.pace.release(99)
            await second

    asyncio.run(scenario())


def test_a_full_queue_refuses_before_the_text_is_tokenised():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine, max_queued=1) as (server, channel):
            first = OrchestratorStub(channel).Decode(text_request("a"), timeout=WAIT_S)
            await first.read()
            second = asyncio.create_task(answer(channel, text_request("A")))
            await until(lambda: server.orchestrator.queue_depth == 1)
            engine.get_tokenizer = lambda: pytest.fail("tokenised")
            assert (await refusal(channel, text_request("a")))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
            engine.pace.release(99)
            await second
            assert outcomes(server) == {"ok": 2.0, "rejected": 1.0}
            del engine.get_tokenizer

    asyncio.run(scenario())


def test_a_client_with_a_retry_policy_is_pushed_back_and_then_answered():
    """The client's own gRPC reads grpc-retry-pushback-ms: its caller never sees the refusal."""
    policy = {
        "maxAttempts": 5, "initialBackoff": "0.01s", "maxBackoff": "0.01s", "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }  # fmt: skip
    config = json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]})

    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine, max_queued=1) as (server, channel):
            first = OrchestratorStub(channel).Decode(text_request("a"), timeout=WAIT_S)
            await first.read()
            second = asyncio.create_task(answer(channel, text_request("A")))
            await until(lambda: server.orchestrator.queue_depth == 1)
            async with grpc.aio.insecure_channel(server.address, [("grpc.service_config", config)]) as patient:
                third = asyncio.create_task(answer(patient, text_request("B")))
                refused = server.metrics.registry.get_sample_value
                await until(lambda: refused("slipstream_requests_total", {"outcome": "rejected"}))
                engine.pace.release(99)
                assert (await second)[0] == "BCD"
                assert (await third)[0] == "CDE"

    asyncio.run(scenario())


def outcomes(server):
    """How often each."""
    value = server.metrics.registry.get_sample_value
    names = ("ok", "cancelled", "deadline", "rejected", "failed")
    return {name: count for name in names if (count := value("slipstream_requests_total", {"outcome": name}))}


@pytest.mark.parametrize(("way", "outcome"), [("cancel", "cancelled"), ("disconnect", "cancelled"), ("deadline",) * 2])
@pytest.mark.parametrize("stage", ["queued", "prefilling", "decoding"])
def test_a_client_that_leaves_at_any_stage_is_counted_and_frees_what_it_held(stage, way, outcome):
    async def scenario():
        may_prefill = threading.Event()
        engine = FakeEngine(max_concurrent_decodes=2, step_s=0.002)
        async with serving(engine) as (server, channel):
            running, expected = None, {outcome: 1.0}
            if stage == "queued":
                engine.pace = threading.Semaphore(0)
                running = asyncio.create_task(answer(channel, text_request("a", 5, num_samples=2)))
                await until(lambda: server.orchestrator.slots_in_use == 2)
            if stage == "prefilling":
                engine.on_prefill = lambda prompt: may_prefill.wait(WAIT_S)
            own = grpc.aio.insecure_channel(server.address)
            request = text_request("\x01", 120, num_samples=2)
            call = OrchestratorStub(own).Decode(request, timeout=0.2 if way == "deadline" else WAIT_S)
            reading = asyncio.ensure_future(call.read())
            if stage == "decoding":
                await reading
            elif stage == "prefilling":
                await until(lambda: "prefill \x01" in engine.log)
            else:
                await until(lambda: server.orchestrator.queue_depth == 1)
            if way == "cancel":
                call.cancel()
            elif way == "disconnect":
                await own.close()
            await until(lambda: outcomes(server) == {outcome: 1.0})
            may_prefill.set()
            if running is not None:
                assert server.orchestrator.queue_depth == 0
                engine.pace.release(99)
                await running
                expected["ok"] = 1.0
                assert "prefill \x01" not in engine.log
            await until(lambda: server.orchestrator.slots_in_use == 0)
            assert (await answer(channel, text_request("a")))[0] == "bcd"
            assert outcomes(server) == {**expected, "ok": expected.get("ok", 0.0) + 1}
            await asyncio.gather(reading, return_exceptions=True)
            await own.close()

    asyncio.run(scenario())


def test_a_server_that_sees_the_deadline_first_says_so():
    """Without a client whose own clock ends the call: the last message, then the status."""

    async def scenario():
        engine = FakeEngine(step_s=0.005)
        async with serving(engine) as (server, _):
            context = SimpleNamespace(
                time_remaining=lambda: 0.1, invocation_metadata=lambda: (), written=[], aborted=[]
            )

            async def note(*args, **more):
                return None

            async def write(reply):
                context.written.append(reply)

            async def abort(code, details, trailing_metadata):
                context.aborted.append((code, details))

            context.send_initial_metadata, context.write, context.abort = note, write, abort
            await server._front.Decode(text_request("\x01", 200), context)
            last = context.written[-1]
            assert last.stream_content.samples[0].finish_reason == pb.FINISH_REASON_DEADLINE
            assert 0 < last.usage.generated_tokens < 60
            ((code, details),) = context.aborted
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert f"passed after {last.usage.generated_tokens} tokens" in details

    asyncio.run(scenario())
