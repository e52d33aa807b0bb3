"""The host's page allocator: what it gives away it does not have, and what is given back it has again."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from slipstream.cache_manager.pages import OutOfPagesError, Pages

POOL, SLOTS, WIDTH = 10, 4, 5


def test_a_slots_pages_by_hand():
    pages = Pages(pages=6, slots=2, pages_per_slot=4)
    assert pages.extend(1, 2) == [0, 1]
    pages.share(0, [1])
    assert pages.extend(0, 1) == [2]
    assert pages.page_BJ.tolist() == [[1, 2, 0, 0], [0, 1, 0, 0]]
    assert [pages.references(page) for page in range(4)] == [1, 2, 1, 0]
    pages.clear(1)
    assert (pages.of_slot(0), pages.of_slot(1), pages.free) == ([1, 2], [], 4)
    pages.check_integrity()


def test_the_table_is_a_copy():
    """A step that was given a table keeps it, whatever happens meanwhile."""
    pages = Pages(pages=2, slots=1, pages_per_slot=2)
    before = pages.page_BJ
    pages.extend(0, 2)
    assert before.tolist() == [[0, 0]]


def test_refuses_and_changes_nothing():
    pages = Pages(pages=3, slots=2, pages_per_slot=2)
    pages.extend(0, 2)
    with pytest.raises(OutOfPagesError, match="wanted=2 pages, but only free=1") as told:
        pages.extend(1, 2)
    assert (told.value.wanted, told.value.free) == (2, 1)
    with pytest.raises(ValueError, match="slot=0 has 2 pages and cannot have 1 more: at most 2"):
        pages.extend(0, 1)
    for use_free in (lambda: pages.share(1, [2]), lambda: pages.hold([0, 2])):
        with pytest.raises(ValueError, match=r"pages \[2\] are free"):
            use_free()
    with pytest.raises(ValueError, match=r"pages \[0, 2\] are not held"):
        pages.drop([0, 2])
    assert (pages.free, pages.of_slot(0), pages.of_slot(1)) == (1, [0, 1], [])
    pages.check_integrity()


def test_tables_have_so_many_entries_together():
    """However many pages are free, and those that are shared count for each."""
    pages = Pages(pages=9, slots=3, pages_per_slot=4, max_entries=5)
    first = pages.extend(0, 3)
    pages.share(1, first[:1])
    for more in (lambda: pages.extend(2, 2), lambda: pages.share(2, first[:2])):
        with pytest.raises(OutOfPagesError, match="wanted=2 entries of the page tables, but only free=1"):
            more()
    pages.clear(0)
    assert pages.entries_left == 4
    pages.extend(2, 4)
    pages.check_integrity()


def test_what_would_be_free_without_some():
    pages = Pages(pages=9, slots=3, pages_per_slot=4)
    first = pages.extend(0, 3)
    pages.share(1, first[:2])
    pages.extend(1, 1)
    pages.hold(first[1:])
    assert [pages.free_without(slots) for slots in ((), (0,), (1,), (0, 1))] == [5, 6, 6, 9]
    pages.clear(0)
    assert [pages.free_without(slots) for slots in ((), (1,))] == [6, 9], "one is held alone, and would be free"
    assert [pages.held_alone(some) for some in ((), first[:1], first, [*first[1:], 8])] == [0, 0, 1, 1]
    pages.extend(0, 1)
    assert (pages.free, pages.rows([1, 0]).tolist()) == (4, [[0, 1, 3, 0], [4, 0, 0, 0]])
    assert pages.count([2, 0]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda pages: pages._page_BJ.__setitem__((0, 3), 7), "slot=0 has 2 pages, but entries behind them"),
        (lambda pages: pages._page_BJ.__setitem__((0, 1), pages._page_BJ[0, 0]), "slot=0 has a page twice"),
        (lambda pages: pages._page_BJ.__setitem__((0, 1), POOL), "outside the pool of 10"),
        (lambda pages: pages._references_P.__setitem__(0, 2), r"pages \[0\] have counts \[2\].* to \[1\] times"),
        (lambda pages: pages._free.append(0), "referred to by nobody"),
        (lambda pages: pages._free.pop(), "referred to by nobody"),
        (lambda pages: pages._page_BJ.__setitem__((0, 1), 9), r"pages \[1, 9\] have counts"),
    ],
)
def test_finds_damage(damage, told):
    pages = Pages(pages=POOL, slots=SLOTS, pages_per_slot=WIDTH)
    pages.extend(0, 2)
    pages.check_integrity()
    damage(pages)
    with pytest.raises(AssertionError, match=told):
        pages.check_integrity()


def test_counts_what_is_held_outside():
    pages = Pages(pages=POOL, slots=SLOTS, pages_per_slot=WIDTH)
    held = pages.extend(0, 2)
    pages.hold(held)
    pages.clear(0)
    assert pages.free == POOL - 2
    pages.check_integrity(held)
    with pytest.raises(AssertionError, match=r"counts \[1, 1\], but are referred to \[0, 0\]"):
        pages.check_integrity()


class AnyOrder(RuleBasedStateMachine):
    """Against tables as plain lists; a page is free exactly when it is in none."""

    def __init__(self):
        super().__init__()
        self.pages = Pages(pages=POOL, slots=SLOTS, pages_per_slot=WIDTH)
        self.tables = [[] for _ in range(SLOTS)]
        self.held = []

    def used(self):
        return {page for pages in (*self.tables, self.held) for page in pages}

    @rule(slot=st.integers(0, SLOTS - 1), count=st.integers(0, WIDTH + 1))
    def extend(self, slot, count):
        free = POOL - len(self.used())
        if len(self.tables[slot]) + count > WIDTH:
            with pytest.raises(ValueError, match="at most 5"):
                self.pages.extend(slot, count)
        elif count > free:
            with pytest.raises(OutOfPagesError):
                self.pages.extend(slot, count)
        else:
            new = self.pages.extend(slot, count)
            assert not {*new} & self.used(), "given to two"
            self.tables[slot] += new

    @rule(slot=st.integers(0, SLOTS - 1), other=st.integers(0, SLOTS - 1), count=st.integers(0, WIDTH))
    def share(self, slot, other, count):
        """A slot begins with what another has."""
        if not self.tables[slot]:
            shared = self.tables[other][:count]
            self.pages.share(slot, shared)
            self.tables[slot] += shared

    @rule(slot=st.integers(0, SLOTS - 1))
    def clear(self, slot):
        self.pages.clear(slot)
        self.tables[slot] = []

    @rule(slot=st.integers(0, SLOTS - 1), count=st.integers(0, WIDTH))
    def hold(self, slot, count):
        self.pages.hold(self.tables[slot][:count])
        self.held += self.tables[slot][:count]

    @rule(count=st.integers(0, POOL))
    def drop(self, count):
        self.pages.drop(self.held[:count])
        self.held = self.held[count:]

    @invariant()
    def equals_the_lists(self):
        self.pages.check_integrity(self.held)
        assert [self.pages.of_slot(slot) for slot in range(SLOTS)] == self.tables
        padded = [table + [0] * (WIDTH - len(table)) for table in self.tables]
        np.testing.assert_array_equal(self.pages.page_BJ, np.array(padded, np.int32))
        assert self.pages.free == POOL - len(self.used())


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
