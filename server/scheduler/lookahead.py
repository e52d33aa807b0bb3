"""What comes next, looked at no further than somebody asks: to know what a prompt needs takes time."""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Lookahead(Generic[Item]):
    """What an iterable gives, each taken from it when it is first looked at, and once."""

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._rest, self._seen = iter(items), list[Item]()

    def __bool__(self) -> bool:
        """Whether there is any."""
        return self.at(0) is not None

    def __iter__(self) -> Iterator[Item]:
        index = 0
        while (item := self.at(index)) is not None:
            yield item
            index += 1

    def at(self, index: int) -> Item | None:
        """None behind the last."""
        while index >= len(self._seen):
            if (item := next(self._rest, None)) is None:
                return None
            self._seen.append(item)
        return self._seen[index]
