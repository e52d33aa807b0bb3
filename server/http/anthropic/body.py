"""What clients of /v1/messages send."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ...config import AUTO, ChatConfig
from ...request.limits import MAX_MESSAGES, Limits
from ..bodies import ChatBody
from ..errors import BadFieldError
from ..fields import MAX_ITEMS, few
from ..translated import TranslatedBody, as_chat
from .asked import Choice, OutputConfig, OutputFormat, OwnTool
from .turns import Text, Turn, joined

if TYPE_CHECKING:
    from ....engine_impl.api import AnyEngine as Engine


class CountBody(TranslatedBody):
    """POST /v1/messages/count_tokens: a prompt alone."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "thinking": ({"type": "disabled"},),
        "mcp_servers": ([],),
        "container": (),
        "context_management": (),
    }
    names: ClassVar[dict[str, str]] = {"response_format": "output_config.format"}

    messages: Annotated[list[Turn], *few(MAX_MESSAGES)]
    system: Text | None = None
    tools: Annotated[list[OwnTool], *few(MAX_ITEMS)] = []  # noqa: RUF012
    tool_choice: Choice | None = None
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = None

    def chat(self) -> ChatBody:
        return as_chat(**self._prompt())

    def reply(self, engine: "Engine", config: ChatConfig) -> dict[str, Any]:
        """Raises RefusedError."""
        with self._own_names():
            (prompt,) = self.chat().prompts(engine.get_tokenizer(), Limits.of(engine), config)
        return {"input_tokens": len(prompt.token_ids)}

    def _prompt(self) -> dict[str, Any]:
        """A chat's fields. Raises BadFieldError."""
        choice, form = self.tool_choice, self.output_config.response_format()
        if self.output_format is not None:  # its older name
            form = self.output_format.response_format("output_format")
        return {
            "messages": self._turns(),
            "tools": [tool.tool(f"tools[{at}]") for at, tool in enumerate(self.tools)],
            "tool_choice": AUTO if choice is None else choice.tool_choice(),
            "parallel_tool_calls": choice is None or not choice.disable_parallel_tool_use,
            "response_format": form,
        }

    def _turns(self) -> list[dict[str, Any]]:
        if not self.messages:
            raise BadFieldError("messages", "messages is empty; send at least one")
        if self.messages[-1].role == "assistant":
            raise BadFieldError("messages", "messages ends with an assistant's turn; none is continued, leave it out")
        turns = [] if self.system is None else [{"role": "system", "content": joined("system", self.system)}]
        for at, turn in enumerate(self.messages):
            turns += turn.turns(f"messages[{at}]")
        return turns


class MessagesBody(CountBody):
    """POST /v1/messages."""

    names: ClassVar[dict[str, str]] = CountBody.names | {"stop": "stop_sequences"}

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_sequences: Annotated[list[str], *few(MAX_ITEMS)] = []  # noqa: RUF012

    def chat(self) -> ChatBody:
        fields = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
        return as_chat(**self._prompt(), stop=self.stop_sequences, **fields)
