"""Calls that are written as JSON: {"name": ..., "arguments": {...}}."""

import json
import re
import secrets
from collections.abc import Callable, Collection
from typing import Any

from .json_text import JsonText
from .parts import CallPart
from .source import Reading, Source

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\\x00-\x1f]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""How nearly all calls begin. Behind it the arguments are told as they come."""


def new_id() -> str:
    """Of a call."""
    return f"call_{secrets.token_hex(12)}"


class Calls:
    """Those of one answer."""

    def __init__(self, offered: Collection[str], *, at_most_one: bool, make_id: Callable[[], str] = new_id) -> None:
        """`offered`: the tools that there are; what names another one is no call."""
        self.offered = offered
        self.count = 0
        self._at_most_one, self._make_id = at_most_one, make_id

    @property
    def are_enough(self) -> bool:
        """What follows is not read."""
        return self._at_most_one and self.count > 0

    def begin(self, name: str) -> CallPart:
        self.count += 1
        return CallPart(index=self.count - 1, id=self._make_id(), name=name)

    def more(self, arguments: str) -> CallPart:
        return CallPart(index=self.count - 1, arguments=arguments)


def json_call(source: Source, start: int, calls: Calls) -> Reading[int | None]:
    """Reads one from `start` on, with what is before it. If none is there it reads nothing, and returns how many
    characters it took to see that."""
    whole, at = JsonText(), start
    while True:
        at = whole.scan(source.text, at)
        if head := HEAD.match(source.text, start):
            return (yield from _as_it_comes(source, head, calls))
        if whole.is_whole:
            break
        if whole.is_broken or source.is_whole:
            return at
        yield None
    call = named(json.loads(source.text[start:at]))
    if call is None or call[0] not in calls.offered:
        return at
    source.take(at)
    name, arguments = call
    yield calls.begin(name)
    yield calls.more(json.dumps(arguments, ensure_ascii=False))
    return None


def _as_it_comes(source: Source, head: re.Match[str], calls: Calls) -> Reading[int | None]:
    if head[1] not in calls.offered:
        return head.end()
    source.take(head.end())
    yield calls.begin(head[1])
    if (yield from arguments_of(source, calls)):
        yield from _object_end(source)
    return None


def arguments_of(source: Source, calls: Calls) -> Reading[bool]:
    """Reads an object as the arguments of the call that was begun. Whether it came to its end."""
    whole = JsonText()
    while True:
        read = whole.scan(source.text, 0)
        if read:
            yield calls.more(source.take(read))
        if whole.is_whole:
            return True
        if whole.is_broken or source.is_whole:
            return False
        yield None


def _object_end(source: Source) -> Reading[None]:
    """The rest of the object that the arguments were the value of one key of; nothing, if it has no end."""
    rest, at = JsonText(within=True), 0
    while True:
        at = rest.scan(source.text, at)
        if rest.is_whole:
            source.take(at)
        if rest.is_whole or rest.is_broken or source.is_whole:
            return
        yield None


def named(call: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(name, arguments) of a whole object; None: it is no call. Arguments may be JSON within a string."""
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    arguments = {} if arguments is None else arguments
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None
