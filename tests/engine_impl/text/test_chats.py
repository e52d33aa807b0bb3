"""Conversations with tools, calls and results, through templates of the forms that there are."""

import json
from dataclasses import replace

import pytest
from slipstream.engine_impl.checkpoints.open import open_checkpoint
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.text.chat import Call, Chat, TemplateFacts, Tool, Turn
from slipstream.engine_impl.text.chat_template import ChatTemplate, render
from slipstream.engine_impl.text.template_facts import examine
from slipstream.engine_impl.text.templates import written

from tests.engine_impl.text import templates

SPECIAL = (("bos_token", "<s>"),)
TOOL = Tool(
    name="get_weather",
    description="Of a city.",
    parameters='{"type": "object", "properties": {"city": {"type": "string"}}}',
)
PARIS = Call(id="call_0123456789", name="get_weather", arguments='{"city": "Pariß"}')
ROME = Call(id="call_abcdefghij", name="get_weather", arguments='{"city": "Rome"}')
HI, BYE = Turn(role="user", content="Hi"), Turn(role="user", content="Bye")


def result(call, text):
    return Turn(role="tool", content=text, call_id=call.id, name=call.name)


WHOLE = (
    HI,
    Turn(role="assistant", content="Let me see.", calls=(PARIS, ROME)),
    result(PARIS, "Sunny"),
    result(ROME, "Rain"),
    Turn(role="assistant", content="Sun, then rain."),
    BYE,
)
TEXTS = ["Hi", "Let me see.", "Pariß", "Rome", "Sunny", "Rain", "Sun, then rain.", "Bye", "Of a city."]

NATIVE = {
    "hermes": templates.HERMES,
    "llama": templates.LLAMA,
    "mistral": templates.MISTRAL,
    "gemma": templates.GEMMA,
    "harmony": templates.HARMONY,
}


def rendered(source, chat, facts=None):
    return render(source, SPECIAL, chat, facts or examine(source, SPECIAL))


@pytest.mark.parametrize("tool_format", NATIVE)
def test_a_templates_form_is_found_by_trying_it(tool_format):
    facts = examine(NATIVE[tool_format], SPECIAL)
    assert (facts.tool_format, facts.writes_tools) == (tool_format, True)
    assert facts.writes_several_calls == (tool_format not in ("llama", "harmony"))
    assert facts.writes_text_beside_calls == (tool_format in ("hermes", "gemma"))
    assert facts.think_tags == (("<think>", "</think>") if tool_format == "hermes" else None)


@pytest.mark.parametrize(
    ("source", "writes_tools"),
    [
        (templates.PLAIN, False),
        (templates.NO_SYSTEM, False),
        (templates.LOSES_CALLS, False),
        (templates.OTHER_FORM, True),
        ("{{ nonsense", False),
        ("{% for i in range(10000000) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}", False),
    ],
)
def test_no_known_form(source, writes_tools):
    facts = examine(source, SPECIAL)
    assert (facts.tool_format, facts.writes_tools) == (None, writes_tools)


def test_a_template_that_takes_too_long_counts_as_one_that_knows_nothing(monkeypatch):
    monkeypatch.setattr("slipstream.engine_impl.text.chat_template.WORKERS._seconds", 0.5)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert ChatTemplate(endless, {}).facts == TemplateFacts()


@pytest.mark.parametrize("tool_format", NATIVE)
def test_nothing_of_a_conversation_is_dropped(tool_format):
    """Llama's templates refuse two calls in a turn, and both Llama's and Mistral's leave out a text beside calls."""
    text = rendered(NATIVE[tool_format], Chat(turns=WHOLE, tools=(TOOL,)))
    assert [one for one in TEXTS if one not in text] == []
    assert text.index("Let me see.") < text.index("Pariß") < text.index("Sunny") < text.index("Sun, then rain.")
    if tool_format == "llama":
        assert text.index("Sunny") < text.index("Rome") < text.index("Rain")


@pytest.mark.parametrize("source", [templates.PLAIN, templates.NO_SYSTEM])
@pytest.mark.parametrize("system", [(), (Turn(role="system", content="Be brief."),)])
def test_a_template_without_tools_gets_them_as_text(source, system):
    chat = Chat(turns=(*system, *WHOLE), tools=(TOOL,), as_text=True)
    if system and source == templates.NO_SYSTEM:
        with pytest.raises(RefusedError, match="no system turns"):
            rendered(source, chat)
        return
    text = rendered(source, chat)
    assert [one for one in TEXTS if one not in text] == []
    assert text.count("<|user|>") == 3  # the question, both results, the last word
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pariß"}}\n</tool_call>' in text
    assert "<tool_response>\nSunny\n</tool_response>\n<tool_response>\nRain\n</tool_response>" in text
    assert '{"name": "get_weather", "description": "Of a city.", "parameters": {"type": "object", ' in text
    assert text.startswith("<|system|>Be brief.\n\n# Tools" if system else ("<|system|># Tools", "<|user|># Tools"))


def test_a_result_and_what_the_user_says_behind_it_are_one_turn():
    turns = (HI, Turn(role="assistant", calls=(PARIS,)), result(PARIS, "Sunny"), BYE)
    text = rendered(templates.NO_SYSTEM, Chat(turns=turns, as_text=True))
    assert text.endswith("<|user|><tool_response>\nSunny\n</tool_response>\nBye\n<|assistant|>")


def test_two_turns_of_the_user_stay_two():
    assert rendered(templates.PLAIN, Chat(turns=(HI, BYE), as_text=True)).count("<|user|>") == 2


def test_the_embedded_models_template_knows_no_tools():
    tokenizer = open_checkpoint("embedded").tokenizer()
    assert tokenizer.template_facts.tool_format is None
    text = tokenizer.render_chat(Chat(turns=WHOLE, tools=(TOOL,), as_text=True))
    assert [one for one in TEXTS if one not in text] == []
    assert text.startswith("<|im_start|>system\n# Tools\n")


def test_the_last_message_goes_on():
    chat = Chat(
        turns=(HI, Turn(role="assistant", content="It is ")), add_generation_prompt=False, continue_final_message=True
    )
    for source in (templates.PLAIN, templates.NO_SYSTEM, templates.LLAMA):
        assert rendered(source, chat).endswith("It is ")
    with pytest.raises(RefusedError, match="does not write the last message as it is"):
        rendered("{{ messages[0].content }}", chat)


def test_more_variables_and_documents():
    chat = Chat(turns=(HI,), template_kwargs='{"enable_thinking": false}')
    assert rendered(templates.HERMES, chat).endswith("<|assistant|><think>\n\n</think>\n\n")
    assert rendered(templates.HERMES, Chat(turns=(HI,), enable_thinking=False)).endswith("</think>\n\n")
    assert rendered(templates.PLAIN, Chat(turns=(HI,), enable_thinking=False)).endswith("<|assistant|>")
    documented = Chat(turns=(replace(HI, name="Bob"),), documents='[{"text": "A"}]')
    assert rendered(templates.NAMES, documented) == "<user Bob>Hi[A]"
    assert examine(templates.NAMES, ()).writes_names


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (Chat(turns=(HI,), template_kwargs='{"color": 1}'), "does not read 'color'; leave it out"),
        (Chat(turns=(HI,), enable_thinking=True), "does not read 'enable_thinking'"),
        (Chat(turns=(HI,), template_kwargs='{"tools": []}'), "'tools' has a field of its own"),
        (Chat(turns=(HI,), template_kwargs="[]"), "chat_template_kwargs must be a JSON object"),
        (Chat(turns=(HI,), template_kwargs="{"), "chat_template_kwargs are no JSON"),
        (Chat(turns=(HI,), documents="[1]"), "documents: the model's chat template does not read them"),
        (Chat(turns=(HI,), tools=(Tool(name="a", parameters="5"),)), "of the tool 'a' must be a JSON object"),
        (Chat(turns=(HI, Turn(role="assistant", calls=(Call(id="", name="a", arguments="{"),)))),
         "arguments of the call of 'a' are no JSON"),
        (Chat(turns=(HI, Turn(role="assistant", calls=(Call(id="", name="a", arguments="[" * 9999),)))),
         "arguments of the call of 'a' are no JSON"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_read_is_refused(chat, message):
    with pytest.raises(RefusedError, match=message):
        rendered(templates.PLAIN, chat)


def test_mistrals_ids_have_nine_letters_and_belong_together():
    text = rendered(templates.MISTRAL, Chat(turns=(HI, Turn(role="assistant", calls=(PARIS,)), result(PARIS, "5"))))
    (call_id,) = {json.loads(text[text.index('{"content"') : text.index("[/TOOL_RESULTS]")])["call_id"]}
    assert len(call_id) == 9
    kept = Call(id="abcdefgh1", name="a", arguments="")
    text = rendered(templates.MISTRAL, Chat(turns=(HI, Turn(role="assistant", calls=(kept,)), result(kept, "5"))))
    assert '"call_id": "abcdefgh1"' in text


def test_a_template_that_writes_without_end_is_stopped_whatever_it_was_given():
    with pytest.raises(Exception, match="writes more than 10 characters"):
        written("{{ 'x' * 11 }}", {}, 10)


def test_a_thought_before_a_call_is_given_as_its_template_takes_it():
    """gpt-oss' takes one text before a call, and calls it a thought; it is left out once there is an answer behind."""
    turns = (
        HI,
        Turn(role="assistant", content="Let me see.", reasoning="Where?", calls=(PARIS,)),
        result(PARIS, "Sunny"),
        Turn(role="assistant", reasoning="Then?", calls=(ROME,)),
        result(ROME, "Rain"),
    )
    text = rendered(templates.HARMONY, Chat(turns=turns, tools=(TOOL,)))
    assert "type get_weather = (_: {\ncity?: string,\n}) => any;" in text
    before = "<|start|>assistant<|channel|>"
    call = "<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>"
    assert f"{before}final<|message|>Let me see.<|end|>{before}analysis<|message|>Where?<|end|>{call}" in text
    assert f"{before}analysis<|message|>Then?<|end|>{call}" in text
    answered = (*turns[:-2], replace(turns[-2], content="I ask.", reasoning=""), result(ROME, "Rain"))
    assert f"{before}final<|message|>I ask.<|end|>{call}" in rendered(templates.HARMONY, Chat(turns=answered))
    assert text.endswith("<|start|>assistant")
    going_on = Chat(turns=(HI, Turn(role="assistant", content="So")), add_generation_prompt=False,
                    continue_final_message=True)  # fmt: skip
    assert rendered(templates.HARMONY, going_on).endswith("final<|message|>So")


def test_channels_without_tools_are_channels_all_the_same():
    facts = examine(
        "{% for m in messages %}<|start|>{{ m.role }}<|channel|>final<|message|>{{ m.content }}{% endfor %}", ()
    )
    assert (facts.tool_format, facts.writes_tools) == ("harmony", False)


def test_how_long_to_think_is_told_where_the_template_reads_it():
    def asked(source, effort):
        return rendered(source, Chat(turns=(HI,), reasoning_effort=effort))

    assert "Reasoning: high" in asked(templates.HARMONY, "high")
    assert "Reasoning: none" in asked(templates.HARMONY, "none")
    assert "Reasoning: medium" in asked(templates.HARMONY, "")
    assert asked(templates.HERMES, "none").endswith("</think>\n\n")
    assert asked(templates.PLAIN, "none") == asked(templates.PLAIN, "")
    with pytest.raises(RefusedError, match="reasoning_effort='high': the model's chat template does not read it"):
        asked(templates.HERMES, "high")
