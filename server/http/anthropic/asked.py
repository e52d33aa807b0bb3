"""What clients of /v1/messages ask of an answer: tools, and its form. Each as a chat has it."""

from typing import Any

from pydantic import ConfigDict, Field

from ..errors import BadFieldError, shown
from ..fields import JsonObject, Strict, ToolDefinition
from ..forms import Schema
from ..translated import function

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""What a chat calls them."""


class OwnTool(Strict):
    """A tool that the caller runs."""

    type: str | None = None
    name: str
    description: str | None = None
    input_schema: JsonObject | None = None
    strict: bool | None = None

    def tool(self, at: str) -> ToolDefinition:
        """`at`: where it stands. Raises BadFieldError."""
        if self.type not in (None, "custom"):
            raise BadFieldError(
                f"{at}.type", f"{at}.type={self.type!r:.80} is not supported; send your own tools alone"
            )
        return function(self.name, self.description, self.input_schema, self.strict)


class Choice(Strict):
    """Whether the model calls tools."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool = False

    def tool_choice(self) -> Any:
        """Raises BadFieldError."""
        if self.type == "tool" and self.name is not None:
            return {"type": "function", "function": {"name": self.name}}
        if self.type not in CHOICES:
            known = f"{', '.join(CHOICES)}, or tool with a name"
            raise BadFieldError("tool_choice.type", f"tool_choice.type={self.type!r:.80} must be {known}")
        return CHOICES[self.type]


class OutputFormat(Strict):
    """What the answer must look like."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    type: str
    content: Schema | None = Field(None, alias="schema")

    def response_format(self, at: str) -> dict[str, Any]:
        """`at`: where it stands. Raises BadFieldError."""
        if self.type != "json_schema" or self.content is None:
            raise BadFieldError(f"{at}.type", f"{at}.type={self.type!r:.80} must be json_schema, with a schema")
        return {"type": self.type, "json_schema": {"schema": self.content}}


class OutputConfig(Strict):
    """Of the answer."""

    format: OutputFormat | None = None
    effort: Any = None

    def response_format(self) -> dict[str, Any] | None:
        """Raises BadFieldError."""
        if self.effort is not None:
            name = "output_config.effort"
            raise BadFieldError(name, f"{name}={shown(self.effort)} is not supported; leave it out")
        return None if self.format is None else self.format.response_format("output_config.format")
