"""A request's options are declared once: every front, the device and the docs have what the declaration says."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor as Field
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.cli import main as cli
from slipstream.cli.ask import Ask
from slipstream.cli.options import OTHER_NAMES as FLAGS
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.option import (
    ByToken,
    PaddedRows,
    Range,
    Text,
    Texts,
    TokenIds,
    at_least,
    option,
    options_of,
)
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.sampling.slots import NOWHERE, ON_DEVICE, SlotSampling, leaf
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.server.grpc.messages import read_request, write_options
from slipstream.server.http.bodies import ChatBody, CompletionBody
from slipstream.server.http.options import IN_BOTH, OF_EACH_BODY, field_of_option
from slipstream.server.request.options import OPTIONS, AnswerOptions

from tests.fakes import FakeEngine

PAGE = Path(__file__).parents[3] / "docs" / "requests.md"
BY_NAME = {one.name: one for one in OPTIONS}

WIRE_KINDS = {
    float: {Field.TYPE_FLOAT},
    int: {Field.TYPE_INT32, Field.TYPE_UINT64},
    bool: {Field.TYPE_BOOL},
    str: {Field.TYPE_STRING},
    dict: {Field.TYPE_MESSAGE},
}
WITHOUT_ABSENCE = {"max_tokens", "num_samples"}
"""JetStream's: 0 samples are one, 0 tokens are refused."""


def examples(one) -> list[Any]:
    """Sound values that a float32 holds, the ends among them; the fake has two slots and 256 tokens."""
    match one.allowed:
        case None:
            return [True, False]
        case Range(low=low, high=high, is_above=is_above):
            highest = min(high, {"num_samples": 2, "max_tokens": 200, "min_tokens": 200}.get(one.name, high))
            inner = [0.25] if isinstance(one.default, float) else [1]
            ends = [low] * (not is_above) + [highest] * (highest < 2**33)
            absent = [None] if one.default is None else []
            return [type(one.default or 0)(value) for value in ends + inner] + absent
        case Text(longest=longest):
            return ["x", "é" * longest, " \n", None]
        case Texts(at_most=at_most):
            return [(), ("x", "y" * 256, "é\n"), tuple("a" for _ in range(at_most))]
        case TokenIds(at_most=at_most):
            return [(), (0, 2**31 - 1), tuple(range(at_most))]
        case ByToken(numbers=numbers):
            return [{}, {0: numbers.low, 255: numbers.high, 7: 0.5}, {token_id: 1.0 for token_id in range(256)}]
    raise AssertionError(f"{one.name}: no examples of {one.allowed}")


CASES = [
    pytest.param(one, value, id=f"{one.name}-{number}") for one in OPTIONS for number, value in enumerate(examples(one))
]


def flag_of(name: str) -> str:
    return "--" + str(FLAGS.get(name, name)).replace("_", "-")


def values_of(options) -> dict[str, Any]:
    return {one.name: value for one, value in options.values()}


def speculating():
    """An engine that takes every prediction."""
    return FakeEngine(widths=(1, 2), cache_length=2**21)


def through_wire(options):
    message = pb.DecodeRequest(text_content={"text": "a"})
    write_options(message, options)
    received = pb.DecodeRequest.FromString(message.SerializeToString())
    return read_request(received, speculating(), print, request_id="x")


def through_flags(values: dict[str, Any]) -> AnswerOptions:
    words = ["ask", "hi"]
    for name, value in values.items():
        flag = flag_of(name)
        if isinstance(value, tuple):
            words += [word for item in value for word in (flag, str(item))]
        elif isinstance(value, dict):
            words += [word for pair in value.items() for word in (flag, "{}={}".format(*pair))]
        elif value is True:
            words.append(flag)
        elif value is not False and value is not None:
            words += [flag, repr(value) if isinstance(value, float) else str(value)]
    command = cli.parse(words)
    assert isinstance(command, Ask)
    return command.answer


def as_json(name, value):
    if name == "prompt_logprobs":
        return 0 if value else None
    if name == "prediction" and value is not None:
        return {"type": "content", "content": value}
    return value  # json makes strings of a mapping's ids, as OpenAI wants them


def through_http(values: dict[str, Any]):
    fields = {field_of_option(name): as_json(name, value) for name, value in values.items()}
    raw = json.dumps({"prompt": "a", "max_tokens": 200} | fields).encode()
    (request,) = CompletionBody.read(raw).requests("x", speculating(), lambda number: print)
    return request


def beside(one, value):
    """What else has to be asked for: the least length needs room, and greedy answers need no seed."""
    return {"max_tokens": 200} | ({"temperature": 1.0} if one.name == "seed" else {}) | {one.name: value}


@pytest.mark.parametrize(("one", "value"), CASES)
def test_a_value_comes_through_every_front_as_it_was(one, value):
    asked = beside(one, value)
    expected = values_of(AnswerOptions.of(**asked))
    assert expected[one.name] == value
    assert values_of(through_flags(asked)) == expected
    for request in (through_wire(AnswerOptions.of(**asked)), through_http({"temperature": 0.0} | asked)):
        arrived = values_of(request)
        drawn = arrived.pop("seed")
        assert arrived == {name: other for name, other in expected.items() if name != "seed"}
        if expected["seed"] is None:  # drawn, unless the answer is greedy
            assert 0 <= drawn < 2**32
            assert drawn == 0 or asked.get("temperature")
        else:
            assert drawn == expected["seed"]


def test_what_is_left_out_is_the_declared_default_but_for_openais():
    message = pb.DecodeRequest(text_content={"text": "a"}, max_tokens=128)
    declared = {one.name: one.default for one in OPTIONS} | {"seed": 0}
    assert values_of(read_request(message, speculating(), print, request_id="x")) == declared
    assert values_of(through_flags({})) == declared | {"seed": None}
    over_http = values_of(through_http({}))
    assert 0 <= over_http.pop("seed") < 2**32
    declared.pop("seed")
    assert over_http == declared | {"temperature": 1.0, "max_tokens": 200}


@pytest.mark.parametrize("one", OPTIONS, ids=BY_NAME)
def test_the_wire_has_a_field_that_can_tell_the_default_from_zero(one):
    field = pb.DecodeRequest.DESCRIPTOR.fields_by_name[one.name]
    kind = dict if one.default == {} else next(iter(get_args(one.kind)), one.kind)  # of `int | None`: int
    assert field.type in WIRE_KINDS[kind]
    assert field.is_repeated == isinstance(one.default, (tuple, dict))
    is_zero = one.default is not None and not one.default
    assert field.has_presence == (not is_zero and one.name not in WITHOUT_ABSENCE)


def test_http_has_every_option():
    for kind in (CompletionBody, ChatBody):
        assert kind.model_fields.keys() >= OF_EACH_BODY | {field_of_option(one.name) for one in IN_BOTH}
        assert not kind.refused.keys() & kind.model_fields.keys()
    assert {one.name for one in IN_BOTH} | OF_EACH_BODY == BY_NAME.keys()


@pytest.mark.parametrize("one", ON_DEVICE, ids=lambda one: one.name)
def test_every_sound_value_fits_its_arrays(one):
    for value in examples(one):
        arrays = leaf(one, value)
        if isinstance(one.device, PaddedRows):
            for array, dtype in zip(arrays if isinstance(arrays, tuple) else [arrays], one.device.dtypes, strict=True):
                assert (array.shape, array.dtype) == ((one.device.length,), dtype)
                assert array[: len(value)].tolist() == list(
                    value.values() if isinstance(value, dict) and dtype == "float32" else value
                )
            first = arrays[0] if isinstance(arrays, tuple) else arrays
            assert (first[len(value) :] == NOWHERE).all()
        else:
            assert arrays.dtype == np.dtype(one.device)
            assert arrays == (one.absent if value is None else value)


def test_the_models_stop_tokens_join_the_requests_unless_it_ignores_them():
    def rows(model_stop_ids, **params):
        token_K = SlotSampling.of(SamplingParams(**params), model_stop_ids).stop_token_ids
        return token_K[token_K != NOWHERE].tolist()

    assert rows({3}, stop_token_ids=(5, 4)) == [5, 4, 3]
    assert rows({3}, stop_token_ids=(5,), ignore_eos=True) == [5]
    assert rows(range(16), stop_token_ids=tuple(range(20, 36))) == [*range(20, 36), *range(16)]


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([one for one in OPTIONS if isinstance(one.allowed, Range)]), st.data())
def test_a_number_is_taken_or_refused_by_name_value_and_limit(one, data):
    numbers = st.floats() if isinstance(one.default, float) else st.integers()
    near = [one.allowed.low, one.allowed.high, one.allowed.low - 1, one.allowed.high + 1, 0]
    value = data.draw(numbers | st.sampled_from([type(one.default or 0)(x) for x in near if abs(x) < 2**64]))
    low, high = one.allowed.low, one.allowed.high
    if (low < value if one.allowed.is_above else low <= value) and value <= high:
        one.check(value)
    else:
        with pytest.raises(RefusedError, match=f"^{re.escape(f'{one.name}={value} must be {one.allowed.text}')}"):
            one.check(value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_tokens": -1}, "min_tokens=-1 must be from 0"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens=4 must be at most max_tokens=3; ask for fewer, or for a"),
        ({"min_tokens": 129}, "min_tokens=129 must be at most max_tokens=128"),
        ({"logit_bias": {5: 100.5}}, r"logit_bias\[5\]=100.5 must be from -100 to 100"),
        ({"logit_bias": {5: float("nan")}}, r"logit_bias\[5\]=nan"),
        ({"logit_bias": {-1: 1}}, "logit_bias: token id -1 must be from 0"),
        ({"logit_bias": {2**31: 1}}, "logit_bias: token id 2147483648 must be from 0 to 2147483647"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias: 301 token ids are too many; send at most 300"),
        ({"seed": -1}, "seed=-1 must be from 0 to 4294967295, or left out"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"cache_salt": ""}, "^cache_salt: 0 characters, must be a text of 1 to 256 characters, or left out$"),
        ({"cache_salt": "s" * 257}, "^cache_salt: 257 characters, must be a text of 1 to 256 characters, or left out$"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(RefusedError, match=message):
        AnswerOptions.of(**values)


def test_what_a_declaration_tells():
    @dataclass(frozen=True)
    class Some:
        depth: int = option(2, at_least(1), device="int32")
        """How deep
        it goes."""

        weights: dict = option({1: 0.5})  # noqa: RUF009
        other: int = 3

    depth, weights = options_of(Some)
    assert (depth.name, depth.kind, depth.default, depth.device) == ("depth", int, 2, "int32")
    assert depth.doc() == "How deep it goes."
    assert weights.default == {1: 0.5}
    assert Some().weights is not Some().weights
    with pytest.raises(RefusedError, match="depth=0 must be at least 1"):
        depth.check(0)
    weights.check({})


def row(one: Any) -> str:
    """The docs' line."""
    flag, http = flag_of(one.name), field_of_option(one.name)
    names = [f"`{one.name}`", f"`{flag}`"] + [f"HTTP `{http}`"] * (http != one.name)
    default = "no" if one.default is False else "none" if one.default in (None, (), {}) else f"{one.default:g}"
    allowed = one.allowed.text if one.allowed else "yes or no"
    return f"| {', '.join(names)} | {default} | {allowed} | {one.doc()} |"


def table():
    return "\n".join(["| option, flag | default | takes | |", "|---|---|---|---|", *map(row, OPTIONS)])


def test_the_docs_have_the_table():
    found = re.search(r"^\| option, flag .*?(?=\n\n)", PAGE.read_text(), re.M | re.S)
    assert found
    assert found[0] == table(), f"{PAGE.name} is not current; its table is now\n{table()}"
