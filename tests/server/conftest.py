"""A fake engine behind the real command line, and a real server for clients that block."""

import asyncio
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from slipstream.server.config import ServerConfig
from slipstream.server.lifecycle import Serving

from tests.fakes import FakeEngine


@pytest.fixture
def fake_engine(monkeypatch):
    """What the command line loads, whatever model it is asked for."""
    engine = FakeEngine()
    loading = SimpleNamespace(load_engine=lambda config: (engine, None))
    monkeypatch.setitem(sys.modules, "slipstream.engine_impl.loading", loading)
    return engine


@contextmanager
def serving_in_thread(engine, *, max_queued=256):
    """host:port of a server that runs beside the test."""
    started, loops = threading.Event(), []

    async def serve():
        async with Serving(lambda: (engine, None), ServerConfig(port=0, grace_s=1.0, max_queued=max_queued)) as serving:
            loops.append((asyncio.get_running_loop(), serving))
            started.set()
            await serving.stop_requested.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(10)
    loop, serving = loops[0]
    try:
        yield serving.address
    finally:
        loop.call_soon_threadsafe(serving.stop_requested.set)
        thread.join(10)


@pytest.fixture
def target(fake_engine):
    """host:port of a server over `fake_engine`."""
    with serving_in_thread(fake_engine) as address:
        yield address
