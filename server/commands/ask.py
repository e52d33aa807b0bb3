"""slipstream ask"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from ..channel import PLAIN, ChannelConfig
from ..options import AnswerOptions

if TYPE_CHECKING:
    from ..client import Piece

DEFAULT_TARGET = "localhost:9000"


@dataclass(frozen=True)
class Ask:
    """Ask a running server one question; the answer streams to the terminal."""

    question: tyro.conf.Positional[str]
    """The question, in quotes."""
    answer: AnswerOptions
    target: str = DEFAULT_TARGET
    """The server's address (host:port)."""
    raw: bool = False
    """Send the text as it is, without the model's chat template."""
    channel: ChannelConfig = PLAIN

    def run(self) -> int:
        from ..client import Client

        ask = self.answer.max_tokens, self.answer.sampling()
        with Client(self.target, self.channel) as client:
            if self.raw:
                print_stream(client.ask_text(self.question, *ask))
            else:
                print_stream(client.ask_chat([{"role": "user", "content": self.question}], *ask))
        return 0


def print_stream(pieces: "Iterable[Piece]") -> None:
    """Prints an answer as it comes, and ends the line whatever happens."""
    started = False
    try:
        for piece in pieces:
            started = started or bool(piece.text)
            print(piece.text, end="", flush=True)
    finally:
        if started:
            print(flush=True)
