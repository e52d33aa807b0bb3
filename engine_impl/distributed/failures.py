"""Which calls have raised where: each must raise on all hosts, or on none."""

import threading


class Failures:
    """The leader's reckoning. Its own calls end in the order of their numbers; followers tell of theirs whenever."""

    def __init__(self, followers: int) -> None:
        self._followers = followers
        self._ended = 0
        self._here: set[int] = set()
        self._there: dict[int, list[str]] = {}
        self._in_order = threading.Lock()

    def here(self, number: int, *, raised: bool) -> str:
        """A call has ended on the leader. Why there is no going on; empty: there is."""
        with self._in_order:
            self._ended = number
            if raised:
                self._here.add(number)
            return self._verdict(number)

    def there(self, number: int, host: int, error: str) -> str:
        """A call has raised on a follower. Likewise; empty too while the leader is at that call."""
        with self._in_order:
            self._there.setdefault(number, []).append(f"host {host}: call {number} failed there and not here: {error}")
            return self._verdict(number)

    def _verdict(self, number: int) -> str:
        told = self._there.get(number, [])
        if number > self._ended or not told:
            return ""
        if number not in self._here:
            return told[0]
        if len(told) == self._followers:  # all have raised: it is over
            self._here.discard(number)
            del self._there[number]
        return ""
