"""What chat and generate make of a conversation and its options, without a server."""

from typing import Any

from slipstream.cli.chat import Chat
from slipstream.cli.form import FormFlags
from slipstream.cli.offline import answer
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.text.chat import Turn
from slipstream.server.dialects.parts import CallPart
from slipstream.server.request.events import Event, FinishReason
from slipstream.server.request.options import AnswerOptions

from tests.fakes import CONTROL, FakeEngine

CALL = CallPart(index=0, id="c", name="look", arguments="{}")


class Model:
    """Calls a tool, and refuses or answers what the tool gives."""

    def __init__(self, *, refuses):
        self.refuses, self.asked = refuses, []

    def ask_chat(self, call, options, form):
        self.asked.append([turn.role for turn in call.chat.turns])
        if call.chat.turns[-1].role == "user":
            yield Event(calls=(CALL,), finish_reason=FinishReason.TOOL_CALLS)
        elif self.refuses:
            raise RefusedError("too long")
        else:
            yield Event(text="seen", finish_reason=FinishReason.STOP)


def told(model: Any, monkeypatch):
    """The conversation behind one question."""
    monkeypatch.setattr("builtins.input", lambda prompt: "a text")
    turns: list[Turn] = []
    Chat(answer=AnswerOptions(), form=FormFlags())._turn(model, turns, "look")
    return turns


def test_what_a_tool_gives_goes_to_the_model_and_stays(monkeypatch):
    turns = told(model := Model(refuses=False), monkeypatch)
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert (turns[2].content, turns[2].name, turns[2].call_id, turns[3].content) == ("a text", "look", "c", "seen")
    assert model.asked == [["user"], ["user", "assistant", "tool"]]


def test_a_call_whose_result_is_refused_does_not_stay_without_it(monkeypatch):
    assert told(Model(refuses=True), monkeypatch) == []


def test_a_stop_string_that_is_a_control_token_ends_an_answer_without_a_server():
    options = AnswerOptions(max_tokens=20, stop_strings=(CONTROL,))
    engine: Any = FakeEngine()
    *_, (whole,) = answer(engine, None, [[ord("a")]], options)
    (sample,) = whole.samples
    assert (sample.text, sample.finish_reason) == ("bcd", "stop")
