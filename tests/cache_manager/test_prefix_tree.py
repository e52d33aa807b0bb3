"""Cached prefixes: found by their tokens, shared, and forgotten in the order that nobody asks for them."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from slipstream.cache_manager.pages import OutOfPagesError, Pages
from slipstream.cache_manager.prefix_tree import PrefixTree

R = 4


def text(*pages, tail=0):
    """Tokens of whole pages, each of one token repeated, and some behind them."""
    return [page for page in pages for _ in range(R)] + [99] * tail


@pytest.fixture
def pages():
    return Pages(pages=8, slots=3, pages_per_slot=6)


class Texts(PrefixTree):
    """Asked by tokens."""

    def of(self, tokens, key=""):
        """The pages that are cached, which are the youngest from now on."""
        names = self.names(tokens, key)
        found = self.find(names)
        self.refresh(names[: len(found)])
        return found

    def keep(self, tokens, pages, key=""):
        self.insert(self.names(tokens, key), pages)


@pytest.fixture
def tree(pages):
    return Texts(pages, R)


def cached(pages, tree, tokens, key=""):
    """A text that a slot computed, cached and left: its pages."""
    found = pages.extend(0, -(-len(tokens) // R))
    tree.keep(tokens, found, key)
    pages.clear(0)
    return found


def test_finds_the_longest_prefix_of_full_pages(pages, tree):
    one, two, three = cached(pages, tree, text(1, 2, 3))
    assert tree.of(text(1, 2, 3, 4)) == [one, two, three]
    assert tree.of(text(1, 2, tail=3)) == [one, two]
    assert tree.of(text(1, 3)) == [one]
    assert tree.of(text(2, 3)) == [], "the same page behind other tokens is another page"
    assert tree.of([1] * (R - 1)) == tree.of([]) == []
    pages.check_integrity(tree)


def test_the_last_page_is_not_cached_unless_it_is_full(pages, tree):
    cached(pages, tree, text(1, tail=3))
    assert (len(tree), pages.free) == (1, 7)


def test_keys_keep_apart(pages, tree):
    mine = cached(pages, tree, text(1, 2), key="mine")
    yours = cached(pages, tree, text(1, 2), key="yours")
    assert tree.of(text(1, 2), "mine") == mine
    assert tree.of(text(1, 2), "yours") == yours
    assert not {*mine} & {*yours}
    assert tree.of(text(1, 2)) == tree.of(text(1, 2), "min") == []


def test_what_is_cached_stays_when_it_is_computed_again(pages, tree):
    first = cached(pages, tree, text(1, 2))
    again = cached(pages, tree, text(1, 2, 3))
    assert tree.of(text(1, 2, 3)) == [*first, again[2]]
    assert pages.free == 8 - 3


def test_fewer_pages_than_the_text_fills_are_refused(pages, tree):
    with pytest.raises(ValueError, match="the text fills 3 pages, got 2"):
        tree.keep(text(1, 2, 3), pages.extend(0, 2))


def test_the_least_recently_asked_for_leaf_goes_first(pages, tree):
    one, two, three = cached(pages, tree, text(1, 2, 3))
    other = cached(pages, tree, text(1, 4))[1]
    tree.of(text(1, 2))
    assert list(tree) == [three, other, two, one]
    assert tree.evict(2) == 2
    assert tree.of(text(1, 2, 3)) == [one, two]
    assert tree.of(text(1, 4)) == [one]
    assert tree.evict(9) == 2
    assert (len(tree), pages.free) == (0, 8)
    pages.check_integrity(tree)


def test_shared_pages_are_not_evicted(pages, tree):
    one, two, three = cached(pages, tree, text(1, 2, 3))
    pages.share(1, tree.of(text(1, 2)))
    assert tree.evict(9) == 1
    assert list(tree) == [two, one]
    assert pages.references(three) == 0
    pages.clear(1)
    assert tree.evict(1) == 1
    assert tree.of(text(1, 2)) == [one]


def test_a_shared_page_that_eviction_meets_is_as_if_it_were_asked_for(pages, tree):
    """It is not met again by every call that follows."""
    one, two = cached(pages, tree, text(1, 2))
    pages.share(1, [one, two])
    three, four = cached(pages, tree, text(3, 4))
    assert list(tree) == [two, one, four, three]
    assert tree.evict(1) == 1
    assert list(tree) == [three, two, one]


TEXTS = st.lists(st.integers(0, 1), max_size=4).map(lambda bits: text(*bits))


class AnyOrder(RuleBasedStateMachine):
    """Slots that find, compute, cache and leave, and a pool that is too small for all of it. A page's content is what
    was computed for it last: what is found must be what was asked for."""

    def __init__(self):
        super().__init__()
        self.pages = Pages(pages=7, slots=2, pages_per_slot=4)
        self.tree = Texts(self.pages, R)
        self.content = {}

    @rule(slot=st.integers(0, 1), tokens=TEXTS, key=st.sampled_from(["", "salt"]))
    def request(self, slot, tokens, key):
        self.pages.clear(slot)
        shared = self.tree.of(tokens, key)
        for index, page in enumerate(shared):
            assert self.content[page] == (key, tuple(tokens[: (index + 1) * R]))
        self.pages.share(slot, shared)
        missing = len(tokens) // R - len(shared)
        self.tree.evict(missing - self.pages.free)
        try:
            new = self.pages.extend(slot, missing)
        except OutOfPagesError:
            assert self.tree.evict(1) == 0, "it gave up though a cached page could have gone"
            self.pages.clear(slot)
            return
        for index, page in enumerate(new, len(shared)):
            self.content[page] = (key, tuple(tokens[: (index + 1) * R]))
        self.tree.keep(tokens, self.pages.of_slot(slot), key)

    @rule(slot=st.integers(0, 1))
    def leave(self, slot):
        self.pages.clear(slot)

    @rule(count=st.integers(0, 3))
    def evict(self, count):
        free = self.pages.free
        assert self.tree.evict(count) == self.pages.free - free <= count

    @invariant()
    def nothing_is_lost(self):
        self.pages.check_integrity(self.tree)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
