"""The gateway by itself."""

import asyncio
from typing import Any

import pytest
from slipstream.server.errors import UnavailableError
from slipstream.server.gateway import Gateway, Lane
from slipstream.server.request.grammar import Grammar
from slipstream.server.request.request import Request

from tests.fakes import FakeEngine
from tests.server.scheduler.loop import Asked


class Roomy:
    """All that is asked of an orchestrator before a request is handed in."""

    def check_room(self, client):
        pass


def test_a_server_that_stops_while_a_call_is_read_does_not_begin_to_compile_its_grammar():
    async def scenario():
        gateway, loop = Gateway(), asyncio.get_running_loop()
        orchestrator: Any = Roomy()
        gateway.open(FakeEngine(), orchestrator)

        def read(engine, deliver_to) -> list[Request]:
            loop.call_soon_threadsafe(gateway.close, "the server is stopping")
            return [Asked("a", grammar=Grammar("hello"))]

        with pytest.raises(UnavailableError, match="the server is stopping"):
            async with gateway.admit(read, Lane.TEXT, "me", lambda name: None):
                raise AssertionError("it was admitted")

    asyncio.run(scenario())
