"""Stop strings in a text that comes in pieces: nothing is shown that could still turn out to be one."""

from collections.abc import Sequence


class StopStrings:
    """Cuts a stream of text at the first stop string, wherever its pieces begin and end.

    The first is the one that is complete first; of two that end together, the longer. Every character advances a
    Knuth-Morris-Pratt automaton for each stop string, so a piece costs the same however much is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty."""
        self.met: str | None = None
        """The stop string that has been seen: nothing is shown from there on."""
        self._stops = [(stop, fallbacks(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # of each stop string, how much the text so far ends with
        self._held = ""

    def feed(self, piece: str) -> str:
        """What can be shown once `piece` has come."""
        if self.met is not None or not self._stops:
            return piece if self.met is None else ""
        start, self._held = len(self._held), self._held + piece
        for end, char in enumerate(piece, start + 1):
            if length := self._advance(char):
                self.met = self._held[end - length : end]
                return self._held[: end - length]
        shown = len(self._held) - max(self._matched)
        ready, self._held = self._held[:shown], self._held[shown:]
        return ready

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        return self._held if self.met is None else ""

    def _advance(self, char: str) -> int:
        """The length of the longest stop string that ends with this character; 0 for none."""
        longest = 0
        for number, (stop, fallback) in enumerate(self._stops):
            matched = self._matched[number]
            while matched and stop[matched] != char:
                matched = fallback[matched - 1]
            matched += stop[matched] == char
            self._matched[number] = matched
            if matched == len(stop):
                longest = max(longest, matched)
        return longest


def fallbacks(stop: str) -> list[int]:
    """For each character, the longest beginning of `stop` that ends there, other than the one that starts at 0."""
    table, matched = [0], 0
    for char in stop[1:]:
        while matched and stop[matched] != char:
            matched = table[matched - 1]
        matched += stop[matched] == char
        table.append(matched)
    return table
