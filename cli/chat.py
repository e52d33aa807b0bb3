"""slipstream chat"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine_impl.errors import RefusedError
from ..engine_impl.text.chat import Call, Turn
from ..server.errors import UnavailableError
from ..server.grpc.channel import DEFAULT_TARGET, PLAIN, ChannelConfig
from ..server.request.options import AnswerOptions
from .conversation import ALONE, Conversation
from .form import FormFlags

if TYPE_CHECKING:
    from ..server.grpc.client import Client
    from ..server.request.answer import SampleText

HINT = "Ctrl-C stops an answer; /new starts over; Ctrl-D or /exit leaves."


@dataclass(frozen=True)
class Chat:
    """Talk with the model of a running server. Ctrl-C stops an answer; /new starts over; Ctrl-D or /exit leaves."""

    answer: AnswerOptions
    form: FormFlags
    conversation: Conversation = ALONE
    target: str = DEFAULT_TARGET
    """The server's address (host:port)."""
    channel: ChannelConfig = PLAIN

    def __post_init__(self) -> None:
        self.answer.check_one_sample("a chat")

    def run(self) -> int:
        from ..server.grpc.client import Client

        print(HINT)
        with Client(self.target, self.channel) as client:
            turns = self.conversation.opening()
            while (line := read_line("> ")) is not None:
                if line == "/new":
                    turns = self.conversation.opening()
                elif line:
                    self._turn(client, turns, line)
        return 0

    def _turn(self, client: "Client", turns: list[Turn], line: str) -> None:
        """Adds the question and what was answered to `turns`; nothing when the server refuses. Where the answer calls
        tools, the user tells what they give, and the model goes on."""
        is_first = all(turn.role == "system" for turn in turns)
        new = [self.conversation.question(line) if is_first else Turn(role="user", content=line)]
        while (sample := self._answered(client, [*turns, *new])) is not None:
            calls = tuple(Call(id=call.id, name=call.name, arguments=call.arguments) for call in sample.calls)
            calls = calls if sample.finish_reason == "tool_calls" else ()
            new.append(Turn(role="assistant", content=sample.text, calls=calls))
            if not calls:
                turns += new
                return
            for call in calls:
                result = read_line(f"{call.name} gives: ") or ""
                new.append(Turn(role="tool", content=result, name=call.name, call_id=call.id))

    def _answered(self, client: "Client", turns: list[Turn]) -> "SampleText | None":
        """The answer, shown as it comes; None when the server refuses."""
        from ..server.request.answer import Answer, logprob_lines

        answer, shown = Answer.of(1), 0
        (sample,) = answer.samples
        try:
            for piece in client.ask_chat(self.conversation.call(turns), self.answer, self.form.form()):
                answer.grow(piece)
                print(sample.shown[shown:], end="", flush=True)
                shown = len(sample.shown)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except RefusedError as error:
            print(f"slipstream: {error}\nThe conversation may have grown too long: /new starts over.", file=sys.stderr)
            return None
        except UnavailableError as error:  # the conversation is still here, and the server may come back
            print(f"slipstream: {error}", file=sys.stderr)
            return None
        print()
        for line in logprob_lines(answer):
            print(line)
        return sample


def read_line(prompt: str) -> str | None:
    """The next line without blanks around it; None when the user leaves."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print(f"\n{HINT}")
            continue
        return None if line == "/exit" else line
