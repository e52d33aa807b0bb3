"""A table for a terminal, and a line of progress."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, numbers on the right."""
    cells = [[_text(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    right = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(headers))]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(texts, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, cells)])


def print_tables(tables: Mapping[str, Callable[[], Iterable[str]]], names: Sequence[str]) -> None:
    """Those that are named, or all of them; rows as they are made."""
    for name in names or tables:
        for row in tables[name]():
            print(row, flush=True)
        print()


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


class Progress:
    """One line on stderr that is written over; on no terminal, nothing at all."""

    def __init__(self) -> None:
        self._is_shown, self._width = sys.stderr.isatty(), 0

    def show(self, text: str) -> None:
        if self._is_shown:
            print(f"\r{text.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(text)

    def bar(self, done: int, total: int, text: str) -> None:
        """A bar of 30 cells before the text."""
        filled = 30 * done // max(total, 1)
        self.show(f"[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {text}")

    def clear(self) -> None:
        self.show("")
        if self._is_shown:
            print("\r", end="", file=sys.stderr, flush=True)
