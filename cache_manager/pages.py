"""Who has which page of the pool: reference counts, the free pages, and every slot's row of the page table.

Knowledge of the host alone: to give a page away moves nothing on a device. A page is free, or somebody refers to it: a
slot's table, several slots' that share a prefix, or the tree of cached prefixes (`hold`, `drop`). Rows are written only
into a page that one slot has for itself.
"""

from collections.abc import Iterable, Sequence

import numpy as np


class OutOfPagesError(Exception):
    """Fewer pages are free, or fewer entries left in the tables, than were asked for."""

    def __init__(self, wanted: int, free: int, what: str = "pages") -> None:
        super().__init__(f"{wanted=} {what}, but only {free=}; give cached prefixes or another slot's pages back")
        self.wanted = wanted
        self.free = free


class Pages:
    """A pool of pages and the tables of the slots that share it. Not safe to use from several threads."""

    def __init__(self, *, pages: int, slots: int, pages_per_slot: int, max_entries: int | None = None) -> None:
        """`max_entries`: the most pages that all tables may have together, one that several share counted for each;
        None: no bound."""
        self.entries_left = slots * pages_per_slot if max_entries is None else max_entries
        self._references_P = np.zeros(pages, np.int32)
        self._held_P = np.zeros(pages, np.int32)  # how many of them are no table's
        self._free = list(range(pages - 1, -1, -1))  # the next one last
        self._page_BJ = np.zeros((slots, pages_per_slot), np.int32)
        self._count_B = np.zeros(slots, np.int32)

    @property
    def free(self) -> int:
        """Pages that nobody refers to."""
        return len(self._free)

    @property
    def page_BJ(self) -> np.ndarray:
        """The page table as it is now (i32, a copy); entries behind a slot's pages are 0."""
        return self._page_BJ.copy()

    def rows(self, slots: Sequence[int] | np.ndarray) -> np.ndarray:
        """The page table's rows of these slots (i32, a copy)."""
        return self._page_BJ[np.asarray(slots, np.intp)]

    def count(self, slots: Sequence[int] | np.ndarray) -> np.ndarray:
        """How many pages each of these slots has (i32)."""
        return self._count_B[np.asarray(slots, np.intp)]

    def census(self) -> dict[str, int]:
        """Pages that are free, live (in a table), and held alone. May be asked from another thread."""
        references_P, held_P = self._references_P.copy(), self._held_P.copy()
        free, live = np.count_nonzero(references_P == 0), np.count_nonzero(references_P > held_P)
        return {"free": int(free), "live": int(live), "cached": len(references_P) - int(free) - int(live)}

    def free_without(self, slots: Sequence[int]) -> int:
        """Pages that would be free if these slots' tables were empty and nobody held any. Changes nothing."""
        references_P = self._references_P - self._held_P
        for slot in slots:
            references_P[self._page_BJ[slot, : self._count_B[slot]]] -= 1
        return int(np.count_nonzero(references_P == 0))

    def of_slot(self, slot: int) -> list[int]:
        """A slot's pages, its first tokens' first."""
        return self._page_BJ[slot, : self._count_B[slot]].tolist()

    def references(self, page: int) -> int:
        """How many tables have a page, and one more if a cached prefix has it; 0: it is free."""
        return int(self._references_P[page])

    def is_held_alone(self, page: int) -> bool:
        """Whether it is in no table, but not free."""
        return bool(self._references_P[page] == self._held_P[page] > 0)

    def held_alone(self, pages: Sequence[int]) -> int:
        """How many of these are in no table, but not free."""
        page_N = np.asarray(pages, np.intp)
        references_N = self._references_P[page_N]
        return int(np.count_nonzero((references_N == self._held_P[page_N]) & (references_N > 0)))

    def extend(self, slot: int, count: int) -> list[int]:
        """Append so many free pages to a slot's table: the new ones.

        Raises OutOfPagesError, and ValueError beyond the table's width; then nothing has changed.
        """
        self._check_room(slot, count)
        if count > len(self._free):
            raise OutOfPagesError(count, len(self._free))
        taken = [self._free.pop() for _ in range(count)]
        self._append(slot, taken)
        return taken

    def share(self, slot: int, pages: Sequence[int]) -> None:
        """Append pages that others refer to, too.

        Raises OutOfPagesError beyond `max_entries`, ValueError for a free page and beyond the table's width; then
        nothing has changed.
        """
        self._check_room(slot, len(pages))
        self._check_referred(pages)
        self._append(slot, pages)

    def clear(self, slot: int) -> None:
        """Empty a slot's table; pages that nobody else refers to are free."""
        pages = self.of_slot(slot)
        self._page_BJ[slot], self._count_B[slot] = 0, 0
        self.entries_left += len(pages)
        self._release(pages)

    def hold(self, pages: Sequence[int]) -> None:
        """Refer to pages from outside the tables. Raises ValueError for a free page; then nothing has changed."""
        self._check_referred(pages)
        for counts_P in (self._references_P, self._held_P):
            np.add.at(counts_P, np.asarray(pages, np.intp), 1)

    def drop(self, pages: Sequence[int]) -> None:
        """Take back what `hold` did; a page's last reference frees it. Raises ValueError for one that is not held."""
        if loose := [page for page in pages if not self._held_P[page]]:
            raise ValueError(f"pages {loose} are not held; only held pages can be dropped")
        np.subtract.at(self._held_P, np.asarray(pages, np.intp), 1)
        self._release(pages)

    def check_integrity(self, held: Iterable[int] = ()) -> None:
        """Raises AssertionError with what is wrong: a page free and referred to, or neither; a count that is not that
        of the tables and of `held`, the pages that cached prefixes have; a table with gaps or a page twice."""
        references_P = np.bincount(np.fromiter(held, np.int64), minlength=len(self._references_P))
        for slot, count in enumerate(self._count_B):
            pages, behind = self._page_BJ[slot, :count], self._page_BJ[slot, count:]
            if behind.any():
                raise AssertionError(f"{slot=} has {count} pages, but entries behind them: {behind.tolist()}")
            if len(set(pages.tolist())) != count:
                raise AssertionError(f"{slot=} has a page twice: {pages.tolist()}")
            if ((pages < 0) | (pages >= len(references_P))).any():
                raise AssertionError(f"{slot=} has a page outside the pool of {len(references_P)}: {pages.tolist()}")
            references_P[pages] += 1
        if (wrong := np.flatnonzero(references_P != self._references_P)).size:
            counted, found = self._references_P[wrong].tolist(), references_P[wrong].tolist()
            raise AssertionError(f"pages {wrong.tolist()} have counts {counted}, but are referred to {found} times")
        unused = np.flatnonzero(references_P == 0).tolist()
        if sorted(self._free) != unused:
            raise AssertionError(f"free are {sorted(self._free)}, but referred to by nobody {unused}")

    def _append(self, slot: int, pages: Sequence[int]) -> None:
        start = self._count_B[slot]
        self._page_BJ[slot, start : start + len(pages)] = pages
        self._count_B[slot] += len(pages)
        self.entries_left -= len(pages)
        np.add.at(self._references_P, np.asarray(pages, np.intp), 1)

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._references_P[page] -= 1
            if not self._references_P[page]:
                self._free.append(page)

    def _check_room(self, slot: int, count: int) -> None:
        width = self._page_BJ.shape[1]
        if count < 0 or self._count_B[slot] + count > width:
            raise ValueError(f"{slot=} has {self._count_B[slot]} pages and cannot have {count} more: at most {width}")
        if count > self.entries_left:
            raise OutOfPagesError(count, self.entries_left, "entries of the page tables")

    def _check_referred(self, pages: Sequence[int]) -> None:
        if free := [page for page in pages if not self._references_P[page]]:
            raise ValueError(f"pages {free} are free; only pages in use can be shared or held")
