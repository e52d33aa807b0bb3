"""Hermes', Qwen's and many others': <tool_call>{"name": ..., "arguments": {...}}</tool_call>, once for each call."""

from .calls import Calls, json_call
from .source import Prose, Reading, Source, skip

OPEN, CLOSE = MARKS = ("<tool_call>", "</tool_call>")


def read(source: Source, calls: Calls, prose: Prose) -> Reading[None]:
    while (yield from prose.until(source, OPEN)):
        seen = yield from json_call(source, len(OPEN), calls)
        if seen is not None:
            yield from prose.give_up(source, OPEN, seen)
            continue
        prose.is_trimmed = True
        yield from skip(source, CLOSE)
        if calls.are_enough:
            return
