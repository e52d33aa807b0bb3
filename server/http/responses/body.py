"""What clients of /v1/responses send."""

from typing import Annotated, Any, ClassVar

from pydantic import Tag

from ...request.request import MAX_MESSAGES, MAX_PARTS
from ..bodies import ChatBody
from ..errors import BadFieldError
from ..fields import Part, Strict, few, one_of
from ..translated import TranslatedBody, as_chat

ROLES = ("system", "developer", "user", "assistant")
PARTS = ("input_text", "output_text", "text")
"""Kinds of content that are text."""


class Item(Strict):
    """Of a conversation: a message, or what is refused."""

    type: str = "message"
    role: str | None = None
    content: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[list[Part], *few(MAX_PARTS), Tag("<items>")],
            one_of("a string, or a list of text parts"),
        ]
        | None
    ) = None

    def turn(self, at: str) -> dict[str, str]:
        """As a chat has it. Raises BadFieldError."""
        if self.type != "message":
            raise BadFieldError(f"{at}.type", f"{at}.type={self.type!r:.80} is not supported; send messages alone")
        if self.role not in ROLES:
            raise BadFieldError(f"{at}.role", f"{at}.role={self.role!r:.80} must be one of {', '.join(ROLES)}")
        if self.content is None:
            raise BadFieldError(f"{at}.content", f"{at}.content is missing")
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        for number, part in enumerate(self.content):
            if part.type not in PARTS or part.text is None:
                where = f"{at}.content[{number}]"
                raise BadFieldError(where, f"{where} of type {part.type!r:.80} is not supported; send text alone")
        return {"role": self.role, "content": "\n".join(part.text or "" for part in self.content)}


Input = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Item], *few(MAX_MESSAGES), Tag("<items>")],
    one_of("a string, or a list of messages"),
]


class ResponsesBody(TranslatedBody):
    """POST /v1/responses. Nothing is kept: whatever asks for an earlier response is refused."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "text": ({}, {"format": {"type": "text"}}),
        "reasoning": ({}, {"effort": "none"}),
        "include": ([],),
        "truncation": ("disabled",),
        "background": (False,),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "max_tool_calls": (),
        "top_logprobs": (0,),
        "context_management": ([],),
    }
    names: ClassVar[dict[str, str]] = {"max_tokens": "max_output_tokens", "messages": "input"}

    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    metadata: dict[str, str] = {}  # noqa: RUF012

    def chat(self) -> ChatBody:
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            field = "max_output_tokens"
            raise BadFieldError(field, f"{field}={self.max_output_tokens} must be at least 1, or left out")
        turns = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            turns.append({"role": "user", "content": self.input})
        else:
            turns += [item.turn(f"input[{at}]") for at, item in enumerate(self.input)]
        fields = {"max_completion_tokens": self.max_output_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return as_chat(messages=turns, **fields)
