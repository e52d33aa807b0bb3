"""Text that comes in pieces, for generators that read it: they yield None where they cannot go on without more.

What they do must depend on the text alone, not on where its pieces end: they look at a beginning of it and wait until
it decides.
"""

from collections.abc import Generator
from typing import TypeVar

from .parts import Content, Part, Thought

T = TypeVar("T")
Reading = Generator[Part | None, None, T]
"""Yields parts of the answer; None: more text is needed, if there is any."""


class Source:
    """What has come and is not read yet."""

    def __init__(self) -> None:
        self.text = ""
        self.is_whole = False
        """Nothing more comes."""

    def take(self, count: int) -> str:
        """The next characters, read now."""
        taken, self.text = self.text[:count], self.text[count:]
        return taken


def begins(source: Source, mark: str, at: int = 0) -> Reading[int]:
    """Where `mark` ends if the text from `at` on begins with it, blanks before it left aside; 0 if not."""
    while True:
        rest = source.text[at:].lstrip()
        if rest.startswith(mark):
            return len(source.text) - len(rest) + len(mark)
        if source.is_whole or not mark.startswith(rest):
            return 0
        yield None


def skip(source: Source, mark: str) -> Reading[bool]:
    """Reads `mark` with the blanks before it, if it comes next. Whether it did."""
    end = yield from begins(source, mark)
    source.take(end)
    return bool(end)


class Prose:
    """The text around calls, or a thought's. Blanks are shown once a text follows them. Where calls were read, those
    before the first text and behind the last one are no part of it."""

    def __init__(self, kind: type[Content] | type[Thought]) -> None:
        self._kind, self._blanks, self._is_begun = kind, "", False
        self.is_trimmed = False
        """A call was read, or the thought's end."""

    def until(self, source: Source, mark: str) -> Reading[bool]:
        """Shows what comes before `mark`. Whether the text goes on with it; if not, it is at its end."""
        while True:
            found = source.text.find(mark)
            if found >= 0:
                yield from self.show(source.take(found))
                return True
            if source.is_whole:
                yield from self.show(source.take(len(source.text)))
                return False
            yield from self.show(source.take(len(source.text) - started(source.text, mark)))
            yield None

    def give_up(self, source: Source, mark: str, seen: int) -> Reading[None]:
        """Shows what begins with `mark` and is none of what it stands for. Of the `seen` characters that this took, the
        last mark may be the beginning of something yet, and the others are not tried: so every character is looked at
        twice at most."""
        last = source.text.rfind(mark, 1, seen) if mark else -1
        yield from self.show(source.take(last if last > 0 else max(seen, len(mark))))

    def show(self, text: str) -> Reading[None]:
        text = self._blanks + text
        if self.is_trimmed and not self._is_begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        if shown:
            self._is_begun = True
            yield self._kind(shown)

    def part(self, blanks: str) -> None:
        """What is shown from here on stands apart from what was shown before."""
        if self._is_begun:
            self._blanks = blanks

    def finish(self) -> Reading[None]:
        """At the answer's end."""
        if self._blanks and not self.is_trimmed:
            yield self._kind(self._blanks)


def started(text: str, mark: str) -> int:
    """How many characters at the text's end may be the beginning of `mark`."""
    return next((count for count in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-count:])), 0)
