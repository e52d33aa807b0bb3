"""Work rests behind each piece, as long as the machine is small."""

import asyncio

import pytest
from slipstream.server import rests
from slipstream.server.rests import Rests, rest_of


@pytest.mark.parametrize(("processors", "rest"), [(1, 15), (2, 7), (4, 3), (8, 1), (16, 0), (64, 0)])
def test_the_fewer_processors_the_longer_the_rest(processors, rest):
    assert rest_of(processors) == rest


@pytest.mark.parametrize("fails", [False, True])
def test_the_next_one_begins_when_the_rest_is_over(monkeypatch, fails):
    """What was done is told before, and what failed rests too."""
    monkeypatch.setattr(rests, "rest_of", lambda processors: 1e9)
    monkeypatch.setattr(rests, "MAX_REST_S", 3600)
    released = []

    async def scenario():
        place = Rests(1)

        async def work(name):
            async with place.place():
                released.append(name)
                if fails:
                    raise OSError(name)

        first, *_ = await asyncio.gather(work("first"), return_exceptions=True)
        assert isinstance(first, OSError) == fails
        second = asyncio.create_task(work("second"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert released == ["first"]
        second.cancel()

    asyncio.run(scenario())


def test_on_a_large_machine_nobody_rests(monkeypatch):
    monkeypatch.setattr(rests, "rest_of", lambda processors: 0.0)

    async def scenario():
        place, most, now = Rests(2), 0, 0

        async def work():
            nonlocal most, now
            async with place.place():
                now += 1
                most = max(most, now)
                await asyncio.sleep(0)
                now -= 1

        await asyncio.gather(*(work() for _ in range(9)))
        assert most == 2

    asyncio.run(scenario())
