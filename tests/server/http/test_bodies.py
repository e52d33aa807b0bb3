"""Bodies that nobody meant: each becomes sound requests or one refusal, never anything else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.config import ChatConfig
from slipstream.server.http.bodies import ChatBody, CompletionBody
from slipstream.server.http.errors import UnknownModelError
from slipstream.server.request.limits import Limits

from tests.engine_impl.text_models import byte_tokenizer
from tests.fakes import FakeEngine

GOOD = {
    CompletionBody: {"prompt": "a", "max_tokens": 3},
    ChatBody: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
}

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.lists(st.lists(st.integers(), max_size=2), max_size=2)


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_body_with_some_fields_replaced_by_anything(kind):
    engine, outcomes = FakeEngine(), set()

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.dictionaries(st.sampled_from([*kind.model_fields, *kind.refused]), VALUES, max_size=2))
    def check(fields):
        raw = json.dumps(GOOD[kind] | fields).encode()
        try:
            requests = kind.read(raw).requests("id", engine, lambda number: lambda event: None)
        except (RefusedError, UnknownModelError):
            outcomes.add("refused")
            return
        outcomes.add("read")
        for request in requests:
            assert 1 <= len(request.prompt_ids) <= engine.max_prefill_length
            assert 1 <= request.max_tokens <= engine.cache_length - len(request.prompt_ids)
            assert 1 <= request.num_samples <= engine.max_concurrent_decodes

    check()
    assert outcomes == {"refused", "read"}


@settings(max_examples=100, deadline=None, database=None)
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_bytes_that_are_no_body_are_refused(raw):
    with pytest.raises(RefusedError):
        CompletionBody.read(raw)


@pytest.mark.parametrize(("fields", "first"), [({}, [258]), ({"add_special_tokens": False}, [])])
def test_texts_begin_with_a_bos_unless_told_not_to(fields, first):
    body = CompletionBody.read(json.dumps({"prompt": ["a"]} | fields).encode())
    prompts = body.prompts(byte_tokenizer(adds_bos=True), Limits.of(FakeEngine()), ChatConfig())
    assert [prompt.token_ids for prompt in prompts] == [[*first, 97]]
