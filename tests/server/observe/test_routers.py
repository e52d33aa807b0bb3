"""The load under the names that routers and autoscalers read, by Prometheus' own parser."""

import asyncio
import threading
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from slipstream.server.config import WatchConfig
from slipstream.server.observe.metrics import Metrics
from slipstream.server.observe.routers import RouterNames

from tests.fakes import FakeEngine
from tests.server.calls import answer, serving, text_request
from tests.server.observe.test_endpoint import get
from tests.server.scheduler.loop import Asked, running, until

OPERATING = (Path(__file__).parents[3] / "docs" / "operating.md").read_text()


def scraped(text: str) -> dict[str, tuple[str, float, dict[str, str]]]:
    """(type, value, labels) by name, of gauges with one series."""
    families = text_string_to_metric_families(text)
    return {one.name: (one.type, one.samples[0].value, one.samples[0].labels) for one in families if one.samples}


def of_routers(metrics: Metrics) -> dict[str, tuple[str, float, dict[str, str]]]:
    found = scraped(generate_latest(metrics.registry).decode())
    return {name: value for name, value in found.items() if not name.startswith(("slipstream_", "process_"))}


def test_a_busy_server_as_routers_see_it():
    """Two slots decode, of the 32 pages of 16 tokens each holds one, and a third request waits."""
    engine, metrics = FakeEngine(pace=threading.Semaphore(0)), Metrics()
    with running(engine, metrics=metrics) as orchestrator:
        requests = [Asked("a", 5) for _ in range(3)]
        orchestrator.submit(*requests)  # at once: the loop stands still at the first step that it reads
        until(lambda: engine.steps and orchestrator.slots_in_use == 2)
        model = {"model_name": "fake"}
        assert of_routers(metrics) == {
            "vllm:num_requests_waiting": ("gauge", 1, model),
            "vllm:num_requests_running": ("gauge", 2, model),
            "vllm:kv_cache_usage_perc": ("gauge", 2 / 32, model),
            "vllm:cache_config_info": ("gauge", 1, model | {"block_size": "16", "num_gpu_blocks": "32"}),
            "jetstream_prefill_backlog_size": ("gauge", 1, {}),
            "jetstream_slots_used_percentage": ("gauge", 1, {}),
        }
        engine.pace.release(100)
        for request in requests:
            request.all()
        until(lambda: not orchestrator.slots_in_use)
        loads = ("waiting", "running")
        assert [of_routers(metrics)[f"vllm:num_requests_{load}"][1] for load in loads] == [0, 0]
        assert of_routers(metrics)["jetstream_slots_used_percentage"][1] == 0


def test_cached_prefixes_count_as_free():
    metrics = Metrics()
    metrics.watch_for_routers(
        RouterNames(
            model="m",
            page_rows=16,
            waiting=int,
            running=int,
            slots_used=float,
            pages=lambda: {"free": 1, "live": 3, "cached": 4},
        )
    )
    assert of_routers(metrics)["vllm:kv_cache_usage_perc"][1] == 3 / 8


def test_a_real_scrape_has_them_and_whether_it_serves():
    async def scenario():
        async with serving(watch=WatchConfig(metrics_port=0)) as (server, channel):
            await answer(channel, text_request("a"))
            status, text = await asyncio.to_thread(get, server.endpoint.address, "/metrics")
            assert status == 200
            found = scraped(text)
            assert found["vllm:num_requests_waiting"] == ("gauge", 0, {"model_name": "fake"})
            assert found["slipstream_serving"][:2] == ("gauge", 1)
        return server

    server = asyncio.run(scenario())
    assert server.metrics.registry.get_sample_value("slipstream_serving") == 0


def test_the_docs_name_them_all():
    names = RouterNames(model="m", page_rows=1, waiting=int, running=int, slots_used=float, pages=dict).collect()
    assert [name for name in (family.name for family in names) if f"`{name}" not in OPERATING] == []
