"""JetStream's clients at our own server: their messages, their stubs, their benchmark. "a" is answered "bcd..."."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from jetstream.core.proto import jetstream_pb2
from jetstream.core.proto.jetstream_pb2_grpc import OrchestratorStub
from slipstream.protos import orchestrator_pb2 as ours
from slipstream.server.grpc.messages import DEFAULT, read_prompt
from slipstream.server.request.limits import Limits

from tests.engine_impl.text_models import BOS, byte_tokenizer
from tests.fakes import FakeEngine

WAIT_S = 10
theirs = cast(Any, jetstream_pb2)
"""Its classes are made when it is imported."""
TEXT = {"text_content": theirs.DecodeRequest.TextContent(text="ab")}
TOKENS = {"token_content": theirs.DecodeRequest.TokenContent(token_ids=[97, 98])}


@pytest.fixture
def channel(target):
    with grpc.insecure_channel(target) as channel:
        yield channel


def later_messages():
    """The DecodeRequest of JetStream's later sources, which were never released: 1 to 3 are gone, 7 to 10 are new."""
    file = descriptor_pb2.FileDescriptorProto(name="later.proto", package="later", syntax="proto3")
    metadata = file.message_type.add(name="Metadata")
    metadata.field.add(name="start_time", number=1, type=2, label=1)
    text = file.message_type.add(name="TextContent")
    text.field.add(name="text", number=1, type=9, label=1)
    request = file.message_type.add(name="DecodeRequest")
    request.field.add(name="max_tokens", number=4, type=5, label=1)
    request.field.add(name="text_content", number=5, type=11, label=1, type_name=".later.TextContent")
    request.field.add(name="metadata", number=7, type=11, label=1, type_name=".later.Metadata")
    request.field.add(name="num_samples", number=8, type=5, label=1)
    request.field.add(name="lora_adapter_id", number=9, type=9, label=1)
    request.field.add(name="has_bos", number=10, type=8, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"later.{name}"))
        for name in ("DecodeRequest", "TextContent", "Metadata")
    }


@pytest.mark.parametrize("content", [TEXT, TOKENS, {}])
def test_what_they_write_we_read_and_the_other_way_round(content):
    request = theirs.DecodeRequest(max_tokens=7, session_cache="x", priority=3, **content)
    read = ours.DecodeRequest.FromString(request.SerializeToString())
    assert read.max_tokens == 7
    assert read.WhichOneof("content") == request.WhichOneof("content")
    assert read.text_content.text == request.text_content.text
    assert read.token_content.token_ids == request.token_content.token_ids
    assert theirs.DecodeRequest.FromString(read.SerializeToString()) == request  # what we ignore is kept


def test_what_we_write_they_read():
    sample = ours.DecodeResponse.StreamContent.Sample(
        text="é", token_ids=[5, 49151], finish_reason=ours.FINISH_REASON_STOP
    )
    reply = ours.DecodeResponse(
        stream_content=ours.DecodeResponse.StreamContent(samples=[sample]),
        usage=ours.DecodeResponse.Usage(prompt_tokens=1, generated_tokens=2),
    )
    (read,) = theirs.DecodeResponse.FromString(reply.SerializeToString()).stream_content.samples
    assert (read.text, list(read.token_ids)) == ("é", [5, 49151])
    live = ours.HealthCheckResponse(is_live=True).SerializeToString()
    assert theirs.HealthCheckResponse.FromString(live).is_live


@pytest.mark.parametrize("content", [TEXT, TOKENS])
def test_their_stub_gets_text_and_token_ids(channel, content):
    """As `requester` and `load_tester` ask (text), and as `benchmark_serving` does (token ids), old fields included."""
    request = theirs.DecodeRequest(session_cache="", priority=0, max_tokens=4, **content)
    samples = [reply.stream_content.samples[0] for reply in OrchestratorStub(channel).Decode(request, timeout=WAIT_S)]
    assert "".join(sample.text for sample in samples) == "cdef"
    assert [token_id for sample in samples for token_id in sample.token_ids] == [99, 100, 101, 102]
    assert OrchestratorStub(channel).HealthCheck(theirs.HealthCheckRequest(), timeout=WAIT_S).is_live


@pytest.mark.parametrize("fields", [{"num_samples": 1}, {"has_bos": True}, {"lora_adapter_id": ""}, {}])
def test_later_clients_are_answered_too(channel, fields):
    kinds = later_messages()
    request = kinds["DecodeRequest"](
        max_tokens=3, text_content=kinds["TextContent"](text="a"), metadata=kinds["Metadata"](start_time=1.5), **fields
    )
    decode = channel.unary_stream(
        "/jetstream_proto.Orchestrator/Decode",
        kinds["DecodeRequest"].SerializeToString,
        theirs.DecodeResponse.FromString,
    )
    replies = list(decode(request, timeout=WAIT_S))
    assert "".join(reply.stream_content.samples[0].text for reply in replies) == "bcd"


def test_an_adapter_that_is_not_there_is_told(channel):
    kinds = later_messages()
    request = kinds["DecodeRequest"](max_tokens=3, text_content=kinds["TextContent"](text="a"), lora_adapter_id="mine")
    decode = channel.unary_stream(
        "/jetstream_proto.Orchestrator/Decode",
        kinds["DecodeRequest"].SerializeToString,
        theirs.DecodeResponse.FromString,
    )
    with pytest.raises(grpc.RpcError) as told:
        list(decode(request, timeout=WAIT_S))
    assert told.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "lora_adapter_id='mine'" in (told.value.details() or "")


def test_their_benchmark_runs_and_counts_every_token(target):
    script = Path(__file__).with_name("jetstream_benchmark.py")
    done = subprocess.run(
        [sys.executable, str(script), target, "a,bc,xyz,m", "5"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["answers"] == {"a": "bcdef", "bc": "defgh", "xyz": "", "m": "nopqr"}
    assert last["result"]["total_output_tokens"] == 15
    assert last["result"]["completed"] == 3  # it leaves out answers without tokens
    assert last["result"]["median_ttft_ms"] > 0


@pytest.mark.parametrize(
    ("adds_bos", "sent", "has_bos", "read"),
    [
        (True, [72, 105], False, [BOS, 72, 105]),  # as benchmark_serving sends them
        (True, [BOS, 72], False, [BOS, 72]),
        (True, [72, 105], True, [72, 105]),
        (True, [], False, []),  # an empty prompt stays one, and is refused
        (False, [72, 105], False, [72, 105]),
        (False, [BOS, 72], False, [BOS, 72]),
    ],
)
def test_token_ids_get_the_bos_that_jetstream_gives_them(adds_bos, sent, has_bos, read):
    message = ours.DecodeRequest(token_content=ours.DecodeRequest.TokenContent(token_ids=sent), has_bos=has_bos)
    prompt = read_prompt(message, byte_tokenizer(adds_bos=adds_bos), Limits.of(FakeEngine()), DEFAULT)
    assert prompt.token_ids == read
