"""The room in the cache: its pages, whose they are, and the prefixes that are kept in those that nobody needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...cache_manager.pages import Pages
from ...cache_manager.prefix_tree import PrefixTree
from ...engine_impl.api import AnyEngine
from .prompt import Prompt

SPARE_TABLES = 8
"""Tables for prompts that need no slot (count)."""


@dataclass(frozen=True)
class Need:
    """What a prompt needs to be let in."""

    shared: list[int]
    """Pages of a cached prefix, its first tokens' first."""
    missing: Sequence[bytes]
    """The names of its full pages that are not in the cache yet."""
    pages: int
    """That are taken from those available: new ones, and shared ones that nobody uses now."""
    entries: int
    """Of the page tables."""


class Room:
    """The loop's. One thread."""

    def __init__(self, engine: AnyEngine, *, prefix_cache: bool) -> None:
        sizes = engine.sizes
        slots = sizes.slots
        self.rows = sizes.page_rows
        """Of a page (tokens)."""
        self.chunk = sizes.prefill_chunk
        """Of a prompt, that are computed together (tokens)."""
        self._longest, self._tokens_per_step = sizes.cache_length, sizes.tokens_per_step
        self._prefix_cache = prefix_cache
        self._pages = Pages(
            pages=sizes.pages,
            slots=slots + SPARE_TABLES,
            pages_per_slot=sizes.pages_per_slot,
            max_entries=sizes.table_entries,
        )
        self._tree = PrefixTree(self._pages, self.rows)
        self._spare = list(range(slots, slots + SPARE_TABLES))
        self._size, self._first_spare = sizes.pages, slots
        self._table: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def size(self) -> int:
        """Pages."""
        return self._size

    @property
    def spare_tables(self) -> int:
        """Tables that no slot has and no prompt uses."""
        return len(self._spare)

    @property
    def entries_left(self) -> int:
        """Of the page tables."""
        return self._pages.entries_left

    def states(self) -> dict[str, int]:
        """Pages that are free, live (in a table), and cached alone. May be asked from another thread."""
        return self._pages.census()

    def names(self, token_T: np.ndarray, key: str) -> list[bytes]:
        """Of a text's full pages; none where prefixes are not kept."""
        return self._tree.names(token_T, key) if self._prefix_cache else []

    def missing(self, prompt: Prompt) -> Sequence[bytes]:
        """Of a prompt in work: the names of its full pages that are not in the cache yet."""
        return prompt.names[prompt.done // self.rows :]

    def need(self, prompt: Prompt) -> Need:
        """Of a prompt that waits. Changes nothing."""
        shared = self._cached(prompt)
        each = self._pages_for(len(prompt.token_T) + self._tokens_per_step)
        copies = (prompt.tables_needed - 1) * (each - self._before_last_piece(prompt, len(shared)))
        pages = each - len(shared) + copies + self._pages.held_alone(shared)
        return Need(shared, prompt.names[len(shared) :], pages, each * prompt.tables_needed)

    def has_room_for(self, prompt: Prompt) -> bool:
        """Whether it can be let in, as the pages are now."""
        need = self.need(prompt)
        return need.pages <= self.available() and need.entries <= self.entries_left

    def available(self, without: Sequence[int] = ()) -> int:
        """Pages that are free or hold prefixes that nobody uses, if these tables were empty."""
        return self._pages.free_without(without)

    def entries_of(self, tables: Sequence[int]) -> int:
        """Of the page tables, that these have."""
        return int(self._pages.count(tables).sum())

    def growth(self, slot_N: np.ndarray, rows_N: np.ndarray) -> np.ndarray:
        """How many pages more each slot needs to have so many rows."""
        return np.maximum(-(-rows_N // self.rows) - self._pages.count(slot_N), 0)

    def grow(self, table: int, pages: int) -> None:
        """Raises OutOfPagesError."""
        self._extend(table, pages)

    def let_in(self, prompt: Prompt, slots: Sequence[int]) -> None:
        """Pages for the whole prompt and the step behind it, and the cached prefix; `slots` are those it reserved.

        Samples share what stands before the prompt's last piece, which each gets for itself. Raises OutOfPagesError.
        """
        shared = self._cached(prompt)
        self._tree.refresh(prompt.names[: len(shared)])
        prompt.tables = list(slots) or [self._spare.pop()]
        prompt.done = len(shared) * self.rows
        each = self._pages_for(len(prompt.token_T) + self._tokens_per_step)
        first, *others = prompt.tables
        self._share(first, shared)
        self._extend(first, each - len(shared))
        common = self._pages.of_slot(first)[: self._before_last_piece(prompt, len(shared))]
        for table in others:
            self._share(table, common)
            self._extend(table, each - len(common))

    def advance(self, prompt: Prompt, tokens: int) -> None:
        """The rows of so many tokens more are stored; its full pages are kept for whoever has the same prefix."""
        prompt.done += tokens
        self._keep(prompt.tables[0], prompt.names[: prompt.done // self.rows])

    def leave(self, table: int) -> None:
        """The table is empty from now on."""
        self._pages.clear(table)
        self._table = None
        if table >= self._first_spare:
            self._spare.append(table)

    def leave_text(self, table: int, text_T: np.ndarray, key: str) -> None:
        """Likewise; the pages that this text fills, all of whose rows are stored, are kept as a prefix."""
        self._keep(table, self.names(text_T, key))
        self.leave(table)

    def row(self, table: int) -> np.ndarray:
        """page_J (i32)."""
        return self._pages.rows([table])[0]

    def tables(self, slot_N: np.ndarray) -> np.ndarray:
        """page_NJ (i32) of these slots: for the same `slot_N` the same array, until a table changes."""
        if self._table is None or self._table[0] is not slot_N:
            page_NJ = self._pages.rows(slot_N)
            page_NJ.flags.writeable = False
            self._table = slot_N, page_NJ
        return self._table[1]

    def check_integrity(self) -> None:
        """Raises AssertionError with what is wrong."""
        self._pages.check_integrity(self._tree)

    def _cached(self, prompt: Prompt) -> list[int]:
        """At least one token is left to be computed, and all of those whose log-probabilities are asked for."""
        if prompt.wants_logprobs:
            return []
        return self._tree.find(prompt.names[: (len(prompt.token_T) - 1) // self.rows])

    def _before_last_piece(self, prompt: Prompt, shared: int) -> int:
        """Pages before a prompt's last piece, when so many are shared."""
        left = len(prompt.token_T) - shared * self.rows
        return shared + (left - 1) // self.chunk * self.chunk // self.rows

    def _pages_for(self, tokens: int) -> int:
        return -(-min(tokens, self._longest) // self.rows)

    def _keep(self, table: int, names: Sequence[bytes]) -> None:
        self._tree.insert(names, self._pages.of_slot(table))

    def _share(self, table: int, pages: Sequence[int]) -> None:
        self._pages.share(table, pages)
        self._table = None

    def _extend(self, table: int, pages: int) -> None:
        self._tree.evict(pages - self._pages.free)
        self._pages.extend(table, pages)
        self._table = None
