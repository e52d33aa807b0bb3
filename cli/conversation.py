"""What the commands that talk bring along beside the question: flags, and the files that they name."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..engine_impl.errors import RefusedError

if TYPE_CHECKING:
    from ..engine_impl.text.chat import Tool, Turn
    from ..server.request.chat import ChatCall


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What comes with the question."""

    system: str | None = None
    """Instructions to the model that precede the conversation (text)."""
    files: Annotated[tuple[Path, ...], tyro.conf.arg(name="file"), tyro.conf.UseAppendAction] = ()
    """A file whose text is put before the question, with its name. May be given several times."""
    tools: Path | None = None
    """A file of tools that the model may call (JSON): a list of functions with name, description and parameters, as
    OpenAI's requests have it."""

    def opening(self) -> "list[Turn]":
        """What precedes the first question."""
        from ..engine_impl.text.chat import Turn

        return [Turn(role="system", content=self.system)] if self.system else []

    def question(self, text: str) -> "Turn":
        """Raises RefusedError for a file that cannot be read."""
        from ..engine_impl.text.chat import Turn

        texts = [f"{path.name}:\n{read_text(path)}" for path in self.files]
        return Turn(role="user", content="\n\n".join([*texts, text]))

    def call(self, turns: "Sequence[Turn]") -> "ChatCall":
        """Raises RefusedError for tools that cannot be read."""
        from ..engine_impl.text.chat import Chat
        from ..server.request.chat import ChatCall

        tools = () if self.tools is None else read_tools(self.tools)
        return ChatCall(chat=Chat(turns=tuple(turns), tools=tools))


ALONE = Conversation()
"""Nothing."""


def read_text(path: Path) -> str:
    """Raises RefusedError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"cannot read {path}: {error}") from error


def read_json(path: Path) -> Any:
    """Raises RefusedError."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{path} is no JSON: {error}") from error


def read_tools(path: Path) -> "tuple[Tool, ...]":
    """Functions, or OpenAI's {"type": "function", "function": ...} around them. Raises RefusedError."""
    listed = read_json(path)
    if not isinstance(listed, list):
        raise RefusedError(f"{path} must be a JSON list of tools")
    return tuple(read_tool(one, f"{path}, tool {number}") for number, one in enumerate(listed, 1))


def read_tool(listed: Any, where: str) -> "Tool":
    from ..engine_impl.text.chat import NO_ARGUMENTS, Tool

    function = listed.get("function", listed) if isinstance(listed, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
        raise RefusedError(f"{where}: must be an object with a name")
    parameters = function.get("parameters")
    return Tool(
        name=name,
        description=str(function.get("description") or ""),
        parameters=NO_ARGUMENTS if parameters is None else json.dumps(parameters, ensure_ascii=False),
    )
