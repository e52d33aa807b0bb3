"""slipstream chat"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine_impl.errors import RefusedError
from ..server.errors import UnavailableError
from ..server.grpc.channel import DEFAULT_TARGET, PLAIN, ChannelConfig
from ..server.request.options import AnswerOptions

if TYPE_CHECKING:
    from ..server.grpc.client import Client

HINT = "Ctrl-C stops an answer; /new starts over; Ctrl-D or /exit leaves."


@dataclass(frozen=True)
class Chat:
    """Talk with the model of a running server. Ctrl-C stops an answer; /new starts over; Ctrl-D or /exit leaves."""

    answer: AnswerOptions
    target: str = DEFAULT_TARGET
    """The server's address (host:port)."""
    system: str | None = None
    """Instructions to the model that precede the conversation (text)."""
    channel: ChannelConfig = PLAIN

    def __post_init__(self) -> None:
        self.answer.check_one_sample("a chat")

    def run(self) -> int:
        from ..server.grpc.client import Client

        print(HINT)
        with Client(self.target, self.channel) as client:
            messages = self._opening()
            while (line := read_line()) is not None:
                if line == "/new":
                    messages = self._opening()
                elif line:
                    self._turn(client, messages, line)
        return 0

    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _turn(self, client: "Client", messages: list[dict[str, str]], line: str) -> None:
        """Adds the question and what was answered to `messages`; nothing when the server refuses."""
        from ..server.request.answer import Answer, logprob_lines

        question = {"role": "user", "content": line}
        answer = Answer.of(1)
        try:
            for piece in client.ask_chat([*messages, question], self.answer):
                answer.grow(piece)
                print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except RefusedError as error:
            print(f"slipstream: {error}\nThe conversation may have grown too long: /new starts over.", file=sys.stderr)
            return
        except UnavailableError as error:  # the conversation is still here, and the server may come back
            print(f"slipstream: {error}", file=sys.stderr)
            return
        print()
        for line in logprob_lines(answer):
            print(line)
        messages += [question, {"role": "assistant", "content": answer.samples[0].text}]


def read_line() -> str | None:
    """The next line without blanks around it; None when the user leaves."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print(f"\n{HINT}")
            continue
        return None if line == "/exit" else line
