"""The stubs are current, and the wire is JetStream's."""

import importlib.util
import re
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from slipstream.protos import orchestrator_pb2 as pb

PROTOS = Path(__file__).parents[2] / "protos"


def generator():
    spec = importlib.util.spec_from_file_location("generate", PROTOS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_versions(text: str) -> str:
    """Another compiler writes its own version into the stubs: that alone makes them no other stubs."""
    return re.sub(r"\d+\.\d+\.\d+|^    \d+,$", "", text, flags=re.M)


def test_the_stubs_are_made_from_the_proto(tmp_path):
    generate = generator()
    generate.generate(tmp_path)
    for name in generate.STUBS:
        assert without_versions((PROTOS / name).read_text()) == without_versions((tmp_path / name).read_text()), (
            f"{name} is not current: make protos"
        )


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (
            pb.DecodeRequest,
            {
                "max_tokens": 4,
                "text_content": 5,
                "token_content": 6,
                "metadata": 7,
                "num_samples": 8,
                "lora_adapter_id": 9,
                "has_bos": 10,
            },
        ),
        (pb.DecodeRequest.TextContent, {"text": 1}),
        (pb.DecodeRequest.TokenContent, {"token_ids": 1}),
        (pb.DecodeRequest.Metadata, {"start_time": 1}),
        (pb.DecodeResponse, {"initial_content": 2, "stream_content": 3}),
        (pb.DecodeResponse.StreamContent, {"samples": 1}),
        (pb.DecodeResponse.StreamContent.Sample, {"text": 1, "token_ids": 2}),
        (pb.HealthCheckResponse, {"is_live": 1}),
    ],
    ids=lambda value: getattr(getattr(value, "DESCRIPTOR", None), "name", ""),
)
def test_field_numbers_below_100_are_jetstreams(message, fields):
    numbers = {field.name: field.number for field in message.DESCRIPTOR.fields}
    assert {name: number for name, number in numbers.items() if number < 100} == fields


def test_our_own_numbers_stay():
    """Clients are built against them."""
    ours = {
        pb.DecodeRequest: {
            "messages": 100, "temperature": 101, "top_k": 102, "top_p": 103, "seed": 104, "min_p": 105,
            "repetition_penalty": 106, "presence_penalty": 107, "frequency_penalty": 108, "stop_strings": 109,
            "stop_token_ids": 110, "ignore_eos": 111, "logprobs": 112, "prompt_logprobs": 113, "priority": 114,
            "min_tokens": 115, "logit_bias": 116, "cache_salt": 117, "prompt_top_logprobs": 118, "prediction": 119,
                "json_schema": 120,
            "json_object": 121, "regex": 122, "choices": 123, "grammar": 124, "structural_tag": 125,
        },
        pb.DecodeResponse: {"usage": 100, "prompt_logprobs": 101, "prompt_likeliest": 102},
        pb.DecodeRequest.Message: {
            "tool_calls": 130, "tool_call_id": 131, "name": 132, "reasoning_content": 133,
        },
        pb.DecodeRequest.Chat: {
            "tools": 130, "tool_choice": 131, "tool_name": 132, "parallel_tool_calls": 133, "documents": 134,
            "chat_template_kwargs": 135, "enable_thinking": 136, "add_generation_prompt": 137,
            "continue_final_message": 138,
        },
        pb.DecodeResponse.StreamContent.Sample: {
            "finish_reason": 100, "logprobs": 101, "reasoning": 130, "tool_calls": 131,
        },
    }  # fmt: skip
    for message, fields in ours.items():
        assert {f.name: f.number for f in message.DESCRIPTOR.fields if f.number >= 100} == fields


def test_old_clients_fields_are_ignored():
    """session_cache=1 (string) and priority=3 (int32), as older clients send them."""
    raw = b"\x0a\x03abc" + b"\x18\x05" + b"\x20\x07"
    message = pb.DecodeRequest.FromString(raw)
    assert message.max_tokens == 7
    assert message.WhichOneof("content") is None


def test_jetstreams_own_proto_fits_into_the_same_process():
    """Two files that define one full name cannot both be registered; ours has names of its own."""
    theirs = descriptor_pb2.FileDescriptorProto(
        name="jetstream/core/proto/jetstream.proto", package="jetstream_proto", syntax="proto3"
    )
    for message in pb.DESCRIPTOR.message_types_by_name:
        theirs.message_type.add(name=message)
    service = theirs.service.add(name="Orchestrator")
    service.method.add(
        name="Decode",
        input_type=".jetstream_proto.DecodeRequest",
        output_type=".jetstream_proto.DecodeResponse",
        server_streaming=True,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(pb.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(theirs.SerializeToString())
    assert pool.FindServiceByName("jetstream_proto.Orchestrator")
    assert pool.FindServiceByName("slipstream.v1.Orchestrator")
