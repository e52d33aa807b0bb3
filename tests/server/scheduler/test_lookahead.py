from itertools import count

from slipstream.server.scheduler.lookahead import Lookahead


def test_takes_what_is_looked_at_and_nothing_twice():
    numbers = count(1)
    ahead = Lookahead(numbers)
    assert ahead
    assert (ahead.at(2), ahead.at(0)) == (3, 1)
    assert next(numbers) == 4
    assert [item for item, _ in zip(ahead, range(4), strict=False)] == [1, 2, 3, 5]


def test_ends_where_the_items_do():
    assert not Lookahead()
    ahead = Lookahead("ab")
    assert (ahead.at(5), ahead.at(1), list(ahead), list(ahead)) == (None, "b", ["a", "b"], ["a", "b"])
