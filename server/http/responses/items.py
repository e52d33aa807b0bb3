"""Items of a conversation, as OpenAI's newer form has them: messages, calls of tools, and what those gave."""

from typing import Annotated, Any

from pydantic import Tag

from ...request.limits import MAX_PARTS
from ..errors import BadFieldError
from ..fields import Part, Strict, few, one_of
from ..translated import call

ROLES = ("system", "developer", "user", "assistant")
PARTS = ("input_text", "output_text", "text")
"""Kinds of content that are text."""

Text = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], *few(MAX_PARTS), Tag("<items>")],
    one_of("a string, or a list of text parts"),
]


class Item(Strict):
    """One of them, or what is refused."""

    type: str = "message"
    role: str | None = None
    content: Text | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Text | None = None

    def add_to(self, turns: list[dict[str, Any]], at: str) -> None:
        """As a chat has it: what the model writes in one go, text and calls, is one turn. `at`: where the item stands.
        Raises BadFieldError."""
        match self.type:
            case "message":
                turns.append(self._message(at))
            case "function_call":
                if not turns or turns[-1]["role"] != "assistant":
                    turns.append({"role": "assistant", "content": None})
                made = call(*(self._text(at, name) for name in ("call_id", "name", "arguments")))
                turns[-1].setdefault("tool_calls", []).append(made)
            case "function_call_output":
                call_id, output = self._text(at, "call_id"), self._text(at, "output")
                turns.append({"role": "tool", "tool_call_id": call_id, "content": output})
            case _:
                known = "messages, function_call and function_call_output"
                raise BadFieldError(f"{at}.type", f"{at}.type={self.type!r:.80} is not supported; send {known} alone")

    def _message(self, at: str) -> dict[str, Any]:
        if self.role not in ROLES:
            raise BadFieldError(f"{at}.role", f"{at}.role={self.role!r:.80} must be one of {', '.join(ROLES)}")
        return {"role": self.role, "content": self._text(at, "content")}

    def _text(self, at: str, name: str) -> str:
        """Of one field."""
        value = getattr(self, name)
        if value is None:
            raise BadFieldError(f"{at}.{name}", f"{at}.{name} is missing")
        if isinstance(value, str):
            return value
        for number, part in enumerate(value):
            if part.type not in PARTS or part.text is None:
                where = f"{at}.{name}[{number}]"
                raise BadFieldError(where, f"{where} of type {part.type!r:.80} is not supported; send text alone")
        return "\n".join(part.text for part in value)
