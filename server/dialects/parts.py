"""What an answer consists of."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Content:
    """What is meant for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """What the model tells itself."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPart:
    """Of a tool's call: the first has its id and name, and all together its arguments."""

    index: int
    """Which call of the answer."""
    id: str = ""
    name: str = ""
    arguments: str = ""
    """What they grow by (JSON)."""


Part = Content | Thought | CallPart


class Brought(NamedTuple):
    """What some more of an answer's text brings."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallPart, ...] = ()

    @classmethod
    def of(cls, parts: Iterable[Part]) -> "Brought":
        texts, thoughts, calls = [], [], []
        for part in parts:
            match part:
                case Content(text):
                    texts.append(text)
                case Thought(text):
                    thoughts.append(text)
                case _:
                    calls.append(part)
        return cls("".join(texts), "".join(thoughts), joined(calls))

    def and_then(self, other: "Brought") -> "Brought":
        calls = self.calls + other.calls
        return Brought(self.text + other.text, self.reasoning + other.reasoning, joined(calls) if calls else ())


def joined(parts: Iterable[CallPart]) -> tuple[CallPart, ...]:
    """Those of one call as one."""
    of_call: dict[int, list[CallPart]] = {}
    for part in parts:
        of_call.setdefault(part.index, []).append(part)
    return tuple(
        CallPart(
            index=index,
            id=parts[0].id,
            name=parts[0].name,
            arguments="".join(part.arguments for part in parts),
        )
        for index, parts in of_call.items()
    )
