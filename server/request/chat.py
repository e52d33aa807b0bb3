"""A chat, as a front has read it, becomes a prompt, and what its answers may and must look like. Both fronts' way."""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...engine_impl.errors import RefusedError
from ...engine_impl.text.chat import HARMONY, HERMES, Chat, TemplateFacts, Tool, Turn
from ..config import AUTO, ChatConfig
from ..dialects.syntax import AnswerSyntax
from .call_grammar import ControlId, after_thought, check_strict, may_call, must_call, strict_if_called
from .grammar import Grammar

if TYPE_CHECKING:
    from ...engine_impl.api import Tokenizer
    from .limits import Limits

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Of messages, and what chat templates call them: OpenAI renamed system, models did not."""

NONE, REQUIRED = "none", "required"
TOOL_CHOICES = (NONE, AUTO, REQUIRED)

MAX_TOOLS, MAX_TOOLS_SIZE = 128, 1 << 17
"""Of a chat (count), and what all of them may take (characters)."""
MAX_CALLS = 16
"""Of an answer that must call (count): without a bound a model may go on for ever. One whose template knows no tools
goes on with the next one as soon as it may, and has one."""
MAX_KWARGS_SIZE = 1 << 14
"""Of chat_template_kwargs (characters)."""


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    """What a front has read."""

    chat: Chat
    tool_choice: str = AUTO
    """One of TOOL_CHOICES."""
    tool_name: str = ""
    """The tool that must be called; "": tool_choice tells."""
    parallel_tool_calls: bool = True
    strict: frozenset[str] = frozenset()
    """Names of the tools whose arguments must be as their schema says whenever they are called."""
    grammar: Grammar | None = None
    """What the content must look like, where the answer has some."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a request is made of."""

    token_ids: list[int]
    syntax: AnswerSyntax | None = None
    """How answers are read; None: their text is their content."""
    grammar: Grammar | None = None


@dataclass(frozen=True)
class Dialect:
    """How the model and its template speak."""

    tool_format: str
    as_text: bool
    """The template knows no tools: they are written into the texts."""
    think_tags: tuple[str, str] | None


def dialect_of(facts: TemplateFacts, config: ChatConfig) -> Dialect:
    """Raises RefusedError for a format that the model cannot be asked for."""
    think_tags = facts.think_tags if config.reasoning_format == AUTO else None
    if config.tool_format != AUTO:
        if not facts.writes_tools and config.tool_format != HERMES:
            raise RefusedError(
                f"tool_format={config.tool_format!r} must be {HERMES!r} or {AUTO!r}: the model's chat template writes "
                "no tools, so they are written into the messages, in Hermes' form"
            )
        return Dialect(config.tool_format, not facts.writes_tools, think_tags)
    return Dialect(facts.tool_format or HERMES, facts.tool_format is None, think_tags)


def check_channels(facts: TemplateFacts) -> None:
    """Raises RefusedError for tools where answers have channels and the template writes none: calls in a text would be
    in a form that the model does not know."""
    if facts.tool_format == HARMONY and not facts.writes_tools:
        raise RefusedError("tools: the model's chat template has channels and writes no tools; leave them out")


def prompt_of(call: ChatCall, tokenizer: "Tokenizer", limits: "Limits", config: ChatConfig) -> Prompt:
    """Raises RefusedError for what no model, or this one, is asked so."""
    check(call)
    chat, facts = call.chat, tokenizer.template_facts
    check_names(chat.turns, facts)
    dialect = dialect_of(facts, config)
    tools = () if call.tool_choice == NONE and not call.tool_name else chat.tools
    uses_tools = bool(tools) or any(turn.calls or turn.role == "tool" for turn in chat.turns)
    if uses_tools:
        check_channels(facts)
    has_channels = dialect.tool_format == HARMONY
    chat = replace(chat, tools=tools, as_text=dialect.as_text and uses_tools)
    prompt = limits.prompt_of_chat(tokenizer, chat)
    syntax = AnswerSyntax(
        tool_format=dialect.tool_format if tools and not has_channels else None,
        channels=has_channels,
        goes_on=has_channels and chat.continue_final_message,
        shows_thoughts=config.reasoning_format != AUTO,
        tools=frozenset(tool.name for tool in tools),
        at_most_one_call=not call.parallel_tool_calls or bool(call.tool_name),
        think_tags=None if has_channels else dialect.think_tags,
        is_thinking=begins_in_thought(chat, prompt.end, dialect.think_tags),
    )
    return Prompt(
        token_ids=prompt.token_ids,
        syntax=None if syntax.is_plain else syntax,
        grammar=grammar_of(call, syntax, 1 if dialect.as_text else MAX_CALLS, tokenizer.control_id),
    )


def grammar_of(call: ChatCall, syntax: AnswerSyntax, most: int, control_id: ControlId) -> Grammar | None:
    """What an answer must look like; None: whatever the model writes. `most`: calls, if it must have some."""
    tools = [tool for tool in call.chat.tools if tool.name in syntax.tools]
    most = 1 if syntax.at_most_one_call else most
    check_strict(tools, call.strict, syntax)
    if call.tool_name:
        return must_call([tool for tool in tools if tool.name == call.tool_name], syntax, most, control_id)
    if call.tool_choice == REQUIRED:
        return must_call(tools, syntax, most, control_id)
    if call.grammar is not None:
        if tools:
            return may_call(tools, syntax, most, call.grammar, control_id)
        return after_thought(syntax, call.grammar, control_id)
    strict = call.strict & syntax.tools
    return strict_if_called(tools, strict, syntax, most, control_id) if strict else None


def begins_in_thought(chat: Chat, end: str, tags: tuple[str, str] | None) -> bool:
    """Whether an answer goes on with a thought. `end`: of the prompt."""
    if tags is None:
        return False
    if chat.continue_final_message:
        begun = chat.turns[-1].content
        return begun.rfind(tags[0]) > begun.rfind(tags[1])
    return end.rstrip().endswith(tags[0])


def check(call: ChatCall) -> None:
    """Raises RefusedError."""
    chat = call.chat
    for at, turn in enumerate(chat.turns):
        check_turn(turn, f"messages[{at}]")
    check_tools(chat.tools)
    if len(chat.template_kwargs) > MAX_KWARGS_SIZE:
        raise RefusedError(
            f"chat_template_kwargs: {len(chat.template_kwargs)} characters are too many; send at most {MAX_KWARGS_SIZE}"
        )
    if call.tool_choice not in TOOL_CHOICES:
        raise RefusedError(f"tool_choice={call.tool_choice!r:.80} must be one of {', '.join(TOOL_CHOICES)}, or a tool")
    if (call.tool_name or call.tool_choice == REQUIRED) and not chat.tools:
        raise RefusedError(f"tool_choice={call.tool_name or call.tool_choice!r:.80} needs tools; send some")
    if call.tool_name and call.tool_name not in [tool.name for tool in chat.tools]:
        raise RefusedError(f"tool_choice={call.tool_name!r:.80} is none of the tools; name one of them")
    if chat.continue_final_message:
        check_continued(chat)


def check_turn(turn: Turn, at: str) -> None:
    """`at`: where it stands. Raises RefusedError."""
    if turn.role not in ROLES.values():
        raise RefusedError(f"{at}.role={turn.role!r:.80} must be one of {', '.join(ROLES)}")
    if turn.calls and turn.role != "assistant":
        raise RefusedError(f"{at}.tool_calls are the assistant's; its role is {turn.role!r}")
    if turn.reasoning and turn.role != "assistant":
        raise RefusedError(f"{at}.reasoning_content is the assistant's; its role is {turn.role!r}")
    if turn.call_id and turn.role != "tool":
        raise RefusedError(f"{at}.tool_call_id is of a tool's message; its role is {turn.role!r}")
    for number, call in enumerate(turn.calls):
        check_name(call.name, f"{at}.tool_calls[{number}].function.name")


def check_tools(tools: tuple[Tool, ...]) -> None:
    """Raises RefusedError."""
    if len(tools) > MAX_TOOLS:
        raise RefusedError(f"tools: {len(tools)} are too many; send at most {MAX_TOOLS}")
    size = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in tools)
    if size > MAX_TOOLS_SIZE:
        raise RefusedError(f"tools: {size} characters are too many; send at most {MAX_TOOLS_SIZE}")
    names: set[str] = set()
    for at, tool in enumerate(tools):
        check_name(tool.name, f"tools[{at}].function.name")
        if tool.name in names:
            raise RefusedError(f"tools[{at}].function.name={tool.name!r} is there twice; name each tool differently")
        names.add(tool.name)


def check_name(name: str, where: str) -> None:
    """Raises RefusedError."""
    if not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", name):
        raise RefusedError(f"{where}={name!r:.80} must be 1 to 64 letters, digits, underscores, dots and dashes")


def check_names(turns: tuple[Turn, ...], facts: TemplateFacts) -> None:
    """Raises RefusedError for the name of a speaker that would not be written."""
    for at, turn in enumerate(turns):
        if turn.name and turn.role != "tool" and not facts.writes_names:
            raise RefusedError(
                f"messages[{at}].name={turn.name!r:.80} is not read by the model's chat template; "
                "put it into the content"
            )


def check_continued(chat: Chat) -> None:
    """Raises RefusedError for a last message that no answer can go on with."""
    if chat.add_generation_prompt:
        raise RefusedError(
            "continue_final_message=true is for add_generation_prompt=false: a turn is begun, or the last goes on"
        )
    if chat.turns[-1].role == "tool" or chat.turns[-1].calls:
        raise RefusedError("continue_final_message=true needs a last message that is text alone; add one")
