"""What a chat template does with tools, calls, results, names and system turns: found by trying it, in a worker."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RefusedError
from ..runtime.workers import WorkerError
from .chat import GEMMA, HARMONY, HERMES, LLAMA, MISTRAL, Call, TemplateFacts, Tool, Turn
from .messages import functions_of, messages_of
from .templates import variables_of, written

LONGEST = 1 << 17
"""What a trial may write (characters)."""

THINK_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""What models write around thoughts. The first of them that a template names is its own."""

FORMS = (
    (HERMES, re.compile(r"<tool_call>\s*\{")),
    (MISTRAL, re.compile(r"\[TOOL_CALLS\]")),
    (GEMMA, re.compile(r"<start_function_call>\s*call:")),
    (LLAMA, re.compile(r'\{\s*"name":\s*"aFunction",\s*"parameters":\s*\{')),
)
"""How a call looks, by its format."""

CHANNELS = ("<|channel|>", "<|message|>")
"""A template that names these writes messages with channels, whatever it does with tools."""

ID, OTHER_ID = "aCallHere", "bCallHere"  # 9 letters: Mistral's templates take no others
TOOL = Tool(
    name="aFunction",
    description="aDescription",
    parameters='{"type": "object", "properties": {"aKey": {"type": "string", "description": "aHint"}}}',
)
CALL = Call(id=ID, name="aFunction", arguments='{"aKey": "aValue"}')
OTHER_CALL = Call(id=OTHER_ID, name="aFunction", arguments='{"aKey": "bValue"}')
RESULT = Turn(role="tool", content="aResult", name="aFunction", call_id=ID)
OTHER_RESULT = Turn(role="tool", content="bResult", name="aFunction", call_id=OTHER_ID)
QUESTION, AGAIN = Turn(role="user", content="aQuestion"), Turn(role="user", content="bQuestion")
CALLING, ANSWER = Turn(role="assistant", calls=(CALL,)), Turn(role="assistant", content="anAnswer")
CALLING_TWICE = Turn(role="assistant", calls=(CALL, OTHER_CALL))
CALLING_ALOUD = Turn(role="assistant", content="aWord", calls=(CALL,))
SYSTEM, NAMED = Turn(role="system", content="anOrder"), Turn(role="user", content="aQuestion", name="aPerson")


def examine(source: str, special_tokens: tuple[tuple[str, str], ...]) -> TemplateFacts:
    """In a worker."""

    def writes(turns: Sequence[Turn], *expected: str, tools: Sequence[Tool] = (TOOL,)) -> str:
        """What comes out, if all that is expected does; else nothing."""
        text = _tried(source, dict(special_tokens), turns, tools)
        return text if all(one in text for one in expected) else ""

    text = writes([QUESTION, CALLING, RESULT, ANSWER, AGAIN], "aDescription", "aHint", "aValue", "aResult")
    has_channels = all(mark in source for mark in CHANNELS)
    return TemplateFacts(
        tool_format=HARMONY if has_channels else next((name for name, form in FORMS if form.search(text)), None),
        writes_tools=bool(text),
        writes_several_calls=bool(
            writes([QUESTION, CALLING_TWICE, RESULT, OTHER_RESULT, ANSWER, AGAIN], "aValue", "bValue", "bResult")
        ),
        writes_text_beside_calls=bool(writes([QUESTION, CALLING_ALOUD, RESULT, ANSWER, AGAIN], "aWord", "aValue")),
        writes_system=bool(writes([SYSTEM, QUESTION], "anOrder", tools=())),
        writes_names=bool(writes([NAMED], "aPerson", tools=())),
        variables=variables_of(source),
        think_tags=next((tags for tags in THINK_TAGS if tags[0] in source or tags[1] in source), None),
    )


def _tried(source: str, variables: Mapping[str, Any], turns: Sequence[Turn], tools: Sequence[Tool]) -> str:
    """What a template writes; nothing when it refuses."""
    given = {
        **variables,
        "messages": messages_of(turns, TemplateFacts()),
        "tools": functions_of(tools) or None,
        "documents": None,
        "add_generation_prompt": True,
    }
    try:
        return written(source, given, LONGEST)
    except (RefusedError, WorkerError):
        return ""
