"""What a request can ask for, over a real channel."""

import asyncio
import threading

import grpc
import pytest
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.request.events import TokenLogprob

from tests.fakes import FakeEngine
from tests.server.calls import EOF, WAIT_S, answer, events, serving, text_request, token_request, until


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


def test_least_length_and_bias_over_the_wire():
    """The fake chooses no tokens by them, but is told; stop strings are delivery's."""

    async def scenario():
        engine = FakeEngine()
        async with serving(engine) as (_, channel):
            request = text_request("a", 9, stop_strings=["c", "de"], min_tokens=3, logit_bias={7: -100, 255: 0.5})
            assert (await answer(channel, request))[:2] == ("bcdefghij", list(b"bcdefghij"))
            request = text_request("a", 9, stop_strings=["c", "de"], min_tokens=2, num_samples=2)
            assert (await answer(channel, request))[:2] == ("bc", list(b"bcde"))
        first, *samples = engine.samplings
        assert (first.min_tokens, first.logit_bias) == (3, {7: -100, 255: 0.5})
        assert [sampling.min_tokens for sampling in samples] == [2, 2]

    asyncio.run(scenario())


def test_the_form_of_an_answer_over_the_wire():
    """A oneof; the fake answers what the form is, and "[]" to any schema."""

    async def scenario():
        async with serving() as (_, channel):
            for fields, expected in [
                ({"json_schema": '{"type": "object"}'}, "[]"),
                ({"json_object": True}, "[]"),
                ({"json_object": False}, "bcdefghij"),
                ({"regex": "xyz"}, "xyz"),
                ({"choices": pb.DecodeRequest.Choices(texts=["hello"])}, "hello"),
                ({"grammar": 'start: "hey"'}, "hey"),
            ]:
                text, _, last = await answer(channel, text_request("a", 9, **fields))
                assert text == expected
            assert last.stream_content.samples[0].finish_reason == pb.FINISH_REASON_STOP
            for fields, message in [
                ({"regex": ""}, "the regex is empty"),
                ({"json_schema": "{"}, "json_schema is no JSON"),
                ({"structural_tag": "{}"}, "structural_tag must be"),
                ({"grammar": "bad"}, "the grammar cannot be compiled: it is bad"),
            ]:
                with pytest.raises(grpc.aio.AioRpcError, match=message) as refused:
                    await answer(channel, text_request("a", 9, **fields))
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT

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
            while (reply := await call.read()) is not EOF:
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
            found = await events(channel, token_request([80, 64], 2, logprobs=2, prompt_top_logprobs=1))
            assert found[0].prompt_logprobs == (TokenLogprob(0.0), TokenLogprob(-8.0, ((64, -8.0),)))
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
