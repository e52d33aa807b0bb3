"""Turns of a conversation, as Anthropic has them: a user's may hold what tools gave, an assistant's calls of tools."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Tag

from ...request.limits import MAX_PARTS
from ..errors import BadFieldError
from ..fields import JsonObject, Part, Strict, few, one_of
from ..translated import call

ROLES = ("user", "assistant")
FAILED = "Error: "
"""Before what a tool gave that failed: chats have no other place to say so."""

Text = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], *few(MAX_PARTS), Tag("<items>")],
    one_of("a string, or a list of text blocks"),
]


class Block(Part):
    """Of a turn: a text, a call, or what a call gave."""

    id: str | None = None
    name: str | None = None
    input: JsonObject | None = None
    tool_use_id: str | None = None
    content: Text | None = None
    is_error: bool | None = None


class Turn(Strict):
    """One of them."""

    role: str
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[Block], *few(MAX_PARTS), Tag("<items>")],
        one_of("a string, or a list of blocks"),
    ]

    def turns(self, at: str) -> Iterator[dict[str, Any]]:
        """As a chat has it: what a tool gave is a turn of its own. `at`: where it stands. Raises BadFieldError."""
        if self.role not in ROLES:
            raise BadFieldError(f"{at}.role", f"{at}.role={self.role!r:.80} must be {' or '.join(ROLES)}")
        if isinstance(self.content, str):
            yield {"role": self.role, "content": self.content}
            return
        texts, calls, has_results = list[str](), list[dict[str, Any]](), False
        for number, block in enumerate(self.content):
            where = f"{at}.content[{number}]"
            match self.role, block.type:
                case "assistant", "tool_use":
                    given = (given_in(block, where, name) for name in ("id", "name", "input"))
                    calls.append(call(*given))
                case "user", "tool_result":
                    if texts:
                        yield {"role": self.role, "content": "\n".join(texts)}
                    texts, has_results = [], True
                    yield result(block, where)
                case _:
                    texts.append(text_of(block, where))
        if texts or not (calls or has_results):
            yield {"role": self.role, "content": "\n".join(texts), **({"tool_calls": calls} if calls else {})}
        elif calls:
            yield {"role": self.role, "content": None, "tool_calls": calls}


def result(block: Block, at: str) -> dict[str, Any]:
    """What a tool gave, as a turn of a chat."""
    content = "" if block.content is None else joined(f"{at}.content", block.content)
    call_id = given_in(block, at, "tool_use_id")
    return {"role": "tool", "tool_call_id": call_id, "content": f"{FAILED}{content}" if block.is_error else content}


def given_in(block: Block, at: str, name: str) -> str:
    """A field. Raises BadFieldError for one that is missing."""
    if (value := getattr(block, name)) is None:
        raise BadFieldError(f"{at}.{name}", f"{at}.{name} is missing")
    return value


def joined(where: str, content: str | Sequence[Part]) -> str:
    """Raises BadFieldError for a block that is no text."""
    if isinstance(content, str):
        return content
    return "\n".join(text_of(block, f"{where}[{number}]") for number, block in enumerate(content))


def text_of(block: Part, at: str) -> str:
    """Raises BadFieldError for a block that is none."""
    if block.type != "text" or block.text is None:
        raise BadFieldError(at, f"{at} of type {block.type!r:.80} is not supported here; send text")
    return block.text
