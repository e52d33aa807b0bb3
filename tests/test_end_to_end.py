"""The product as its users meet it: the embedded model, a real process, real gRPC."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import grpc
import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub

pytestmark = pytest.mark.slow

CLI = [sys.executable, "-m", "slipstream.cli.main"]
SIZES = ["--slots", "3", "--cache-length", "256", "--max-prefill-length", "192"]
SIZES += ["--prefill-chunk", "128", "--tensor-parallel", "1"]
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Wie heißt du?", "2 + 2 =", "Tell me a joke."]
CALL_S = 120


@pytest.fixture(scope="module")
def http_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(http_port) -> Iterator[tuple[subprocess.Popen, str]]:
    command = [*CLI, "serve", "--port", "0", "--http-port", str(http_port), *SIZES]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        match = re.match(r"SERVING on (\S+)", line)
        assert match, line
        yield process, match[1]
        process.kill()


@pytest.fixture(scope="module")
def offline():
    """The same questions through `slipstream generate`: ids in, ids out."""
    prompts = [word for question in QUESTIONS for word in ("--prompt", question)]
    done = subprocess.run(
        [*CLI, "generate", *SIZES, *prompts, "--max-tokens", "20", "--json"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def decode(channel, path=None, **fields: Any):
    """All replies of one call."""
    fields = {"max_tokens": 20, **fields}
    request = pb.DecodeRequest(**fields)
    if path is None:
        return list(OrchestratorStub(channel).Decode(request, timeout=CALL_S))
    call = channel.unary_stream(path, pb.DecodeRequest.SerializeToString, pb.DecodeResponse.FromString)
    return list(call(request, timeout=CALL_S))


def answer(replies):
    samples = [sample for reply in replies for sample in reply.stream_content.samples]
    return "".join(sample.text for sample in samples), [token for sample in samples for token in sample.token_ids]


def chat(text) -> dict[str, Any]:
    return {"messages": pb.DecodeRequest.Chat(messages=[pb.DecodeRequest.Message(role="user", content=text)])}


def test_offline_and_served_answers_agree_alone_and_together(server, offline):
    """Five questions at once over three slots, then one alone: greedy tokens do not depend on company."""
    expected = [(result["text"], result["token_ids"]) for result in offline["results"]]
    answers: dict[int, tuple] = {}
    with grpc.insecure_channel(server[1]) as channel:

        def ask(index: int) -> None:
            answers[index] = answer(decode(channel, **chat(QUESTIONS[index])))

        threads = [threading.Thread(target=ask, args=[index]) for index in range(len(QUESTIONS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answers[index] for index in range(len(QUESTIONS))] == expected
        assert answer(decode(channel, **chat(QUESTIONS[2]))) == expected[2]


def test_jetstreams_path_streams_ids_for_ids_a_token_at_a_time(server, offline):
    result = offline["results"][0]
    content = pb.DecodeRequest.TokenContent(token_ids=result["prompt_token_ids"])
    with grpc.insecure_channel(server[1]) as channel:
        replies = decode(channel, "/jetstream_proto.Orchestrator/Decode", token_content=content)
    assert answer(replies) == (result["text"], result["token_ids"])
    assert len(replies) > len(result["token_ids"]) / 2  # it streams


def token_ids_of(choice) -> list[int]:
    """Our field, which the types of OpenAI's client lack."""
    return choice.token_ids


def test_openais_client_gets_the_same_tokens(server, http_port, offline):
    """Whole and streamed, from messages and from token ids; and a sampled answer is the one that gRPC gives."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{http_port}/v1", api_key="none", timeout=CALL_S) as client:
        (model,) = client.models.list()
        fields: dict[str, Any] = {"model": model.id, "max_tokens": 20, "extra_body": {"return_token_ids": True}}
        for question, result in zip(QUESTIONS[:2], offline["results"], strict=False):
            messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": question}]
            (choice,) = client.chat.completions.create(messages=messages, temperature=0, **fields).choices
            assert (choice.message.content, token_ids_of(choice)) == (result["text"], result["token_ids"])
            stream = client.completions.create(
                prompt=result["prompt_token_ids"], temperature=0, stream=True, logprobs=1, **fields
            )
            choices = [chunk.choices[0] for chunk in stream]
            assert "".join(choice.text for choice in choices) == result["text"]
            assert [token_id for choice in choices for token_id in token_ids_of(choice)] == result["token_ids"]
            names = [name for choice in choices if choice.logprobs for name in choice.logprobs.tokens or ()]
            assert "".join(names) == result["text"]
        story: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story."}]
        sampled = client.chat.completions.create(messages=story, temperature=1, top_p=0.95, seed=3, n=2, **fields)
    with grpc.insecure_channel(server[1]) as channel:
        replies = decode(channel, **chat("Tell me a story."), temperature=1, top_p=0.95, seed=3, num_samples=2)
    for index, choice in enumerate(sampled.choices):
        samples = [reply.stream_content.samples[index] for reply in replies]
        assert token_ids_of(choice) == [token_id for sample in samples for token_id in sample.token_ids]


def test_openais_client_gets_json_of_its_schema(http_port, server):
    """Sampled, hot, streamed or not: whatever ends validates. A schema that cannot be is refused, and named."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["kind", "tall"]}, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "A person, as JSON."}]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{http_port}/v1", api_key="none", timeout=CALL_S) as client:
        fields: dict[str, Any] = {"model": "embedded", "messages": messages, "response_format": form, "max_tokens": 90}
        answer = client.chat.completions.create(**fields, n=3, temperature=1.2, seed=1)
        stream = client.chat.completions.create(**fields, stream=True, temperature=0)
        chunks = [chunk.choices[0] for chunk in stream]
        texts = [(choice.message.content, choice.finish_reason) for choice in answer.choices]
        texts.append(("".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason))
        for text, reason in texts:
            assert reason == "stop"
            jsonschema.validate(json.loads(text or ""), schema)
        form["json_schema"]["schema"] = {"not": {}}
        with pytest.raises(openai.BadRequestError, match="Unimplemented keys"):
            client.chat.completions.create(**fields)


def test_tools_work_with_a_template_that_knows_none(http_port, server):
    """One that must be called is called, and what it gives is read."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": schema}}]
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How is the weather in Paris?"}]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{http_port}/v1", api_key="none", timeout=CALL_S) as client:
        create: Any = partial(client.chat.completions.create, model="embedded", temperature=0, max_tokens=40)
        (choice,) = create(messages=messages, tools=tools, tool_choice="required").choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = cast(Any, choice.message.tool_calls)
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "Snow, and -5 degrees."}
        history = [*messages, choice.message, result, {"role": "user", "content": "Is there snow?"}]
        assert create(messages=history).choices[0].message.content


def test_the_seed_decides_a_sampled_answer(server):
    options = {"temperature": 1.0, "top_p": 0.95, "top_k": 50} | chat("Tell me a story.")
    with grpc.insecure_channel(server[1]) as channel:
        first, again, other = (answer(decode(channel, seed=seed, **options)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_stop_strings_samples_and_logprobs_on_the_real_model(server, offline):
    """The answer that `generate` gave, asked for with everything."""
    result = offline["results"][0]
    first, middle = result["text"][:8], result["text"][8:14]
    options = {"stop_strings": [middle], "num_samples": 3, "logprobs": 2, "prompt_logprobs": True}
    with grpc.insecure_channel(server[1]) as channel:
        replies = decode(channel, **chat(QUESTIONS[0]), **options)
        prompt_logprobs = list(replies[0].prompt_logprobs)
        for index in range(3):  # greedy: one and the same
            samples = [reply.stream_content.samples[index] for reply in replies]
            token_ids = [token for sample in samples for token in sample.token_ids]
            logprobs = [token for sample in samples for token in sample.logprobs]
            assert "".join(sample.text for sample in samples) == first
            assert token_ids == result["token_ids"][: len(token_ids)]
            assert len(token_ids) < len(result["token_ids"])
            assert [token.top_token_ids[0] for token in logprobs] == token_ids, "greedy takes the likeliest"
            assert all(token.top_logprobs[0] == token.logprob <= 0 for token in logprobs)
        assert len(prompt_logprobs) == len(result["prompt_token_ids"])
        assert prompt_logprobs[0] == 0
        assert all(logprob < 1e-4 for logprob in prompt_logprobs)  # the template's tokens are all but certain
        assert sum(prompt_logprobs) < -5
        drawn = decode(channel, **chat("Tell me a story."), num_samples=3, temperature=1.0, seed=5)
        stories = {"".join(reply.stream_content.samples[i].text for reply in drawn) for i in range(3)}
        assert len(stories) == 3
        alone = decode(channel, **chat("Tell me a story."), temperature=1.0, seed=5)
        assert answer(alone)[0] in stories, "the first sample is what a single one would be"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the prompt is missing"),
        (chat("hi") | {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        (chat("hi") | {"max_tokens": -5}, "max_tokens=-5"),
        (chat("hi") | {"max_tokens": 250}, "exceed cache_length=256"),
        (chat("long " * 200), "tokens, at most 192 are taken"),
        (chat("hi") | {"temperature": -1.0}, "temperature=-1.0"),
        (chat("hi") | {"top_p": 1.5}, "top_p=1.5"),
        ({"token_content": pb.DecodeRequest.TokenContent(token_ids=[5, 49152])}, "ids go from 0 to 49151"),
        ({"token_content": pb.DecodeRequest.TokenContent(token_ids=[-1])}, "token id -1 at position 0"),
        ({"text_content": pb.DecodeRequest.TextContent(text="")}, "the prompt is empty"),
    ],
)
def test_bad_requests_are_told_and_harm_nobody(server, fields, message):
    with grpc.insecure_channel(server[1]) as channel:
        good = OrchestratorStub(channel).Decode(pb.DecodeRequest(max_tokens=8, **chat("Hello")), timeout=CALL_S)
        with pytest.raises(grpc.RpcError) as told:
            decode(channel, **fields)
        assert told.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert message in told.value.details()
        assert answer(good)[1]


def test_a_cancelled_answer_gives_its_slot_back(server):
    """Nine long answers are begun and left over three slots; a new one does not wait for 190 tokens of each."""
    with grpc.insecure_channel(server[1]) as channel:
        stub = OrchestratorStub(channel)
        for _ in range(3):
            calls = [stub.Decode(pb.DecodeRequest(max_tokens=190, **chat("Count to 100."))) for _ in range(3)]
            for call in calls:
                next(call)
                call.cancel()
        assert answer(decode(channel, **chat(QUESTIONS[0])))[1]


def test_sigterm_lets_answers_finish_and_ends_with_0(server):
    """Last: it stops the module's server."""
    process, target = server
    with grpc.insecure_channel(target) as channel:
        call = OrchestratorStub(channel).Decode(pb.DecodeRequest(max_tokens=40, **chat("Tell me a story.")))
        first = next(call)
        process.send_signal(signal.SIGTERM)
        rest = list(call)
    assert rest[-1].stream_content.samples[0].finish_reason
    assert len(answer([first, *rest])[1]) == 40
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read()


def test_the_demo_asks_and_stops():
    """What `make demo` runs."""
    done = subprocess.run([*CLI, "demo", *SIZES, "--max-tokens", "12"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris" in done.stdout
    assert re.search(r"12 tokens · TTFT \d+ ms · [\d.]+ ms per token · [\d.]+ tokens/s", done.stdout)
    assert "stopped with status 0" in done.stdout
