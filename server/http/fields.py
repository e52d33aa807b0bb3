"""Kinds of fields that OpenAI's bodies are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, FailFast, Tag
from pydantic_core import PydanticCustomError

from ..request.request import MAX_PARTS, MAX_PROMPTS
from .errors import BadFieldError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Of messages, and what chat templates call them: OpenAI renamed system, models did not."""


class Strict(BaseModel):
    """Takes no "3" for 3."""

    model_config = ConfigDict(strict=True)


def kind_of(value: Any) -> str | None:
    """Which branch of a union a JSON value is for; None: of none."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    if value and isinstance(value[0], int):
        return "<ids>"
    return "<lists>" if value and isinstance(value[0], list) else "<items>"


def one_of(expected: str) -> Discriminator:
    """Chooses by kind_of(); `expected` tells what there is to choose from."""
    return Discriminator(kind_of, custom_error_type="kind", custom_error_message=f"must be {expected}")


class FirstError(FailFast):
    """Ends a list's check at its first wrong item. As a part of a type in a union it has to be hashable."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return id(type(self))


def at_most(count: int) -> BeforeValidator:
    """Refuses what is longer before its items are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            lengths = {"has": len(value), "may": count}
            raise PydanticCustomError("too_long", "has {has} entries and may have {may}; send fewer", lengths)
        return value

    return BeforeValidator(check)


def few(count: int) -> tuple[FirstError, BeforeValidator]:
    """For a list that is given up at its first wrong item, and at once when it has too many: no million is listed."""
    return FirstError(), at_most(count)


MAX_ITEMS = 1000
"""Of a list that an option bounds much lower (count)."""
MAX_IDS = 1 << 24
"""Of a prompt; what the engine takes is bounded elsewhere (tokens)."""

Texts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], *few(MAX_ITEMS), Tag("<items>")],
    one_of("a string, or a list of strings"),
]

Prompts = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], *few(MAX_PROMPTS), Tag("<items>")]
    | Annotated[list[int], *few(MAX_IDS), Tag("<ids>")]
    | Annotated[list[Annotated[list[int], *few(MAX_IDS)]], *few(MAX_PROMPTS), Tag("<lists>")],
    one_of("a string, a list of strings, a list of token ids, or a list of lists of token ids"),
]


class Part(Strict):
    """Of a message's content."""

    type: str
    text: str | None = None


class Message(Strict):
    """One turn of a conversation."""

    role: str
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[Part], *few(MAX_PARTS), Tag("<items>")],
        one_of("a string, or a list of text parts"),
    ]

    def turn(self, at: str) -> dict[str, str]:
        """As chat templates take it. `at`: where the message stands. Raises BadFieldError."""
        if self.role not in ROLES:
            raise BadFieldError(
                f"{at}.role", f"{at}.role={self.role!r} must be one of {', '.join(ROLES)}; there are no tools"
            )
        if isinstance(self.content, str):
            return {"role": ROLES[self.role], "content": self.content}
        texts = []
        for number, part in enumerate(self.content):
            if part.type != "text" or part.text is None:
                where = f"{at}.content[{number}]"
                raise BadFieldError(where, f"{where} of type {part.type!r} is not supported; send text alone")
            texts.append(part.text)
        return {"role": ROLES[self.role], "content": "\n".join(texts)}


class StreamOptions(Strict):
    """What a stream brings beside the answer."""

    include_usage: bool = False
