"""Structured output through an engine: a tiny random model that reads and writes bytes."""

import json
from typing import Any

import jsonschema
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.server.request.events import FinishReason
from slipstream.server.request.grammar import Grammar
from slipstream.server.scheduler.orchestrator import Orchestrator

from tests.engine_impl.text_models import CONFIG, byte_tokenizer, one_device_engine
from tests.engine_impl.tiny_models import tiny_engine
from tests.server.scheduler.loop import Asked, texts, until
from tests.server.schemas import schemas as random_schemas

SHORT = {"type": "string", "maxLength": 4}
OBJECT = {"type": "object", "properties": {"a": SHORT, "b": {"type": "null"}}, "required": ["a"]}
SCHEMAS = [
    {"enum": ["a", "bc", 3, None]},
    {"type": "boolean"},
    {"type": "integer", "minimum": -5, "maximum": 1000},
    {"type": "string", "pattern": "^[a-f]{2,8}$"},
    {"type": "string", "format": "date"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    OBJECT | {"additionalProperties": False},
    {"anyOf": [{"type": "null"}, {"type": "array", "items": {"const": 1}, "maxItems": 2}]},
]
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def orchestrator():
    engine, params = one_device_engine()
    orchestrator = Orchestrator(engine, params, max_queued=30, warm_up=False)
    orchestrator.start()
    for request in [asked(orchestrator, None, 3, num_samples=count, temperature=1) for count in (1, 3)]:
        while not request.events.get(timeout=120).is_last:  # it compiles
            pass
    yield orchestrator
    orchestrator.close()


def asked(orchestrator, grammar, max_tokens=100, *, num_samples=1, stop_strings=(), **sampling):
    request = Asked(
        "hi",
        max_tokens,
        grammar=grammar,
        num_samples=num_samples,
        stop_strings=stop_strings,
        sampling=SamplingParams(**sampling),
    )
    request.constrain(TOKENIZER)
    orchestrator.submit(request)
    return request


def test_drawn_answers_validate_and_change_nothing_of_one_without_a_grammar(orchestrator):
    alone = asked(orchestrator, None, temperature=1, seed=1, ignore_eos=True).answer()[0]
    free = asked(orchestrator, None, temperature=1, seed=1, ignore_eos=True)
    requests = [
        (schema, asked(orchestrator, Grammar.of_json_schema(schema), temperature=1, seed=seed))
        for seed, schema in enumerate(SCHEMAS * 2)
    ]
    for schema, request in requests:
        text, last = request.answer()
        assert last.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(text), schema)
    assert free.answer()[0] == alone
    until(lambda: orchestrator.slots_in_use == 0)


CLOSERS: dict[int, float] = dict.fromkeys(b'"]}', 6.0) | dict.fromkeys(b" \n\t", -6.0)
"""A random model alone would come to few ends."""
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


def check_in_flight(orchestrator, schemas, max_tokens):
    """All at once. Returns how many came to an end: each is as its schema says."""
    requests = [
        asked(orchestrator, Grammar.of_json_schema(schema), max_tokens, temperature=1, seed=seed, logit_bias=CLOSERS)
        for seed, schema in enumerate(schemas)
    ]
    ended = 0
    for schema, request in zip(schemas, requests, strict=True):
        text, last = request.answer()
        assert last.error is None, schema
        if last.finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)
            ended += 1
    return ended


def test_schemas_of_all_kinds_in_flight_together(orchestrator):
    assert check_in_flight(orchestrator, random_schemas(24, seed=0), 110) > 12


@pytest.fixture(scope="module")
def drafting():
    """Sixteen slots, and steps in which what must come stands as drafts."""
    engine, params = tiny_engine(CONFIG, slots=16, cache_length=1024, speculate="auto")
    engine.get_tokenizer = lambda: TOKENIZER
    orchestrator = Orchestrator(engine, params, max_queued=100, warm_up=True)
    orchestrator.start()
    yield orchestrator
    orchestrator.close()


@pytest.mark.slow
def test_hundreds_of_schemas(drafting):
    """The rest is for `make product`."""
    assert check_in_flight(drafting, random_schemas(96, seed=1), 900) > 64


@pytest.mark.product
@pytest.mark.parametrize("seed", range(2, 8))
def test_hundreds_of_schemas_more(drafting, seed):
    assert check_in_flight(drafting, random_schemas(96, seed), 900) > 64


@pytest.mark.slow
def test_what_must_come_as_drafts_changes_no_answer(orchestrator, drafting):
    """Greedy and drawn, beside answers that are free."""
    schemas = [
        OBJECT | {"additionalProperties": False, "required": ["b", "a"]},
        *SCHEMAS[-2:],
        {"const": "a long text"},
    ]
    samplings: list[dict[str, Any]] = [{}, {"temperature": 1.5, "seed": 7}, {"repetition_penalty": 1.5}]
    told = []
    for one in (orchestrator, drafting):
        asks = [(Grammar.of_json_schema(schema), sampling) for schema in schemas for sampling in samplings]
        asks += [(None, {"temperature": 1, "seed": 3, "ignore_eos": True})] * 2
        requests = [asked(one, grammar, **sampling) for grammar, sampling in asks]
        told.append([request.answer()[0] for request in requests])
    assert told[0] == told[1]


def test_samples_are_drawn_each_for_itself_and_logprobs_are_the_models_own(orchestrator):
    grammar = Grammar.of_regex("[a-z]{5}!")
    events = asked(orchestrator, grammar, num_samples=3, temperature=1, seed=3, logprobs=0).all()
    answers = texts(events)
    assert len(set(answers.values())) == 3
    assert all(len(text) == 6 and text[:5].isalpha() and text[5] == "!" for text in answers.values())
    of_each = [token.logprob for event in events for token in event.logprobs]
    assert len(of_each) == 18
    assert max(of_each) < -0.001, "a token that had to come would have 0"


def test_greedy_and_the_rest_of_the_sampler_follow_it_too(orchestrator):
    grammar = Grammar.of_json_schema(OBJECT | {"additionalProperties": False})
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 2, "top_p": 0.5, "min_p": 0.1, "seed": 4},
        {"repetition_penalty": 1.8, "frequency_penalty": 2.0, "logit_bias": {ord("}"): -100.0, 259: 100.0}},
        {"temperature": 1.0, "seed": 5, "min_tokens": 60},
        {"temperature": 1.0, "seed": 5, "ignore_eos": True},
    ]
    for sampling in samplings:
        text, last = asked(orchestrator, grammar, **sampling).answer()
        assert last.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(text), OBJECT)


def test_one_that_max_tokens_cuts_says_so(orchestrator):
    text, last = asked(orchestrator, Grammar.of_regex("[a-z]{50}"), 7, temperature=1, seed=0).answer()
    assert (len(text), last.finish_reason) == (7, FinishReason.LENGTH)


def test_grammars_of_no_measure_are_refused_while_another_answer_goes_on(orchestrator):
    """One takes 10 s to compile, one is too long, one is too deep: each is told, and a stream beside them is not."""
    stream = asked(orchestrator, None, 100, temperature=1, seed=1, ignore_eos=True)
    stream.next()
    with pytest.raises(RefusedError, match="takes longer than 1 s to compile"):
        asked(orchestrator, Grammar.of_json_schema({"type": "integer", "multipleOf": 999983}))
    with pytest.raises(RefusedError, match="the grammar has 200107 characters and may have 131072"):
        asked(orchestrator, Grammar.of_json_schema({"const": "a" * 200_000}))
    with pytest.raises(RefusedError, match="cannot be compiled"):
        asked(orchestrator, Grammar.of_regex("(" * 9000 + ")" * 9000))
    assert stream.answer()[1].usage.generated_tokens == 100
    assert asked(orchestrator, Grammar.of_choices(["abc"])).answer()[0] == "abc"
