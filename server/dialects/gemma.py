"""FunctionGemma's: <start_function_call>call:name{key:<escape>a text<escape>,other:5}<end_function_call>.

No JSON, so a call is told when it is whole.
"""

import json
import re
from typing import Any

from .calls import Calls
from .source import Prose, Reading, Source

OPEN, CLOSE, QUOTE = MARKS = ("<start_function_call>", "<end_function_call>", "<escape>")
HEAD = re.compile(r"\s*call:\s*([\w.-]+)\s*(?=\{)")
KEY = re.compile(r"\s*([^:{}\[\],\s]+)\s*:")
WORD = re.compile(r"[^,{}\[\]]+")
MAX_DEPTH = 64


def read(source: Source, calls: Calls, prose: Prose) -> Reading[None]:
    while (yield from prose.until(source, OPEN)):
        looked = 0
        while (end := source.text.find(CLOSE, looked)) < 0 and not source.is_whole:
            looked = max(0, len(source.text) - len(CLOSE))
            yield None
        body = source.text[len(OPEN) : end if end >= 0 else len(source.text)]
        call = called(body)
        if call is None or call[0] not in calls.offered:
            yield from prose.give_up(source, OPEN, len(OPEN) + len(body))
            continue
        source.take(len(OPEN) + len(body) + len(CLOSE))
        prose.is_trimmed = True
        yield calls.begin(call[0])
        yield calls.more(json.dumps(call[1], ensure_ascii=False))
        if calls.are_enough:
            return


def called(body: str) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments) of what stands between the marks; None: it is no call."""
    head = HEAD.match(body)
    try:
        arguments, at = _object(body, head.end(), 0) if head else ({}, -1)
    except ValueError:
        return None
    return (head[1], arguments) if head and not body[at:].strip() else None


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """A value and where it ends. Raises ValueError."""
    at += len(text[at:]) - len(text[at:].lstrip())
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text.startswith("{", at):
        return _object(text, at, depth + 1)
    if text.startswith("[", at):
        return _list(text, at, depth + 1)
    word = WORD.match(text, at)
    if word is None:
        raise ValueError(text[at : at + 20])
    return json.loads(word[0]), word.end()


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    """Of a text that has { at `at`."""
    check(depth)
    found, at = {}, at + 1
    while not text.startswith("}", at):
        if (key := KEY.match(text, at)) is None:
            raise ValueError(text[at : at + 20])
        found[key[1]], at = _value(text, key.end(), depth)
        at = _next(text, at, "}")
    return found, at + 1


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    check(depth)
    found, at = [], at + 1
    while not text.startswith("]", at):
        value, at = _value(text, at, depth)
        found.append(value)
        at = _next(text, at, "]")
    return found, at + 1


def _next(text: str, at: int, end: str) -> int:
    """Behind a comma, or at the end."""
    blanks = re.compile(r"\s*").match(text, at)
    assert blanks is not None
    at = blanks.end()
    if text.startswith(",", at):
        return at + 1
    if not text.startswith(end, at):
        raise ValueError(text[at : at + 20])
    return at


def check(depth: int) -> None:
    """Raises ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels")
