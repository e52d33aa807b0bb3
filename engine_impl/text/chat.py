"""A conversation, as a chat template is given it. Nothing heavy is imported here.

What is of any shape (schemas, arguments, documents) travels as the JSON text that it came as: it is read where it is
used, in a process that may be held up.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

HERMES, LLAMA, MISTRAL, GEMMA, HARMONY = TOOL_FORMATS = ("hermes", "llama", "mistral", "gemma", "harmony")
"""How models write that they call a tool."""

NO_ARGUMENTS = '{"type": "object", "properties": {}}'
"""The schema of a tool that takes none."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: str = NO_ARGUMENTS
    """The JSON schema of its arguments (JSON)."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """Of a tool, by the assistant."""

    id: str
    name: str
    arguments: str
    """A JSON object; "" is an empty one."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message."""

    role: str
    """system, user, assistant or tool"""
    content: str = ""
    name: str = ""
    """Of who speaks, or of the tool whose result this is."""
    reasoning: str = ""
    """What the assistant thought before it."""
    calls: tuple[Call, ...] = ()
    call_id: str = ""
    """Which call this is the result of."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What an answer is wanted to."""

    turns: tuple[Turn, ...]
    tools: tuple[Tool, ...] = ()
    documents: str = ""
    """What a template may quote (a JSON list of objects)."""
    template_kwargs: str = ""
    """More variables of the template (a JSON object)."""
    enable_thinking: bool | None = None
    """The variable by which reasoning models' templates are told whether to think; None: as the template has it."""
    reasoning_effort: str = ""
    """Likewise, for how long; "none" is not at all. "": as the template has it."""
    add_generation_prompt: bool = True
    """End with the beginning of the assistant's turn."""
    continue_final_message: bool = False
    """End within the last turn, so that the answer goes on with it."""
    as_text: bool = False
    """Write tools, calls and results into the turns' texts, in Hermes' form: for templates that know none."""

    @classmethod
    def of(cls, messages: Iterable[Mapping[str, str]]) -> "Chat":
        """Of {"role", "content"} alone."""
        return cls(turns=tuple(Turn(role=message["role"], content=message["content"]) for message in messages))

    @property
    def size(self) -> int:
        """Of all texts (characters)."""
        of_turns = sum(
            len(turn.content) + len(turn.reasoning) + sum(len(call.name) + len(call.arguments) for call in turn.calls)
            for turn in self.turns
        )
        of_tools = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in self.tools)
        return of_turns + of_tools + len(self.documents) + len(self.template_kwargs)


class ChatPrompt(NamedTuple):
    """A conversation in the model's form."""

    token_ids: list[int]
    end: str
    """The last END characters of its text: an answer may have begun there."""


END = 64


@dataclass(frozen=True, kw_only=True)
class TemplateFacts:
    """What a chat template writes of what it is given; found by trying it. The defaults are those of none at all."""

    tool_format: str | None = None
    """How it writes calls, one of TOOL_FORMATS; None: in a form that is not known, or not at all."""
    writes_tools: bool = False
    """Definitions of tools, calls and results all come out."""
    writes_several_calls: bool = False
    """In one turn."""
    writes_text_beside_calls: bool = False
    """In one turn."""
    writes_system: bool = False
    writes_names: bool = False
    """Of those who speak."""
    variables: frozenset[str] = frozenset()
    """All that it reads."""
    think_tags: tuple[str, str] | None = None
    """What stands around a thought; None: the model does not think aloud."""
