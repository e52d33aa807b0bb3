"""What a running server tells, for all of deploy/ that names metrics."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

Series = dict[str, list[dict[str, str]]]
"""The labels of each series of a real scrape, by name; histograms' parts are there too."""


@pytest.fixture(scope="package")
def series() -> Series:
    from slipstream.server.config import WatchConfig

    from tests.server.calls import answer, serving, text_request
    from tests.server.observe.test_endpoint import get

    async def scrape() -> str:
        async with serving(watch=WatchConfig(metrics_port=0)) as (server, channel):
            await answer(channel, text_request("a"))
            _, text = await asyncio.to_thread(get, server.endpoint.address, "/metrics")
            return text

    found: Series = {}
    for family in text_string_to_metric_families(asyncio.run(scrape())):
        found.setdefault(family.name, [])
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found
