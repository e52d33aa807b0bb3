"""Any message becomes a request or is refused; what is written is what is read."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.engine_impl.errors import RefusedError
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.server.grpc.messages import read_reply, read_request, write_reply
from slipstream.server.request.events import Event, FinishReason, TokenLogprob, Usage
from slipstream.server.request.request import Request

from tests.fakes import FakeEngine

INT32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 20)
FLOAT = st.floats(width=32) | st.floats(0, 2, width=32)


def maybe(field):
    return st.none() | field


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CONTENT = st.one_of(
    st.just({}),
    TEXT.map(lambda text: {"text_content": {"text": text}}),
    st.lists(INT32, max_size=20).map(lambda ids: {"token_content": {"token_ids": ids}}),
    st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3).map(
        lambda turns: {"messages": {"messages": turns}}
    ),
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": INT32,
        "num_samples": INT32,
        "lora_adapter_id": TEXT,
        "has_bos": st.booleans(),
        "temperature": FLOAT,
        "top_k": INT32,
        "top_p": FLOAT,
        "seed": st.integers(0, 2**64 - 1),
        "min_p": FLOAT,
        "repetition_penalty": FLOAT,
        "presence_penalty": FLOAT,
        "frequency_penalty": FLOAT,
        "stop_strings": st.lists(TEXT, max_size=20),
        "stop_token_ids": st.lists(INT32, max_size=20),
        "ignore_eos": st.booleans(),
        "logprobs": INT32,
        "prompt_logprobs": st.booleans(),
        "prompt_top_logprobs": INT32,
        "priority": INT32,
        "min_tokens": INT32,
        "logit_bias": st.dictionaries(INT32, FLOAT, max_size=5),
        "cache_salt": TEXT,
    },
)


@settings(deadline=None, max_examples=250)
@given(OPTIONS, CONTENT, st.booleans())
def test_any_message_is_a_request_or_refused(options, content, is_sound_at_heart):
    if is_sound_at_heart:  # else hardly any would get past the first checks
        options = {"max_tokens": 3} | {
            name: value for name, value in options.items() if name in ("seed", "stop_strings", "cache_salt")
        }
    message = pb.DecodeRequest(**options, **content)
    try:
        request = read_request(message, FakeEngine(), print, request_id="x")
    except RefusedError:
        return
    assert isinstance(request, Request)
    assert 0 < len(request.prompt_ids) <= 16
    assert 0 < request.max_tokens <= 255


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_refused(raw):
    try:
        message = pb.DecodeRequest.FromString(raw)
    except Exception:  # gRPC answers what is no message
        return
    with contextlib.suppress(RefusedError):
        read_request(message, FakeEngine(), print, request_id="x")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop_strings": [""]}, "a stop string of 0 characters"),
        ({"stop_strings": ["x" * 257]}, "a stop string of 257 characters must have from 1 to 256"),
        ({"stop_strings": ["x"] * 17}, "17 stop strings are too many; send at most 16"),
        ({"stop_token_ids": [1] * 17}, "17 stop token ids are too many"),
        ({"stop_token_ids": [-1]}, "stop token id -1"),
        ({"priority": 11}, "priority=11 must be from -10 .last. to 10 .first."),
        ({"num_samples": -1}, "num_samples=-1 must be at least 1"),
        ({"num_samples": 3}, "num_samples=3 needs as many slots and the server has 2"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"min_p": 2}, "min_p=2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"presence_penalty": 3}, "presence_penalty=3"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ({"min_tokens": 4}, "min_tokens=4 must be at most max_tokens=3"),
        ({"logit_bias": {5: -101}}, r"logit_bias\[5\]=-101.0 must be from -100 to 100"),
        ({"cache_salt": ""}, "cache_salt: 0 characters, must be a text of 1 to 256 characters"),
        (
            {"prediction": "x"},
            "prediction: this server does not speculate; leave it out or serve with --spec",
        ),
        ({"logit_bias": {256: 1}}, "logit_bias: token id 256 is outside the vocabulary; ids go from 0 to 255"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_options_out_of_range_are_refused_with_value_and_limit(fields, message):
    sound = {"max_tokens": 3, "text_content": {"text": "a"}}
    read_request(pb.DecodeRequest(**sound), FakeEngine(), print, request_id="x")
    with pytest.raises(RefusedError, match=message):
        read_request(pb.DecodeRequest(**sound, **fields), FakeEngine(), print, request_id="x")


def test_a_request_knows_its_caller():
    message = pb.DecodeRequest(text_content={"text": "a"}, max_tokens=3)
    request = read_request(message, FakeEngine(), print, request_id="mine", deadline=5.0)
    assert (request.id, request.deadline, request.deliver) == ("mine", 5.0, print)


USAGE = Usage(prompt_tokens=3, cached_tokens=1, generated_tokens=2, queue_ms=0.5, ttft_ms=None, total_ms=8.25)


def test_events_are_read_back_from_the_wire():
    events = [
        Event(prompt_logprobs=(TokenLogprob(0.0), TokenLogprob(-1.5, ((3, -0.5),)))),
        Event(index=1, text="a", token_ids=(5,), logprobs=(TokenLogprob(-0.5, ((5, -0.5), (6, -1.0))),)),
        Event(index=1, text="b", token_ids=(6,), logprobs=(TokenLogprob(-0.25),)),
        Event(index=2, finish_reason=FinishReason.DEADLINE, usage=USAGE),
    ]
    reply = pb.DecodeResponse.FromString(write_reply(events, 3).SerializeToString())
    assert len(reply.stream_content.samples) == 3
    assert list(read_reply(reply)) == [
        Event(prompt_logprobs=(TokenLogprob(0.0), TokenLogprob(-1.5, ((3, -0.5),)))),
        Event(index=1, text="ab", token_ids=(5, 6), logprobs=events[1].logprobs + events[2].logprobs),
        Event(index=2, finish_reason=FinishReason.DEADLINE),
        Event(usage=USAGE),
    ]


@pytest.mark.parametrize("reason", FinishReason)
def test_every_finish_reason_has_a_number(reason):
    reply = write_reply([Event(finish_reason=reason)], 1)
    assert reply.stream_content.samples[0].finish_reason
    assert next(read_reply(reply)).finish_reason is reason
