"""What clients of /v1/responses ask of an answer: tools, and its form. Each as a chat has it, and as it was sent."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from ..errors import BadFieldError, shown
from ..fields import Effort, JsonObject, Strict, ToolDefinition
from ..forms import Schema
from ..translated import function


class FlatTool(Strict):
    """A function that the model may call."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    def tool(self, at: str) -> ToolDefinition:
        """`at`: where it stands. Raises BadFieldError."""
        if self.type != "function":
            raise BadFieldError(f"{at}.type", f"{at}.type={self.type!r:.80} is not supported; send functions alone")
        if self.name is None:
            raise BadFieldError(f"{at}.name", f"{at}.name is missing")
        return function(self.name, self.description, self.parameters, self.strict)

    def told(self) -> dict[str, Any]:
        """As it was sent."""
        return self.model_dump() | {"parameters": None if self.parameters is None else json.loads(self.parameters)}


class NamedFunction(Strict):
    """The tool that is to be called."""

    type: Literal["function"]
    name: str


def choice_of(value: Any) -> str | None:
    """As `kind_of`."""
    return {str: "<text>", dict: "<named>", NamedFunction: "<named>"}.get(type(value))


Choice = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[NamedFunction, Tag("<named>")],
    Discriminator(
        choice_of,
        custom_error_type="kind",
        custom_error_message='must be none, auto, required, or {"type": "function", "name": ...}',
    ),
]


class Format(Strict):
    """What the answer must look like. `strict` changes nothing: answers always follow the schema."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    type: str
    name: str | None = None
    description: str | None = None
    content: Schema | None = Field(None, alias="schema")
    strict: bool | None = None

    def response_format(self) -> dict[str, Any]:
        """Raises BadFieldError."""
        if self.type != "json_schema":
            return {"type": self.type}
        if self.content is None:
            raise BadFieldError("text.format.schema", "text.format.schema is missing")
        return {"type": self.type, "json_schema": {"schema": self.content}}


class TextOptions(Strict):
    """Of the answer's text."""

    format: Format | None = None
    verbosity: Any = None

    def response_format(self) -> dict[str, Any] | None:
        """Raises BadFieldError."""
        if self.verbosity not in (None, "medium"):
            name = "text.verbosity"
            raise BadFieldError(name, f"{name}={shown(self.verbosity)} is not supported; leave it out")
        return None if self.format is None else self.format.response_format()


class Reasoning(Strict):
    """How the model shall think. What it thinks is not shown, so it is not summed up either."""

    effort: Effort | None = None
    summary: None = None
    generate_summary: None = None
