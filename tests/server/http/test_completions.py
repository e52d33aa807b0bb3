"""POST /v1/completions, asked by OpenAI's own client."""

import asyncio
import threading

import grpc
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.http import completions
from slipstream.server.http.echo import echo_of

from tests.fakes import BEFORE_LONG, CONTROL, LONG_TEXT, FakeEngine
from tests.server.calls import WAIT_S, until
from tests.server.http.serving import serving

Prompt = str | list[str] | list[int] | list[list[int]]


async def complete(client, prompt: Prompt = "a", **more):
    return await client.completions.create(**{"model": "fake", "prompt": prompt, "max_tokens": 3} | more)


async def chunks(client, prompt: Prompt = "a", **more):
    return [chunk async for chunk in await complete(client, prompt, stream=True, **more)]


def test_text_in_text_out():
    async def scenario():
        async with serving() as (_, client):
            answer = await complete(client)
            (choice,) = answer.choices
            assert (choice.text, choice.index, choice.finish_reason, choice.logprobs) == ("bcd", 0, "length", None)
            assert (answer.object, answer.model) == ("text_completion", "fake")
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (1, 3, 4)
            assert answer.usage.prompt_tokens_details.cached_tokens == 0
            assert (await complete(client, "w", max_tokens=9)).choices[0].finish_reason == "stop"

    asyncio.run(scenario())


def test_a_stream_is_the_answer_in_pieces():
    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(1))
        async with serving(engine) as (_, client):
            answer = []
            async for chunk in await complete(client, max_tokens=6, stream=True):
                answer.append(chunk)
                engine.pace.release()
            assert len(answer) > 2
            assert "".join(chunk.choices[0].text for chunk in answer) == "bcdefg"
            assert [chunk.choices[0].finish_reason for chunk in answer] == [None] * (len(answer) - 1) + ["length"]
            assert len({chunk.id for chunk in answer}) == 1
            assert {chunk.usage for chunk in answer} == {None}

    asyncio.run(scenario())


def test_one_chunk_for_all_that_has_come():
    """A loop that was busy while tokens came writes them together."""

    async def scenario():
        engine = FakeEngine(pace=threading.Semaphore(0))
        async with serving(engine) as (server, client):
            stream = aiter(await complete(client, stream=True, max_tokens=9))
            first = await anext(stream)
            engine.pace.release(99)
            while server.orchestrator.slots_in_use:  # the loop sleeps through it
                threading.Event().wait(0.01)
            threading.Event().wait(0.1)
            rest = [chunk async for chunk in stream]
            assert first.choices[0].text == "b"
            assert [chunk.choices[0].text for chunk in rest] == ["cdefghij"]

    asyncio.run(scenario())


def test_usage_comes_last_if_asked_for():
    async def scenario():
        async with serving() as (_, client):
            answer = await chunks(client, ["a", "bc"], stream_options={"include_usage": True})
            assert answer[-1].choices == []
            assert (answer[-1].usage.prompt_tokens, answer[-1].usage.completion_tokens) == (3, 6)
            assert answer[-1].usage.prompt_tokens_details.cached_tokens == 0
            assert not any(chunk.usage for chunk in answer[:-1])

    asyncio.run(scenario())


def test_token_ids_in_and_out():
    async def scenario():
        async with serving() as (_, client):
            more = {"extra_body": {"return_token_ids": True}}
            answer = await complete(client, list(b"..w"), **more)
            assert (answer.choices[0].text, answer.choices[0].token_ids) == ("xyz", list(b"xyz"))
            streamed = await chunks(client, list(b"..w"), **more)
            assert [token_id for chunk in streamed for token_id in chunk.choices[0].token_ids] == list(b"xyz")
            assert "token_ids" not in (await complete(client)).choices[0].to_dict()

    asyncio.run(scenario())


def test_several_prompts_with_several_samples_are_numbered():
    """Prompt by prompt; the fake's samples start ten letters apart."""

    async def scenario():
        async with serving(FakeEngine(max_concurrent_decodes=2)) as (_, client):
            for prompts in (["A", "a"], [[65], [97]]):
                answer = await complete(client, prompts, n=2)
                assert [choice.text for choice in answer.choices] == ["BCD", "LMN", "bcd", "lmn"]
                assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
                assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 12)
                texts, reasons = [""] * 4, [None] * 4
                for chunk in await chunks(client, prompts, n=2):
                    for choice in chunk.choices:
                        texts[choice.index] += choice.text
                        reasons[choice.index] = choice.finish_reason
                assert texts == ["BCD", "LMN", "bcd", "lmn"]
                assert reasons == ["length"] * 4

    asyncio.run(scenario())


def test_a_chunk_never_splits_a_character():
    async def scenario():
        async with serving(FakeEngine(step_s=0.002)) as (_, client):
            texts = [
                chunk.choices[0].text
                for chunk in await chunks(client, [BEFORE_LONG], max_tokens=len(LONG_TEXT.encode()))
            ]
            assert "".join(texts) == LONG_TEXT
            assert "" not in texts, "nothing to show, nothing to send"

    asyncio.run(scenario())


def test_logprobs():
    """The fake's: minus an eighth of the token's id, the alternatives one less likely each."""

    async def scenario():
        async with serving(FakeEngine(step_s=0.002)) as (_, client):
            found = (await complete(client, "AB", max_tokens=2, logprobs=2)).choices[0].logprobs
            assert found.tokens == ["C", "D"]
            assert found.token_logprobs == [-67 / 8, -68 / 8]
            assert found.top_logprobs[0] == {"C": -67 / 8, "D": -67 / 8 - 1}
            assert found.text_offset == [0, 1]
            alone = (await complete(client, "AB", max_tokens=2, logprobs=0)).choices[0].logprobs
            assert alone.top_logprobs == [{"C": -67 / 8}, {"D": -68 / 8}]
            streamed = [chunk.choices[0].logprobs for chunk in await chunks(client, "AB", max_tokens=4, logprobs=0)]
            assert [token for each in streamed for token in each.tokens] == list("CDEF")
            assert [at for each in streamed for at in each.text_offset] == [0, 1, 2, 3]

    asyncio.run(scenario())


def test_part_of_a_character_has_logprobs_of_its_own():
    async def scenario():
        async with serving() as (_, client):
            found = (await complete(client, [BEFORE_LONG], max_tokens=2, logprobs=0)).choices[0]
            assert found.text == "é"
            assert found.logprobs.tokens == ["\ufffd", "\ufffd"]
            assert found.logprobs.text_offset == [0, 0]

    asyncio.run(scenario())


def test_prompt_logprobs():
    async def scenario():
        async with serving() as (_, client):
            more = {"extra_body": {"prompt_logprobs": 0}}
            expected = [None, {"64": {"logprob": -8.0, "rank": None, "decoded_token": "@"}}]
            assert (await complete(client, [80, 64], n=2, **more)).choices[0].prompt_logprobs == expected
            assert (await chunks(client, [80, 64], **more))[0].choices[0].prompt_logprobs == expected

    asyncio.run(scenario())


def test_the_likeliest_in_a_prompt_tokens_place():
    """The fake's are the token itself and those that follow it, each less likely by 1."""

    async def scenario():
        async with serving() as (_, client):
            told = (await complete(client, [80, 64], extra_body={"prompt_logprobs": 2})).choices[0].prompt_logprobs
            assert told == [
                None,
                {
                    "64": {"logprob": -8.0, "rank": 1, "decoded_token": "@"},
                    "65": {"logprob": -9.0, "rank": 2, "decoded_token": "A"},
                },
            ]

    asyncio.run(scenario())


def test_an_echoed_prompt_comes_before_the_answer():
    async def scenario():
        async with serving() as (_, client):
            answer = await complete(client, ["ab", "AB"], n=2, echo=True)
            assert [choice.text for choice in answer.choices] == ["abcde", "abmno", "ABCDE", "ABMNO"]
            streamed = await chunks(client, "ab", echo=True, n=2)
            texts = ["", ""]
            for chunk in streamed:
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
            assert texts == ["abcde", "abmno"]
            assert (await complete(client, list(b"ab"), echo=True)).choices[0].text == "abcde", "of token ids, too"

    asyncio.run(scenario())


def test_an_echo_is_made_beside_the_event_loop(monkeypatch):
    threads = []

    def noting(*args):
        threads.append(threading.current_thread())
        return echo_of(*args)

    monkeypatch.setattr(completions, "echo_of", noting)

    async def scenario():
        async with serving() as (_, client):
            assert (await complete(client, echo=True)).choices[0].text == "abcd"
            assert "".join(chunk.choices[0].text for chunk in await chunks(client, echo=True)) == "abcd"

    asyncio.run(scenario())
    assert len(threads) == 2
    assert threading.current_thread() not in threads


def test_an_echoed_prompt_has_logprobs_as_evaluation_harnesses_sum_them():
    """max_tokens 0 and 1, alone and in streams; of the first token nothing is known."""
    more = {"echo": True, "logprobs": 1}

    async def scenario():
        async with serving() as (_, client):
            (choice,) = (await complete(client, "AB", max_tokens=1, **more)).choices
            assert (choice.text, choice.finish_reason) == ("ABC", "length")
            assert choice.logprobs.tokens == ["A", "B", "C"]
            assert choice.logprobs.token_logprobs == [None, -66 / 8, -67 / 8]
            assert choice.logprobs.top_logprobs == [None, {"B": -66 / 8}, {"C": -67 / 8}]
            assert choice.logprobs.text_offset == [0, 1, 2]
            assert "prompt_logprobs" not in choice.to_dict()
            (choice,) = (await complete(client, "yz", max_tokens=1, **more)).choices
            assert choice.logprobs.tokens == ["y", "z", "{"], "the model's end is a token here: one is taken off"
            alone = await complete(client, "AB", max_tokens=0, n=2, **more)
            for choice in alone.choices:
                assert (choice.text, choice.finish_reason) == ("AB", "length")
                assert choice.logprobs.token_logprobs == [None, -66 / 8]
            assert (alone.usage.prompt_tokens, alone.usage.completion_tokens) == (2, 0)
            for max_tokens, tokens, offsets in ((0, "AB", [0, 1]), (3, "ABCDE", [0, 1, 2, 3, 4])):
                told = [
                    chunk.choices[0].logprobs for chunk in await chunks(client, "AB", max_tokens=max_tokens, **more)
                ]
                assert [token for each in told if each for token in each.tokens] == list(tokens)
                assert [at for each in told if each for at in each.text_offset] == offsets

    asyncio.run(scenario())


def test_text_offsets_are_those_without_a_stop_string():
    """A stop string that never comes holds text back; where tokens begin stays what it is."""

    async def scenario():
        async with serving() as (_, client):
            for stop in (None, "cdefgX", "fgX"):
                for found in (
                    [(await complete(client, "ab", max_tokens=6, logprobs=0, stop=stop)).choices[0].logprobs],
                    [c.choices[0].logprobs for c in await chunks(client, "ab", max_tokens=6, logprobs=0, stop=stop)],
                ):
                    assert [at for each in found if each for at in each.text_offset] == [0, 1, 2, 3, 4, 5], stop

    asyncio.run(scenario())


def test_a_control_token_as_a_stop_string_ends_the_answer_before_it():
    """Its text is never shown, so it is met as a token: the fake's is its e."""

    async def scenario():
        async with serving() as (_, client):
            for stop in (CONTROL, ["nope", CONTROL]):
                (choice,) = (await complete(client, max_tokens=20, stop=stop)).choices
                assert (choice.text, choice.finish_reason) == ("bcd", "stop")

    asyncio.run(scenario())


def test_any_integer_is_a_seed_and_top_p_may_be_0():
    async def scenario():
        engine = FakeEngine()
        async with serving(engine) as (_, client):
            for seed in (-1, 2**63 - 1, 2**32 + 5):
                await complete(client, "a", seed=seed, top_p=0)
        assert [(asked.seed, asked.top_p) for asked in engine.samplings] == [
            (2**32 - 1, 0), (2**32 - 1, 0), (5, 0),
        ]  # fmt: skip

    asyncio.run(scenario())


def test_stops():
    async def scenario():
        async with serving() as (_, client):
            for stop in ("efg", ["nope", "efg"]):
                (choice,) = (await complete(client, max_tokens=20, stop=stop)).choices
                assert (choice.text, choice.finish_reason) == ("bcd", "stop")
            (choice,) = (await complete(client, max_tokens=20, stop=[CONTROL, "nope"])).choices  # which no text shows
            assert (choice.text, choice.finish_reason) == ("bcd", "stop")
            (choice,) = (await complete(client, max_tokens=20, stop=["b", "f"], extra_body={"min_tokens": 3})).choices
            assert (choice.text, choice.finish_reason) == ("bcde", "stop")
            (choice,) = (await complete(client, extra_body={"stop_token_ids": [ord("d")]})).choices
            assert (choice.text, choice.finish_reason) == ("bc", "stop")
            (choice,) = (await complete(client, "y", extra_body={"ignore_eos": True})).choices  # "{" is the stop token
            assert (choice.text, choice.finish_reason) == ("z{|", "length")

    asyncio.run(scenario())


def test_parameters_reach_the_engine_and_the_defaults_are_openais():
    async def scenario():
        engine = FakeEngine()
        async with serving(engine) as (_, client):
            answer = await client.completions.create(model="fake", prompt="\x01")
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 16
            await complete(
                client, temperature=0.5, top_p=0.25, seed=7, presence_penalty=1, frequency_penalty=-0.5,
                logit_bias={"98": -100, "7": 2.5},
                extra_body={"top_k": 3, "min_p": 0.125, "repetition_penalty": 1.5, "min_tokens": 2},
            )  # fmt: skip
            await complete(client, temperature=None, extra_body={"top_k": -1, "user": "me", "unheard_of": 1})
        default, chosen, null = engine.samplings
        assert (default.temperature, default.top_p, default.top_k, default.logprobs) == (1, 1, 0, None)
        assert (chosen.temperature, chosen.top_p, chosen.seed) == (0.5, 0.25, 7)
        assert (chosen.presence_penalty, chosen.frequency_penalty) == (1, -0.5)
        assert (chosen.top_k, chosen.min_p, chosen.repetition_penalty) == (3, 0.125, 1.5)
        assert (chosen.logit_bias, chosen.min_tokens) == ({98: -100, 7: 2.5}, 2)
        assert (null.temperature, null.top_k) == (1, 0)
        assert default.seed != null.seed, "drawn"

    asyncio.run(scenario())


def test_priority_goes_first():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine) as (server, client):
            tasks = [asyncio.create_task(complete(client, max_tokens=9))]
            await until(lambda: server.orchestrator.slots_in_use == 1)
            for number, (text, priority) in enumerate((("A", -1), ("B", 5)), start=1):
                tasks.append(asyncio.create_task(complete(client, text, extra_body={"priority": priority})))
                await until(lambda number=number: server.orchestrator.queue_depth == number)
            engine.pace.release(99)
            await asyncio.gather(*tasks)
            assert [call for call in engine.log if call.startswith("prefill")][1:] == ["prefill B", "prefill A"]

    asyncio.run(scenario())


def test_equal_tokens_over_grpc_and_http():
    async def scenario():
        engine = FakeEngine()
        async with serving(engine) as (server, client), grpc.aio.insecure_channel(server.address) as channel:
            text = pb.DecodeRequest.TextContent(text="abc")
            request = pb.DecodeRequest(
                text_content=text, max_tokens=9, temperature=0.5, top_k=3, seed=4, num_samples=2, stop_strings=["h"]
            )
            replies = [reply async for reply in OrchestratorStub(channel).Decode(request, timeout=WAIT_S)]
            samples = [[reply.stream_content.samples[i] for reply in replies] for i in range(2)]
            answer = await complete(
                client, "abc", max_tokens=9, temperature=0.5, seed=4, n=2, stop="h",
                extra_body={"top_k": 3, "return_token_ids": True},
            )  # fmt: skip
            for choice, of in zip(answer.choices, samples, strict=True):
                assert choice.text == "".join(sample.text for sample in of)
                assert choice.token_ids == [token_id for sample in of for token_id in sample.token_ids]
            first, resampled, *http = engine.samplings
            assert http == [first, resampled]

    asyncio.run(scenario())


def test_many_clients_at_once_get_their_own_answers():
    async def scenario():
        async with serving(FakeEngine(max_concurrent_decodes=4)) as (_, client):
            prompts = [chr(ord("A") + i) for i in range(20)]
            answers = await asyncio.gather(*(chunks(client, p, max_tokens=1 + ord(p) % 6) for p in prompts))
            for prompt, answer in zip(prompts, answers, strict=True):
                expected = "".join(chr(ord(prompt) + 1 + j) for j in range(1 + ord(prompt) % 6))
                assert "".join(chunk.choices[0].text for chunk in answer) == expected

    asyncio.run(scenario())
