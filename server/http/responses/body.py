"""What clients of /v1/responses send."""

from typing import Annotated, Any, ClassVar

from pydantic import Tag

from ...config import AUTO
from ...request.limits import MAX_MESSAGES
from ..bodies import ChatBody
from ..errors import BadFieldError
from ..fields import MAX_ITEMS, few, one_of
from ..translated import TranslatedBody, as_chat
from .asked import Choice, FlatTool, NamedFunction, Reasoning, TextOptions
from .items import Item

Input = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Item], *few(MAX_MESSAGES), Tag("<items>")],
    one_of("a string, or a list of messages"),
]


class ResponsesBody(TranslatedBody):
    """POST /v1/responses. Nothing is kept: whatever asks for an earlier response is refused."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
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
    names: ClassVar[dict[str, str]] = {
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
        "response_format.type": "text.format.type",
    }

    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    tools: Annotated[list[FlatTool], *few(MAX_ITEMS)] = []  # noqa: RUF012
    tool_choice: Choice = AUTO
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    metadata: dict[str, str] = {}  # noqa: RUF012

    def chat(self) -> ChatBody:
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            field = "max_output_tokens"
            raise BadFieldError(field, f"{field}={self.max_output_tokens} must be at least 1, or left out")
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFunction):
            choice = {"type": "function", "function": {"name": choice.name}}
        return as_chat(
            messages=self._turns(),
            tools=[tool.tool(f"tools[{at}]") for at, tool in enumerate(self.tools)],
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=self.reasoning.effort,
            response_format=self.text.response_format(),
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )

    def _turns(self) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        if self.instructions is not None:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*turns, {"role": "user", "content": self.input}]
        for at, item in enumerate(self.input):
            item.add_to(turns, f"input[{at}]")
        return turns
