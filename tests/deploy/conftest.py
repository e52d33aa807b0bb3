"""What a running server tells, for all of deploy/ that names metrics."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families


@pytest.fixture(scope="package")
def series() -> set[str]:
    """The names of all series of a real scrape, histograms' parts among them."""
    from slipstream.server.config import WatchConfig

    from tests.server.calls import answer, serving, text_request
    from tests.server.observe.test_endpoint import get

    async def scrape() -> str:
        async with serving(watch=WatchConfig(metrics_port=0)) as (server, channel):
            await answer(channel, text_request("a"))
            _, text = await asyncio.to_thread(get, server.endpoint.address, "/metrics")
            return text

    families = text_string_to_metric_families(asyncio.run(scrape()))
    return {sample.name for family in families for sample in family.samples}
