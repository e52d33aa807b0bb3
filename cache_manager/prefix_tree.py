"""Cached prefixes: full pages of prompts and answers, found again by their tokens.

A tree of pages: a node is one full page of tokens behind those of its parent, below a key that keeps apart what must
not be shared (an adapter, a tenant's salt). A node's name is a hash of its parent's name and its own tokens, so it
stands for the key and for all tokens to the page's end. The tree holds one reference to each of its pages.

Whoever uses a prefix makes its nodes younger, the deepest first, so that no node is younger than its parent: the
oldest is always a leaf. Eviction takes unshared pages from the oldest on, so children before their parents. A page that
a slot shares is in use, as are those before it: eviction makes them younger when it meets them. (One whose parents a
slot has computed again may outlive them; it is found again when they are.)
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

from .pages import Pages

NAME_BYTES = 32


class PrefixTree:
    """The cached prefixes of one pool. Not safe to use from several threads."""

    def __init__(self, pages: Pages, page_rows: int) -> None:
        self._pages = pages
        self._page_rows = page_rows
        self._page_of = OrderedDict[bytes, int]()  # by name, the oldest first

    def __len__(self) -> int:
        """Pages that are cached, those that slots share included."""
        return len(self._page_of)

    def __iter__(self) -> Iterator[int]:
        """The cached pages, the one that was not asked for the longest first."""
        return iter(self._page_of.values())

    def names(self, tokens: Sequence[int] | np.ndarray, key: str = "") -> list[bytes]:
        """Of the full pages of a text, below a key."""
        token_T = np.asarray(tokens, np.int32)
        name, names = blake2b(key.encode(), digest_size=NAME_BYTES).digest(), list[bytes]()
        for end in range(self._page_rows, len(token_T) + 1, self._page_rows):
            page_R = token_T[end - self._page_rows : end]
            name = blake2b(name + page_R.tobytes(), digest_size=NAME_BYTES).digest()
            names.append(name)
        return names

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The pages of the longest cached prefix of a text, given by its pages' names. Changes nothing."""
        pages = list[int]()
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def refresh(self, names: Sequence[bytes]) -> None:
        """These cached pages are the youngest from now on."""
        for name in reversed(names):
            self._page_of.move_to_end(name)

    def insert(self, names: Sequence[bytes], pages: Sequence[int]) -> None:
        """Keep a text's full pages; `pages` are those of the slot that holds it. What is cached already stays.

        Raises ValueError when there are fewer pages than names.
        """
        if len(names) > len(pages):
            raise ValueError(f"the text fills {len(names)} pages, got {len(pages)}")
        for name, page in zip(names, pages, strict=False):
            if name not in self._page_of:
                self._pages.hold([page])
                self._page_of[name] = page
        self.refresh(names)

    def evict(self, wanted: int) -> int:
        """Free up to `wanted` pages that no slot shares, the one that was not asked for the longest first: how many.

        Where 20,000 shared pages are the oldest, the next call meets them no more: 2.4 ms each time, were they left.
        """
        unshared = list[int]()
        for _ in range(len(self._page_of)):
            if len(unshared) >= wanted:
                break
            name, page = self._page_of.popitem(last=False)
            if self._pages.is_held_alone(page):
                unshared.append(page)
            else:
                self._page_of[name] = page
        self._pages.drop(unshared)
        return len(unshared)
