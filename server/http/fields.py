"""Kinds of fields that OpenAI's bodies are made of."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, FailFast, Tag
from pydantic_core import PydanticCustomError

from ...engine_impl.text.chat import NO_ARGUMENTS, Call, Tool, Turn
from ..request.chat import ROLES
from ..request.limits import MAX_PARTS, MAX_PROMPTS
from .errors import BadFieldError, shown


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
MAX_CALLS = 1000
"""Of tools, in one message (count)."""
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


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], *few(MAX_PARTS), Tag("<items>")],
    one_of("a string, or a list of text parts"),
]


def text_of(content: str | list[Part] | None, at: str) -> str:
    """`at`: where it stands. Raises BadFieldError for parts that are no text."""
    if not isinstance(content, list):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        if part.type != "text" or part.text is None:
            where = f"{at}[{number}]"
            raise BadFieldError(where, f"{where} of type {part.type!r:.80} is not supported; send text alone")
        texts.append(part.text)
    return "\n".join(texts)


class Prediction(Strict):
    """OpenAI's predicted output."""

    type: str
    content: Content

    @property
    def text(self) -> str:
        """Raises BadFieldError."""
        if self.type != "content":
            raise BadFieldError("prediction.type", f"prediction.type={self.type!r:.80} must be 'content'")
        return text_of(self.content, "prediction.content")


class CalledFunction(Strict):
    """Of a call."""

    name: str
    arguments: str = ""


class ToolCall(Strict):
    """Of an assistant's message."""

    id: str = ""
    type: str = "function"
    function: CalledFunction


class Message(Strict):
    """One turn of a conversation."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "function_call": (),
        "prefix": (False,),
        "partial": (False,),
        "audio": (),
        "refusal": ("",),
    }
    """Fields that would change the answer and that we lack, with the values that ask for nothing."""

    role: str
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall], *few(MAX_CALLS)] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    prefix: Any = None
    partial: Any = None
    audio: Any = None
    refusal: Any = None

    def turn(self, at: str) -> Turn:
        """`at`: where the message stands. Raises BadFieldError."""
        for name, neutral in self.refused.items():
            if (value := getattr(self, name)) is not None and value not in neutral:
                raise BadFieldError(f"{at}.{name}", f"{at}.{name}={shown(value)} is not supported; leave it out")
        if self.content is None and not self.tool_calls:
            raise BadFieldError(f"{at}.content", f"{at}.content is missing; send a string, or a list of text parts")
        return Turn(
            role=ROLES.get(self.role, self.role),
            content=text_of(self.content, f"{at}.content"),
            name=self.name or "",
            reasoning=self.reasoning_content or self.reasoning or "",
            calls=tuple(self._calls(at)),
            call_id=self.tool_call_id or "",
        )

    def _calls(self, at: str) -> Iterator[Call]:
        for number, call in enumerate(self.tool_calls or ()):
            if call.type != "function":
                where = f"{at}.tool_calls[{number}].type"
                raise BadFieldError(where, f"{where}={call.type!r:.80} is not supported; only functions are called")
            yield Call(id=call.id, name=call.function.name, arguments=call.function.arguments)


def as_json(expected: type) -> BeforeValidator:
    """Makes of an object, or a list, its JSON text: there it is one string, and no million objects."""

    def check(value: Any) -> str:
        if not isinstance(value, expected):
            kind = "an object" if expected is dict else "a list"
            raise PydanticCustomError("kind", "must be {kind}", {"kind": kind})
        return json.dumps(value, ensure_ascii=False)

    return BeforeValidator(check)


JsonObject = Annotated[str, as_json(dict)]
JsonList = Annotated[str, as_json(list)]


class Function(Strict):
    """Of a tool."""

    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ToolDefinition(Strict):
    """What the model may call."""

    type: str
    function: Function | None = None

    def tool(self, at: str) -> Tool:
        """`at`: where it stands. Raises BadFieldError."""
        if self.type != "function" or self.function is None:
            raise BadFieldError(at, f"{at} of type {self.type!r:.80} is not supported; send functions alone")
        return Tool(
            name=self.function.name,
            description=self.function.description or "",
            parameters=self.function.parameters or NO_ARGUMENTS,
        )


class NamedFunction(Strict):
    """Of a tool that is to be called."""

    name: str


class NamedTool(Strict):
    """The tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


def choice_of(value: Any) -> str | None:
    """As `kind_of`."""
    return {str: "<text>", dict: "<named>", NamedTool: "<named>"}.get(type(value))


ToolChoice = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[NamedTool, Tag("<named>")],
    Discriminator(
        choice_of,
        custom_error_type="kind",
        custom_error_message='must be none, auto, required, or {"type": "function", "function": {"name": ...}}',
    ),
]


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
"""How long a reasoning model shall think; OpenAI's words."""


class StreamOptions(Strict):
    """What a stream brings beside the answer."""

    include_usage: bool = False
