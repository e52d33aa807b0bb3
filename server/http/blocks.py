"""An answer as a sequence of blocks, as OpenAI's newer form and Anthropic's have it: texts, and calls between them."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..dialects.parts import CallPart
from ..request.events import Event


@dataclass(eq=False)
class Block:
    """A text, or the call of a tool."""

    index: int
    text: str = ""
    """Of a call its arguments (JSON)."""
    call: int | None = None
    """Which call of the answer; None: it is a text."""
    id: str = ""
    name: str = ""
    """A call's."""

    @property
    def is_call(self) -> bool:
        return self.call is not None


class Blocks:
    """Of one answer."""

    def __init__(self) -> None:
        self._all: list[Block] = []

    @property
    def all(self) -> list[Block]:
        """An answer without any has an empty text."""
        return self._all or [Block(0)]

    def grow(self, event: Event) -> Iterator[tuple[Block, str]]:
        """What the event adds, and to which block: to the last, or to one that is begun. What goes on comes first."""
        going_on = [part for part in event.calls if self._all and part.index == self._all[-1].call]
        yield from map(self._called, going_on)
        if event.text:
            if not self._all or self._all[-1].is_call:
                self._all.append(Block(len(self._all)))
            self._all[-1].text += event.text
            yield self._all[-1], event.text
        yield from (self._called(part) for part in event.calls if part not in going_on)

    def _called(self, part: CallPart) -> tuple[Block, str]:
        if not self._all or self._all[-1].call != part.index:
            self._all.append(Block(len(self._all), call=part.index, id=part.id, name=part.name))
        self._all[-1].text += part.arguments
        return self._all[-1], part.arguments
