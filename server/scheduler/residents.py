"""Which adapters are on the devices: those that are used, and of the others those that were used last."""

from collections.abc import Collection

from ..request.adapter import LoadedAdapter

NONE = 0
"""The index of no adapter; places count from 1."""


class Residents:
    """The loop's. One thread."""

    def __init__(self, places: int) -> None:
        self.places = places
        self._index: dict[LoadedAdapter, int] = {}  # whoever was used last stands last
        self._free = list(range(places, 0, -1))

    @property
    def adapters(self) -> frozenset[LoadedAdapter]:
        """Those that are on the devices. May be asked from another thread."""
        return frozenset(self._index.copy())

    def find(self, adapter: LoadedAdapter | None) -> int | None:
        """Its index, used now; None where it has none."""
        if adapter is None:
            return NONE
        index = self._index.pop(adapter, None)
        if index is not None:
            self._index[adapter] = index
        return index

    def place(self, adapter: LoadedAdapter, used: Collection[LoadedAdapter]) -> int:
        """An index for one that has none: a free one, or that of one that is not in `used`. Those that are unloaded go
        first, then whoever was used longest ago. Raises ValueError where all are used."""
        if not self._free:
            others = [other for other in self._index if other not in used]
            if not others:
                raise ValueError(f"all {self.places} adapters on the devices are used")
            leaves = next((other for other in others if not other.is_served), others[0])
            self._free.append(self._index.pop(leaves))
        self._index[adapter] = self._free.pop()
        return self._index[adapter]

    def forget(self, adapter: LoadedAdapter) -> None:
        """It did not come: its place is free."""
        self._free.append(self._index.pop(adapter))
