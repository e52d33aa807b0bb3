"""Mistral's: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]; in newer models [TOOL_CALLS]name[ARGS]{...}, once
for each call."""

import re

from .calls import Calls, arguments_of, json_call
from .source import Prose, Reading, Source, begins, skip

OPEN, ID, ARGUMENTS = MARKS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")

NAMED = re.compile(r"\[TOOL_CALLS\]\s{0,4}([\w.-]{1,64})(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?\s{0,4}(?=\{)")
LONGEST = 256
"""What NAMED matches at most (characters)."""


def read(source: Source, calls: Calls, prose: Prose) -> Reading[None]:
    while (yield from prose.until(source, OPEN)):
        start = yield from begins(source, "[", len(OPEN))
        yield from _list(source, start, calls, prose) if start else _named(source, calls, prose)
        if calls.are_enough:
            return


def _list(source: Source, start: int, calls: Calls, prose: Prose) -> Reading[None]:
    mark = OPEN
    while start:
        seen = yield from json_call(source, start, calls)
        if seen is not None:
            yield from prose.give_up(source, mark, seen)
            return
        prose.is_trimmed, mark = True, ","
        if calls.are_enough:
            return
        start = yield from begins(source, mark)
    yield from skip(source, "]")


def _named(source: Source, calls: Calls, prose: Prose) -> Reading[None]:
    while "{" not in source.text[:LONGEST] and len(source.text) < LONGEST and not source.is_whole:
        yield None
    head = NAMED.match(source.text[:LONGEST])
    if head is None or head[1] not in calls.offered:
        yield from prose.give_up(source, OPEN, len(OPEN))
        return
    source.take(head.end())
    prose.is_trimmed = True
    yield calls.begin(head[1])
    yield from arguments_of(source, calls)
