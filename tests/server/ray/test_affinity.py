"""A prompt goes where most of its beginning is known, unless that replica is too busy."""

from slipstream.server.ray import affinity
from slipstream.server.ray.affinity import Affinity

CHAIN = [b"system", b"turn 1", b"turn 2"]
IDLE = {"a": 0, "b": 0, "c": 0}


def test_it_goes_where_its_longest_beginning_went():
    router = Affinity[str](slack=4)
    router.remember(CHAIN[:1], "a")
    router.remember(CHAIN[:2], "b")
    router.remember([b"other"], "c")
    assert router.ranked(CHAIN, IDLE)[0] == "b"
    assert router.ranked([b"system", b"another"], IDLE)[0] == "b"
    router.remember([b"system", b"another"], "a")
    assert router.ranked(CHAIN, IDLE)[0] == "b"


def test_slack_is_the_most_by_which_it_may_be_busier():
    router = Affinity[str](slack=4)
    router.remember(CHAIN, "a")
    assert router.ranked(CHAIN, {"a": 5, "b": 1, "c": 2}) == ["a", "b", "c"]
    assert router.ranked(CHAIN, {"a": 6, "b": 1, "c": 2}) == ["b", "c", "a"]


def test_a_shorter_beginning_elsewhere_is_next():
    router = Affinity[str](slack=4)
    router.remember(CHAIN, "a")
    router.remember(CHAIN[:1], "b")
    assert router.ranked(CHAIN, {"a": 9, "b": 2, "c": 0})[0] == "b"


def test_a_replica_that_is_gone_is_not_chosen():
    router = Affinity[str](slack=4)
    router.remember(CHAIN, "a")
    assert router.ranked(CHAIN, {"b": 1, "c": 0}) == ["c", "b"]
    assert router.ranked(CHAIN, {}) == []


def test_routers_that_know_nothing_agree_and_prompts_are_spread():
    chains = [[bytes([number])] for number in range(60)]
    first = [Affinity[str](slack=4).ranked(chain, IDLE)[0] for chain in chains]
    assert first == [Affinity[str](slack=4).ranked(chain, dict(reversed(IDLE.items())))[0] for chain in chains]
    assert min(first.count(replica) for replica in IDLE) > 5


def test_without_a_chain_the_least_busy_is_first_and_equals_are_spread():
    router = Affinity[str](slack=4)
    assert router.ranked([], {"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]
    assert {router.ranked([], IDLE)[0] for _ in range(200)} == set(IDLE)


def test_memory_has_a_limit_and_what_was_not_asked_for_goes_first(monkeypatch):
    monkeypatch.setattr(affinity, "MOST_KNOWN", 2)
    router = Affinity[str](slack=4)
    for block, replica in ((b"1", "a"), (b"2", "b"), (b"1", "a"), (b"3", "c")):
        router.remember([block], replica)
    busy = {"a": 3, "b": 3, "c": 3, "d": 0}
    assert [router.ranked([block], busy)[0] for block in (b"1", b"2", b"3")] == ["a", "d", "c"]
