"""Who is on the devices: the used stay, of the others the one that was used longest ago goes."""

import pytest
from slipstream.server.request.adapter import LoadedAdapter
from slipstream.server.scheduler.residents import Residents

from tests.fakes import FakeAdapter


def adapters(names):
    return [LoadedAdapter(name, "x-1", FakeAdapter("x-1")) for name in names]


def test_no_adapter_is_index_0():
    assert Residents(0).find(None) == 0


def test_places_are_given_from_1_and_taken_from_the_longest_unused():
    residents, (a, b, c, d) = Residents(2), adapters("abcd")
    assert [residents.place(a, []), residents.place(b, [])] == [1, 2]
    assert residents.find(a) == 1  # so b was used longer ago
    assert residents.place(c, []) == 2
    assert residents.find(b) is None
    assert residents.adapters == {a, c}
    assert residents.place(d, [a]) == 2
    with pytest.raises(ValueError, match="all 2 adapters"):
        residents.place(b, [a, d])


def test_whoever_is_unloaded_goes_first():
    residents, (a, b, c) = Residents(2), adapters("abc")
    residents.place(a, [])
    residents.place(b, [])
    b.is_served = False
    assert residents.place(c, []) == 2
    assert residents.find(a) == 1
