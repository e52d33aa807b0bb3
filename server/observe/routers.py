"""The load once more, under the names that routers and autoscalers read by themselves: those of vLLM, which the Gateway
API's endpoint picker asks for, and those of JetStream, which GKE's examples scale by.

vllm:num_requests_waiting       requests in the queue
vllm:num_requests_running       requests taken from the queue and not at their end, pre-empted ones too
vllm:kv_cache_usage_perc        pages that slots hold, of all (0 to 1); cached prefixes count as free: they make room
vllm:cache_config_info          1; its labels tell a page's tokens (block_size) and the pages (num_gpu_blocks)
vllm:lora_requests_info         where there are adapters: their names are labels, the value is when it was asked
jetstream_prefill_backlog_size  requests in the queue
jetstream_slots_used_percentage decode slots in use, of all (0 to 1)
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterNames(Collector):
    """Asked at every scrape, from whatever thread scrapes."""

    model: str
    page_rows: int
    """Of a page (tokens)."""
    waiting: Callable[[], int]
    """Requests in the queue."""
    running: Callable[[], int]
    """Requests that have left it and are not at their end."""
    slots_used: Callable[[], float]
    """Of all slots (0 to 1)."""
    pages: Callable[[], Mapping[str, int]]
    """How many are "free", "live" and "cached"."""

    def collect(self) -> Iterable[GaugeMetricFamily]:
        pages = self.pages()
        pool, waiting = sum(pages.values()), self.waiting()
        usage = pages.get("live", 0) / max(1, pool)
        yield self._of_model("num_requests_waiting", "Requests in the queue", waiting)
        yield self._of_model(
            "num_requests_running", "Requests taken from the queue and not at their end", self.running()
        )
        yield self._of_model("kv_cache_usage_perc", "Pages of the cache that slots hold, of all (0 to 1)", usage)
        sizes = {"block_size": str(self.page_rows), "num_gpu_blocks": str(pool)}
        yield self._of_model("cache_config_info", "A page's tokens and how many pages there are", 1, sizes)
        yield GaugeMetricFamily("jetstream_prefill_backlog_size", "Requests in the queue", value=waiting)
        yield GaugeMetricFamily(
            "jetstream_slots_used_percentage", "Decode slots in use, of all (0 to 1)", value=self.slots_used()
        )

    def _of_model(
        self, name: str, text: str, value: float, labels: Mapping[str, str] | None = None
    ) -> GaugeMetricFamily:
        labels = {"model_name": self.model, **(labels or {})}
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family


@dataclass(frozen=True, eq=False)
class AdapterNames(Collector):
    """Which adapters requests use, likewise."""

    most: int
    """On the devices at once."""
    names: Callable[[], tuple[Collection[str], Collection[str]]]
    """Of those that run, and of those that requests wait for."""

    def collect(self) -> Iterable[GaugeMetricFamily]:
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters that requests use", labels=labels)
        family.add_metric([str(self.most), *(",".join(sorted(names)) for names in self.names())], time.time())
        yield family
