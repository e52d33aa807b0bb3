"""Answers in messages with channels: read however they are cut into pieces, and held to by grammars."""

import json
import random
from functools import cache
from typing import Any

import llguidance
import llguidance.numpy as masks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.engine_impl.text.chat import Chat, Tool, Turn
from slipstream.engine_impl.text.chat_template import ChatTemplate
from slipstream.engine_impl.text.grammar import Bytes
from slipstream.engine_impl.text.tokenizer import Tokenizer, byte_level_bpe
from slipstream.server.config import ChatConfig
from slipstream.server.delivery.delivery import Text
from slipstream.server.dialects import harmony
from slipstream.server.dialects.parts import Brought, CallPart
from slipstream.server.dialects.syntax import AnswerReader, AnswerSyntax
from slipstream.server.request.call_grammar import after_thought, may_call, must_call, strict_if_called
from slipstream.server.request.chat import ChatCall, prompt_of
from slipstream.server.request.grammar import Grammar
from slipstream.server.request.limits import Limits

from tests.engine_impl.text import templates
from tests.engine_impl.text_models import TOKENS

from .test_reader import calls, read

PARIS = '{"city": "Paris"}'
SYNTAX = AnswerSyntax(channels=True, tools=frozenset({"get_weather"}))
THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|>"
FINAL = "<|channel|>final<|message|>"
TO = "to=functions.get_weather"
CALL = f"<|channel|>commentary {TO} <|constrain|>json<|message|>{PARIS}"
ONE = Brought("", "", calls(("get_weather", PARIS)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FINAL + "Hello.\n", Brought("Hello.\n")),
        (f"{THOUGHT}<|start|>assistant{FINAL}Hello.", Brought("Hello.", "Hm.")),
        (f"{THOUGHT}\n<|start|>assistant{FINAL}Hello.<|end|>", Brought("Hello.", "Hm.")),
        (f"{THOUGHT}<|start|>assistant{THOUGHT}", Brought("", "Hm.\n\nHm.")),
        ("<|channel|>analysis<|message|>Hm", Brought("", "Hm")),
        (f"{THOUGHT}<|start|>assistant{CALL}", ONE._replace(reasoning="Hm.")),
        (f"{THOUGHT}<|start|>assistant {TO}<|channel|>commentary json<|message|>{PARIS}",
         ONE._replace(reasoning="Hm.")),
        (f" {TO}<|channel|>commentary json<|message|>{PARIS}", ONE),
        (f"<|channel|>analysis {TO} code<|message|>{PARIS}", ONE),
        (f"<|channel|>commentary {TO}<|message|> {PARIS} ", ONE),
        (f"<|channel|>commentary {TO}<|message|>", Brought("", "", calls(("get_weather", "{}")))),
        (f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{CALL}", ONE._replace(text="I look.")),
        (f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{FINAL}So.", Brought("I look.\n\nSo.")),
        (f"{FINAL.replace('<|message|>', ' <|constrain|>json<|message|>')}{PARIS}", Brought(PARIS)),
        (f"{CALL}<|end|><|start|>assistant{CALL}",
         Brought("", "", calls(("get_weather", PARIS), ("get_weather", PARIS)))),
        (f"{CALL[:-1]}, x}}", Brought("x}", "", calls(("get_weather", '{"city": "Paris", ')))),
        # what is no message, or to nobody who is there, is content as it stands
        ("", Brought()),
        ("tomorrow", Brought("tomorrow")),
        (" and so on", Brought(" and so on")),
        ("<|channel|>final", Brought("<|channel|>final")),
        ("<|channel|>other<|message|>x", Brought("<|channel|>other<|message|>x")),
        ("<|start|>user<|message|>x", Brought("<|start|>user<|message|>x")),
        ("<|channel|>commentary to=functions.other json<|message|>{}",
         Brought("<|channel|>commentary to=functions.other json<|message|>{}")),
        ("<|channel|>final" + " " * 300 + "<|message|>x", Brought("<|channel|>final" + " " * 300 + "<|message|>x")),
        (f"{FINAL}one<|end|>two", Brought("onetwo")),
    ],
)  # fmt: skip
def test_messages_are_told_by_their_channels(text, expected):
    assert read(text, SYNTAX) == expected
    assert read(text, SYNTAX, *range(1, len(text))) == expected


def test_thoughts_may_stay_in_the_content():
    whole = f"{THOUGHT}<|start|>assistant{FINAL}Hello."
    assert read(whole, AnswerSyntax(channels=True, shows_thoughts=True)) == Brought("Hm.\n\nHello.")


def test_arguments_and_thoughts_come_as_they_are_written():
    reader = AnswerReader(SYNTAX, lambda: "id")
    assert reader.feed("<|channel|>analysis<|message|>Hm, so") == Brought("", "Hm, so")
    assert reader.feed(f"<|end|><|start|>assistant<|channel|>commentary {TO} json<|mess") == Brought()
    first = CallPart(index=0, id="id", name="get_weather", arguments='{"ci')
    assert reader.feed('age|>{"ci') == Brought("", "", (first,))
    assert reader.feed('ty": 1}') == Brought("", "", (CallPart(index=0, arguments='ty": 1}'),))
    assert reader.has_calls


def test_an_answer_of_one_call_is_done_behind_it():
    reader = AnswerReader(AnswerSyntax(channels=True, tools=SYNTAX.tools, at_most_one_call=True))
    assert reader.feed(f"{CALL}<|end|>and").text == ""
    assert reader.is_done


CONTROL = [*harmony.MARKS, "<|call|>", "<|return|>"]
LIMITS = Limits(
    vocab_size=256 + len(CONTROL), max_prefill_length=2048, cache_length=4096, slots=1, prefill_chunk=128, page_rows=16,
    pages=256, table_entries=256, tokens_per_step=1,
)  # fmt: skip


def test_a_tokenizer_with_these_control_tokens():
    """From a chat to the prompt's tokens, and from an answer's tokens to what it holds, by the model's template."""
    stops = frozenset(256 + CONTROL.index(mark) for mark in ("<|call|>", "<|return|>"))
    backend = byte_level_bpe([*TOKENS, *CONTROL], [], split="gpt-2", control_ids=[*range(256, 256 + len(CONTROL))])
    tokenizer = Tokenizer(
        backend, vocab_size=LIMITS.vocab_size, bos_id=None, eos_id=None, stop_ids=stops, first_ids=[],
        chat_template=ChatTemplate(templates.HARMONY, {}),
    )  # fmt: skip
    chat = Chat.of([{"role": "user", "content": "Hi"}])

    begun = Chat(turns=(*chat.turns, Turn(role="assistant", content="So")), add_generation_prompt=False,
                 continue_final_message=True)  # fmt: skip
    prompt = prompt_of(ChatCall(chat=begun, grammar=YES), tokenizer, LIMITS, ChatConfig())
    assert tokenizer.decode(prompt.token_ids, with_control=True).endswith(FINAL + "So")
    assert prompt.grammar == YES
    assert prompt.syntax == AnswerSyntax(channels=True, goes_on=True)

    def told(answer, *tools):
        call = ChatCall(chat=Chat(turns=chat.turns, tools=tools))
        prompt = prompt_of(call, tokenizer, LIMITS, ChatConfig())
        assert prompt.token_ids[-len("assistant") - 1] == tokenizer.control_id("<|start|>")
        assert prompt.syntax is not None
        text = Text(tokenizer.stream(prompt.syntax.marks), (), reader=AnswerReader(prompt.syntax))
        brought = Brought()
        for token_id in tokenizer.encode(answer):
            brought = brought.and_then(text.feed(token_id))
        return brought.and_then(text.finish())

    assert told(f"{THOUGHT}<|start|>assistant{FINAL}Hello.") == Brought("Hello.", "Hm.")
    brought = told(f"{THOUGHT}<|start|>assistant{CALL}", Tool(name="get_weather"))
    assert (brought.text, brought.reasoning) == ("", "Hm.")
    assert [(call.name, call.arguments) for call in brought.calls] == [("get_weather", PARIS)]


SNIPPETS = [*harmony.MARKS, *harmony.CHANNELS, "assistant", "to=functions.get_weather", "to=functions.x", " ", "\n"]
SNIPPETS += ["json", PARIS, "{", "}", "x", THOUGHT, FINAL, CALL]
TEXTS = st.lists(st.sampled_from(SNIPPETS), max_size=14).map("".join)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.builds(AnswerSyntax, channels=st.just(True), tools=st.just(SYNTAX.tools), shows_thoughts=st.booleans(),
                        at_most_one_call=st.booleans()), st.data())  # fmt: skip
def test_where_the_pieces_end_changes_nothing(text, asked, data):
    whole = read(text, asked)
    assert read(text, asked, *range(1, len(text))) == whole
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=5))
    assert read(text, asked, *cuts) == whole


WEATHER = Tool(name="get_weather", parameters=json.dumps({"type": "object", "properties": {"city": {"maxLength": 9}}}))
YES = Grammar.of_choices(["Yes"])


@cache
def tokenizer():
    """A token is a byte; the control tokens are behind them."""
    made: Any = Bytes([*harmony.MARKS])
    return llguidance.LLTokenizer(made, slices=[])


def control_id(text):
    return 257 + harmony.MARKS.index(text) if text in harmony.MARKS else None


def tokens_of(text):
    tokens = list(text.encode())
    for mark in harmony.MARKS:
        raw, at = list(mark.encode()), 0
        while at < len(tokens):
            if tokens[at : at + len(raw)] == raw:
                tokens[at : at + len(raw)] = [control_id(mark)]
            at += 1
    return tokens


def takes(grammar, text, *, as_tokens=True):
    following = llguidance.LLMatcher(tokenizer(), grammar.text)
    assert not following.is_error(), following.get_error()
    tokens = tokens_of(text) if as_tokens else list(text.encode())
    return following.try_consume_tokens(tokens) == len(tokens) and following.is_accepting()


@pytest.mark.parametrize("as_tokens", [True, False])
def test_grammars_know_channels(as_tokens):
    """Whether the marks are control tokens or texts."""
    ids = control_id if as_tokens else lambda text: None
    must, after = must_call([WEATHER], SYNTAX, 9, ids), after_thought(AnswerSyntax(channels=True), YES, ids)
    may = may_call([WEATHER], SYNTAX, 9, YES, ids)
    thought = THOUGHT + "<|start|>assistant"
    for grammar, texts, others in (
        (must, [CALL, thought + CALL], [FINAL + "Yes", "Yes", PARIS, CALL.replace("Paris", "x" * 10), f"{CALL}{CALL}"]),
        (after, [FINAL + "Yes", thought + FINAL + "Yes"], ["Yes", FINAL + "No", CALL, thought]),
        (may, [FINAL + "Yes", CALL, thought + CALL, thought + FINAL + "Yes"], [FINAL + "No", "Yes"]),
    ):
        for text in texts:
            assert takes(grammar, text, as_tokens=as_tokens), text
        for text in others:
            assert not takes(grammar, text, as_tokens=as_tokens), text


ENDED = " so.<|end|><|start|>assistant"
GOES_ON = AnswerSyntax(channels=True, tools=SYNTAX.tools, goes_on=True)


def test_a_message_that_goes_on_ends_before_another_begins():
    after = after_thought(AnswerSyntax(channels=True, goes_on=True), YES, control_id)
    must, may = must_call([WEATHER], GOES_ON, 9, control_id), may_call([WEATHER], GOES_ON, 9, YES, control_id)
    strict = strict_if_called([WEATHER], {"get_weather"}, GOES_ON, 9, control_id)
    assert strict is not None
    wrong = CALL.replace("Paris", "x" * 10)
    for grammar, texts, others in (
        (after, ["Yes"], [FINAL + "Yes", "No", f"{ENDED}{FINAL}Yes"]),
        (must, [ENDED + CALL, f"{ENDED}{THOUGHT}<|start|>assistant{CALL}"], [CALL, "Yes", ENDED + wrong]),
        (may, ["Yes", ENDED + CALL], [FINAL + "Yes", CALL, "No", f"{ENDED}{FINAL}Yes"]),
        (strict, ["Any text", ENDED + CALL, f"{ENDED}{FINAL}x"], [FINAL + "x", CALL, ENDED + wrong]),
    ):
        for text in texts:
            assert takes(grammar, text), text
        for text in others:
            assert not takes(grammar, text), text
    assert read(ENDED + CALL, GOES_ON) == ONE._replace(text=" so.")
    assert read("to=x, I mean", GOES_ON) == Brought("to=x, I mean")


def test_strict_tools_hold_in_free_text():
    grammar = strict_if_called([WEATHER], {"get_weather"}, SYNTAX, 9, control_id)
    assert grammar is not None
    said = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    for text in (FINAL + "Any text.", CALL, f"{THOUGHT}<|start|>assistant{said}{CALL}", said + FINAL + "x"):
        assert takes(grammar, text), text
    for text in ("Any text.", CALL.replace("Paris", "x" * 10), CALL.replace("get_weather", "x")):
        assert not takes(grammar, text), text
    assert strict_if_called([WEATHER], {"get_weather"}, SYNTAX, 9, lambda text: None) is None


@pytest.mark.parametrize("seed", range(3))
def test_whatever_a_grammar_takes_is_read_as_a_call(seed):
    following = llguidance.LLMatcher(tokenizer(), must_call([WEATHER], SYNTAX, 9, control_id).text)
    chance, written, mask = random.Random(seed), "", masks.allocate_token_bitmask(1, tokenizer().vocab_size)
    while not following.is_accepting():
        masks.fill_next_token_bitmask(following, mask)
        able = [t for t in (*range(0x20, 0x7F), *range(257, 262)) if mask[0, t // 32] >> (t % 32) & 1]
        token = chance.choice(able)
        assert following.consume_token(token)
        written += chr(token) if token < 257 else harmony.MARKS[token - 257]
        assert len(written) < 3000
    (call,) = read(written, SYNTAX).calls
    assert isinstance(json.loads(call.arguments), dict)
