"""slipstream ask"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from ..engine_impl.errors import RefusedError
from ..server.grpc.channel import DEFAULT_TARGET, PLAIN, ChannelConfig
from ..server.request.options import AnswerOptions
from .conversation import ALONE, Conversation
from .form import FormFlags
from .show import print_growing

if TYPE_CHECKING:
    from ..server.grpc.client import Client
    from ..server.request.answer import Answer


@dataclass(frozen=True)
class Ask:
    """Ask a running server one question; the answer streams to the terminal."""

    question: tyro.conf.Positional[str]
    """The question, in quotes."""
    answer: AnswerOptions
    form: FormFlags
    conversation: Conversation = ALONE
    target: str = DEFAULT_TARGET
    """The server's address (host:port)."""
    raw: bool = False
    """Send the text as it is, without the model's chat template."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object instead, when the answer is whole: token ids, text, finish reason, times (ms)."""
    channel: ChannelConfig = PLAIN

    def __post_init__(self) -> None:
        if self.raw and self.conversation != ALONE:
            raise RefusedError("--raw sends a text alone; leave --system, --file and --tools out, or --raw")

    def run(self) -> int:
        from ..server.grpc.client import Client

        with Client(self.target, self.channel) as client:
            growing = self._growing(client)
            if self.as_json:
                *_, (answer,) = growing
                print(json.dumps(answer.as_json()), flush=True)
            else:
                print_growing(growing, [self.question])
        return 0

    def _growing(self, client: "Client") -> "Iterator[list[Answer]]":
        from ..server.request.answer import Answer

        answer, form = Answer.of(self.answer.num_samples), self.form.form()
        if self.raw:
            pieces = client.ask_text(self.question, self.answer, form)
        else:
            turns = [*self.conversation.opening(), self.conversation.question(self.question)]
            pieces = client.ask_chat(self.conversation.call(turns), self.answer, form)
        for piece in pieces:
            answer.grow(piece)
            yield [answer]
