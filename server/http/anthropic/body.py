"""What clients of /v1/messages send."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Tag

from ...config import ChatConfig
from ...request.request import MAX_MESSAGES, MAX_PARTS, Limits
from ..bodies import ChatBody
from ..errors import BadFieldError
from ..fields import MAX_ITEMS, Part, Strict, few, one_of
from ..translated import TranslatedBody, as_chat

if TYPE_CHECKING:
    from ....engine_impl.api import AnyEngine as Engine

Text = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], *few(MAX_PARTS), Tag("<items>")],
    one_of("a string, or a list of text blocks"),
]
ROLES = ("user", "assistant")


class Turn(Strict):
    """Of a conversation."""

    role: str
    content: Text


class CountBody(TranslatedBody):
    """POST /v1/messages/count_tokens: a prompt alone."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ({"type": "auto"}, {"type": "none"}),
        "thinking": ({"type": "disabled"},),
        "mcp_servers": ([],),
        "container": (),
        "context_management": (),
        "output_config": ({},),
        "output_format": (),
    }

    messages: Annotated[list[Turn], *few(MAX_MESSAGES)]
    system: Text | None = None

    def chat(self) -> ChatBody:
        return as_chat(messages=self._turns())

    def reply(self, engine: "Engine", config: ChatConfig) -> dict[str, Any]:
        """Raises RefusedError."""
        (prompt,) = self.chat().prompts(engine.get_tokenizer(), Limits.of(engine), config)
        return {"input_tokens": len(prompt.token_ids)}

    def _turns(self) -> list[dict[str, Any]]:
        if not self.messages:
            raise BadFieldError("messages", "messages is empty; send at least one")
        turns = [] if self.system is None else [{"role": "system", "content": text_of("system", self.system)}]
        for at, turn in enumerate(self.messages):
            where = f"messages[{at}]"
            if turn.role not in ROLES:
                known = " or ".join(ROLES)
                raise BadFieldError(f"{where}.role", f"{where}.role={turn.role!r:.80} must be {known}")
            turns.append({"role": turn.role, "content": text_of(f"{where}.content", turn.content)})
        if self.messages[-1].role == "assistant":
            raise BadFieldError("messages", "messages ends with an assistant's turn; none is continued, leave it out")
        return turns


class MessagesBody(CountBody):
    """POST /v1/messages."""

    names: ClassVar[dict[str, str]] = {"stop": "stop_sequences"}

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_sequences: Annotated[list[str], *few(MAX_ITEMS)] = []  # noqa: RUF012

    def chat(self) -> ChatBody:
        fields = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
        return as_chat(messages=self._turns(), stop=self.stop_sequences, **fields)


def text_of(where: str, content: Any) -> str:
    """Raises BadFieldError for a block that is no text."""
    if isinstance(content, str):
        return content
    for number, block in enumerate(content):
        if block.type != "text" or block.text is None:
            at = f"{where}[{number}]"
            raise BadFieldError(at, f"{at} of type {block.type!r:.80} is not supported; send text alone")
    return "\n".join(block.text for block in content)
