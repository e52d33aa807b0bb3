"""An adapter as requests name it."""

from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...engine_impl.api import Adapter

NO_ADAPTERS = "there are no adapters; serve with --max-adapters N"

_numbers = count(1)


class LoadedAdapter:
    """One in the host's memory. Loaded anew it is another one, whatever its name: its keys and values differ."""

    def __init__(self, name: str, path: str, weights: "Adapter", read_s: float = 0.0) -> None:
        """`weights`: what `Engine.read_adapter` gave, in so much time (seconds)."""
        self.name, self.path, self.weights, self.read_s = name, path, weights, read_s
        self.number = next(_numbers)
        """No two adapters of this process share one."""
        self.is_served = True
        """Until it is unloaded; those who have it by then go on with it."""
        self.last_asked = 0.0
        """When a request named it (s since 1970); 0: never."""
