"""Grammars over real vocabularies. An answer is drawn token by token from what may come next, at random: whatever comes
of it has to be a text of the grammar. No engine is needed for that."""

import json
import random
import re
import threading

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slipstream.engine_impl.checkpoints.open import open_checkpoint
from slipstream.engine_impl.checkpoints.pieces import backend_of, read_pieces
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.text import grammar as grammars
from slipstream.engine_impl.text.tokenizer import NoTokenizer, Tokenizer
from slipstream.server.request.grammar import Grammar

from tests.engine_impl.checkpoints.vocabularies import train_pieces
from tests.engine_impl.text_models import BOS, END, byte_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "ü"]}, "minItems": 1, "maxItems": 3},
        "size": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "parent": {"$ref": "#/$defs/parent"},
    },
    "required": ["name", "age", "tags", "size"],
    "additionalProperties": False,
    "$defs": {"parent": {"type": "object", "properties": {"name": {"const": "x"}}, "additionalProperties": False}},
}
BY_HAND = [
    PERSON,
    True,
    {"type": "object"},
    {"type": ["string", "boolean", "null"]},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 2},
    {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2},
    {"type": "integer", "multipleOf": 7, "minimum": 1},
    {"type": "string", "pattern": "^[a-z]{2,4}-\\d+$"},
    {"type": "string", "format": "date-time"},
    {"enum": [1, "1", None, [1, {"a": 2}], True]},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"required": ["a"]}]},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a byte."""
    return byte_tokenizer()


def allowed(matcher, end_ids=(END,)) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(matcher.allowed(end_ids).view(np.uint8), bitorder="little"))


def drawn(tokenizer, grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """A random answer's text; None for one that comes to no end in so many tokens. Ends are taken where they may be."""
    matcher, generator, token_ids = tokenizer.matcher(grammar.text), random.Random(seed), []
    (end,) = tokenizer.stop_ids
    for _ in range(most):
        choices = allowed(matcher, [end])
        assert not matcher.error
        if matcher.is_over or (end in choices and generator.random() < 0.3):
            return tokenizer.decode(token_ids)
        choices = choices[choices != end]
        closing = [token for token in choices if tokenizer.token_bytes(int(token)) in (b'"', b"}", b"]")]
        token_ids.append(int(generator.choice(closing if closing and generator.random() < 0.3 else choices)))
        matcher.take(token_ids[-1])
    return None


def check(tokenizer, schema, seeds) -> int:
    """How many random answers came to an end: all valid."""
    ended = [drawn(tokenizer, Grammar.of_json_schema(schema), seed) for seed in seeds]
    texts = [text for text in ended if text is not None]
    for text in texts:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    return len(texts)


@pytest.mark.parametrize("schema", BY_HAND, ids=lambda schema: json.dumps(schema)[:50])
def test_what_ends_validates(tokenizer, schema):
    assert check(tokenizer, schema, range(6)), "no answer came to an end"


SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]
LEAVES = st.one_of(
    st.sampled_from([{"type": name} for name in ("string", "integer", "number", "boolean", "null")]),
    st.lists(st.one_of(st.integers(-99, 99), st.text(max_size=4), st.none()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.tuples(st.integers(-50, 50), st.integers(0, 90)).map(
        lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[0] + ends[1]}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 5)).map(
        lambda ends: {"type": "string", "minLength": ends[0], "maxLength": ends[0] + ends[1]}
    ),
)


def nested(inner):
    """Objects, lists and alternatives of schemas."""
    properties = st.dictionaries(st.text(max_size=5), inner, max_size=4)
    return st.one_of(
        st.tuples(properties, st.booleans(), st.randoms(use_true_random=False)).map(
            lambda made: {
                "type": "object",
                "properties": made[0],
                "required": [name for name in made[0] if made[2].random() < 0.5],
                **({"additionalProperties": False} if made[1] else {}),
            }
        ),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda made: {"type": "array", "items": made[0], "minItems": made[1], "maxItems": made[1] + made[2]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda inners: {"anyOf": inners}),
    )


UNHURRIED = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=UNHURRIED)
@given(schema=st.recursive(LEAVES, nested, max_leaves=6), seed=st.integers(0, 99))
def test_what_ends_validates_of_any_schema(tokenizer, schema, seed):
    check(tokenizer, schema, [seed])


def from_schema(schema):
    import hypothesis_jsonschema  # a second, which no other file needs

    return hypothesis_jsonschema.from_schema(schema)


VALUED = [PERSON, *BY_HAND[3:5], BY_HAND[6], *BY_HAND[9:11]]  # a number with bounds takes no exponent
PERSONS = st.deferred(
    lambda: st.fixed_dictionaries(
        {name: from_schema(PERSON["properties"][name]) for name in PERSON["required"]},
        optional={"parent": st.sampled_from([{}, {"name": "x"}])},
    ).map(lambda person: {name: person[name] for name in PERSON["properties"] if name in person})
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=UNHURRIED)
@given(schema=st.sampled_from(VALUED), data=st.data(), indent=st.sampled_from([None, 2]))
def test_what_validates_is_accepted(tokenizer, schema, data, indent):
    """The other way round: a value that the schema describes, written as json.dumps does it, is an answer. Objects'
    keys stand in the schema's order."""
    value = data.draw(PERSONS if schema is PERSON else from_schema(schema))
    matcher = tokenizer.matcher(Grammar.of_json_schema(schema).text)
    for token_id in json.dumps(value, indent=indent, ensure_ascii=False).encode():
        matcher.take(token_id)
    assert END in allowed(matcher)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar.of_regex(r"[a-c]{2,3}/\d(x|yz)?\n"), r"[a-c]{2,3}/\d(x|yz)?\n"),
        (Grammar.of_choices(["yes", "no", 'q"u\\o/te', "é😀\n"]), 'yes|no|q"u\\\\o/te|é😀\\n'),
        (Grammar.of_lark('start: "<" inner ">"\ninner: /[0-9]/+ | "(" inner ")"'), r"<\(*\d+\)*>"),
        (Grammar.of_lark('root ::= "a" [0-9]+ ("b" | "c")'), r"a[0-9]+(b|c)"),
        (Grammar.of_lark('start: "n=" %json {"type": "integer", "minimum": 3, "maximum": 5}'), "n=[345]"),
    ],
    ids=str,
)
def test_other_kinds_end_in_texts_of_theirs(tokenizer, grammar, pattern):
    texts = [drawn(tokenizer, grammar, seed) for seed in range(8)]
    assert [text for text in texts if text is not None]
    for text in texts:
        assert text is None or re.fullmatch(pattern, text)


def test_a_structural_tag_leaves_the_text_between_free(tokenizer):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tags = [("<f=a>", schema, "</f>"), ("<f=b>", {"type": "integer"}, "</f>")]
    start = tokenizer.matcher(Grammar.of_structural_tag(tags, ["<f="]).text)
    for text, ends in [
        ("any text < f", True),
        ('so <f=a>{"a": true}</f> and <f=b>12</f>.', True),
        ("so <f=a>", False),
        ("so <f=", False),
    ]:
        matcher = start.copy()
        for token_id in text.encode():
            matcher.take(token_id)
        assert not matcher.error
        assert (END in allowed(matcher)) is ends
    assert sorted(chr(token) for token in allowed(matcher)) == ["a", "b"]


def test_blanks_between_tokens_of_json_are_bounded(tokenizer):
    matcher = tokenizer.matcher(Grammar.of_json_object().text)
    for token_id in b'{"a":\n':
        matcher.take(token_id)
    for _ in range(32):
        assert ord(" ") in allowed(matcher)
        matcher.take(ord(" "))
    assert {ord(" "), ord("\n"), ord("\t")}.isdisjoint(allowed(matcher).tolist())


def test_ends_are_told_and_allowed_where_the_text_is_whole(tokenizer):
    matcher = tokenizer.matcher(Grammar.of_choices(["ab", "abc"]).text)
    other = matcher.copy()
    assert allowed(matcher, [END, ord("z"), 10**6]).tolist() == [ord("a")]
    matcher.take(ord("a"))
    matcher.take(ord("b"))
    assert allowed(matcher, [END, ord("z"), 10**6]).tolist() == [ord("c"), ord("z"), END]
    assert allowed(matcher, []).tolist() == [ord("c")], "ignore_eos"
    assert not matcher.is_over
    matcher.take(ord("c"))
    assert allowed(matcher).tolist() == [END]
    assert matcher.is_over
    assert allowed(other).tolist() == [ord("a")], "a copy is an answer of its own"


def test_a_token_that_may_not_come_fails_the_matcher(tokenizer):
    matcher = tokenizer.matcher(Grammar.of_choices(["ab"]).text)
    matcher.take(ord("z"))
    allowed(matcher)
    assert "doesn't satisfy the grammar" in matcher.error
    assert not matcher.is_over


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.of_json_schema({"not": {}}), 'cannot be compiled: Unimplemented keys: ["not"]; leave out or mend'),
        (Grammar.of_json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Grammar.of_json_schema({"type": "strin"}), "Invalid type: strin"),
        (
            Grammar.of_json_schema({"type": "integer", "minimum": 5, "maximum": 3}),
            "minimum (5) is greater than",
        ),
        (Grammar.of_json_schema({"$ref": "http://example.org/a"}), "is not present in a registry"),
        (Grammar.of_regex("(a"), "unclosed group"),
        (Grammar.of_regex("(?=a)b"), "look-around, including look-ahead and look-behind, is not supported"),
        (Grammar.of_regex("(" * 5000 + "a" + ")" * 5000), "invalid regex"),
        (Grammar.of_regex("()"), "no text but the empty one"),
        (Grammar.of_lark("start: missing"), 'unknown name: "missing"'),
        (Grammar.of_lark("start: " + "(" * 9000 + '"a"' + ")" * 9000), "too deeply nested"),
        (Grammar.of_lark('root ::= "a'), "cannot be compiled"),
        (Grammar.of_lark('start: <|nope|> "a"'), "unknown special token"),
        (Grammar.of_lark('start: <[260]> "a"'), "Token range end too large: 260"),
        (Grammar.of_lark("\n" * 60_000 + "x"), "the grammar"),
    ],
    ids=lambda value: (value if isinstance(value, str) else value.text)[:40],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(tokenizer, grammar, reason):
    with pytest.raises(RefusedError) as refused:
        tokenizer.matcher(grammar.text)
    assert reason in str(refused.value)
    assert len(str(refused.value)) < 600


def test_what_takes_too_long_is_refused_and_no_thread_waits_for_it(tokenizer):
    """Compiling it takes 10 s. The worker's time is up after one, and meanwhile the interpreter is free."""
    counted, done = 0, threading.Event()

    def refused():
        with pytest.raises(RefusedError, match="the grammar takes longer than 1 s to compile; send a smaller"):
            tokenizer.matcher(Grammar.of_json_schema({"type": "integer", "multipleOf": 999983}).text)
        done.set()

    thread = threading.Thread(target=refused)
    thread.start()
    while not done.wait(0.001):
        counted += 1
    thread.join()
    assert counted > 50, "other threads went on"


def test_a_grammar_is_compiled_once_and_the_oldest_goes(tokenizer, monkeypatch):
    compiled = []
    call = grammars.WORKERS.call
    monkeypatch.setattr(grammars.WORKERS, "call", lambda *args: compiled.append(args[1]) or call(*args))
    monkeypatch.setattr(grammars, "MAX_KEPT", 2)
    first, second, third = (Grammar.of_choices([f"kept {n}"]).text for n in range(3))
    for text in (first, second, first, third, first, second):
        tokenizer.matcher(text)
    assert compiled == [first, second, third, second]


def test_control_tokens_come_where_a_grammar_names_them_and_nowhere_else(tokenizer):
    anything = tokenizer.matcher(Grammar.of_regex(r"(.|\n)*x").text)
    assert set(allowed(anything)) >= set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100), *range(0x80, 0xC2)}
    assert not {END, BOS} & set(allowed(anything))
    matcher = tokenizer.matcher(Grammar.of_lark('start: <s> "a"').text)
    assert allowed(matcher).tolist() == [BOS]


@pytest.mark.parametrize("name", ["<[40000]>", "<[5, 300-40000]>", "<[^40000]>"])
def test_tokens_are_named_by_ids_that_the_compiler_aside_lacks(name):
    text = Grammar.of_lark(f'start: {name} "a"').text
    assert grammars.compile_aside(text, ()) == text


def test_ids_beyond_the_model_and_a_model_without_stop_tokens():
    """The tokenizer has 260 tokens, the model 200; of a grammar's tokens the last one is lost."""
    backend = byte_tokenizer()._backend
    tokenizer = Tokenizer(backend, vocab_size=200, bos_id=None, eos_id=None, stop_ids=frozenset(), chat_template=None)
    matcher = tokenizer.matcher(Grammar.of_regex(r"(.|\n)+").text)
    assert len(matcher.allowed([])) == 7
    assert max(allowed(matcher, [])) == 198
    matcher = tokenizer.matcher(Grammar.of_choices(["a"]).text)
    matcher.take(ord("a"))
    assert not len(allowed(matcher, []))
    assert matcher.is_over


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_words_of_sentencepiece_begin_with_a_blank(model_type, tmp_path):
    pieces_file = tmp_path / "tokenizer.model"
    pieces_file.write_bytes(train_pieces(model_type=model_type, vocab_size=400, byte_fallback=True))
    backend, prefix = backend_of(read_pieces(pieces_file)[0], space_after_control=False)
    size = backend.get_vocab_size()
    tokenizer = Tokenizer(
        backend, vocab_size=size, bos_id=1, eos_id=2, stop_ids=frozenset({2}), text_prefix=prefix, chat_template=None
    )
    text = "the lazy dog of times, Łódź 東京 \U0001f95a"
    matcher = tokenizer.matcher(Grammar.of_choices([" " + text]).text)
    for token_id in tokenizer.encode(text):  # its first word is written with a blank before it
        matcher.take(token_id)
        assert not matcher.error
    assert allowed(matcher, [2]).tolist() == [2]
    assert matcher.is_over
    assert check(tokenizer, PERSON, range(3))


def test_a_ggufs_vocabulary_writes_a_schemas_answer():
    tokenizer = open_checkpoint("embedded").tokenizer()
    matcher = tokenizer.matcher(Grammar.of_json_schema(PERSON).text)
    for token_id in tokenizer.encode('{"name": "Łódź 東京", "age": 7, "tags": ["ü"], "size": -1.5e3}'):
        assert token_id in allowed(matcher, [])
        matcher.take(token_id)
    allowed(matcher, [])
    assert matcher.is_over or not matcher.error


def test_a_model_without_a_tokenizer_takes_no_grammar():
    tokenizer = NoTokenizer("tiny", vocab_size=10, bos_id=None, stop_ids=frozenset())
    tokenizer.prepare_grammars()
    with pytest.raises(RefusedError, match="tiny has no tokenizer, and a grammar is about text; leave it out"):
        tokenizer.matcher(Grammar.of_json_object().text)
