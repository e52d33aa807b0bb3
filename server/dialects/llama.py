"""Llama 3's: {"name": ..., "parameters": {...}} and nothing else, or behind a mark; semicolons part several."""

from .calls import Calls, json_call
from .source import Prose, Reading, Source, begins

MARK = "<|python_tag|>"
MARKS = (MARK,)


def read(source: Source, calls: Calls, prose: Prose) -> Reading[None]:
    yield from _calls(source, "", calls, prose)
    while not calls.are_enough and (yield from prose.until(source, MARK)):
        yield from _calls(source, MARK, calls, prose)


def _calls(source: Source, mark: str, calls: Calls, prose: Prose) -> Reading[None]:
    start = len(mark)
    while True:
        seen = yield from json_call(source, start, calls)
        if seen is not None:
            yield from prose.give_up(source, mark, seen)
            return
        prose.is_trimmed, mark = True, ";"
        if calls.are_enough or not (start := (yield from begins(source, mark))):
            return
