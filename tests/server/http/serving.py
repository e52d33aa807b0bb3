"""A real server with a fake engine, and OpenAI's own client."""

from contextlib import asynccontextmanager
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from slipstream.server.config import ServerConfig

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S, LoadedServing


def url(server, path=""):
    return f"http://{server.http_address}{path}"


def plain_http():
    """The clients' own transport, less the certificates of all authorities: to read them takes 20 ms each time."""
    return DefaultAsyncHttpxClient(verify=False)


def client_of(server, token="none", **more):
    """OpenAI's."""
    options: dict[str, Any] = {"max_retries": 0, "timeout": WAIT_S, "http_client": plain_http()}
    return AsyncOpenAI(base_url=url(server, "/v1"), api_key=token, **options | more)


def anthropics_client_of(server, key="none"):
    from anthropic import AsyncAnthropic  # takes two seconds, which processes that run other tests are spared

    return AsyncAnthropic(base_url=url(server), api_key=key, max_retries=0, timeout=WAIT_S, http_client=plain_http())


@asynccontextmanager
async def serving(engine=None, **config):
    """(Serving, AsyncOpenAI)"""
    engine = engine or FakeEngine()
    settings: dict[str, Any] = {"port": 0, "http_port": 0, "grace_s": 5.0, "probe_interval_s": 0, **config}
    async with LoadedServing(lambda: (engine, None), ServerConfig(**settings)) as server, client_of(server) as client:
        yield server, client
