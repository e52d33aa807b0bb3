"""A real server with a fake engine, and OpenAI's own client."""

from contextlib import asynccontextmanager

from openai import AsyncOpenAI
from slipstream.server.config import ServerConfig
from slipstream.server.lifecycle import Serving

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S


def url(server, path=""):
    return f"http://{server.http_address}{path}"


def client_of(server, token="none", **more):
    return AsyncOpenAI(base_url=url(server, "/v1"), api_key=token, max_retries=0, timeout=WAIT_S, **more)


@asynccontextmanager
async def serving(engine=None, **config):
    """(Serving, AsyncOpenAI)"""
    engine = engine or FakeEngine()
    config = ServerConfig(**{"port": 0, "http_port": 0, "grace_s": 5.0, "probe_interval_s": 0} | config)
    async with Serving(lambda: (engine, None), config) as server, client_of(server) as client:
        yield server, client
