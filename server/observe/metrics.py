"""What the server counts, for Prometheus and for the status line. Knows requests by their ends only, never their text.

slipstream_requests_total{outcome}       ok | cancelled | deadline | rejected | failed
slipstream_{queue,ttft,tpot,e2e}_seconds  of requests that were admitted
slipstream_{prefill,decode_step}_seconds  of the engine
slipstream_pages{state}                   free | live | cached
slipstream_serving                        1 while health checks say SERVING, else 0
slipstream_startup_seconds{stage}         imports | loading | tracing | compiling | rest
slipstream_compilations_after_warmup_total must stay 0: a program compiled under traffic stalls every slot
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .routers import AdapterNames, RouterNames

log = logging.getLogger(__name__)

STEP_S = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
WAIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ANSWER_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
"""Upper edges of the histograms' buckets (seconds)."""

STEP_TOKENS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
"""Likewise (tokens)."""

RECENT = 128
"""Times to first token that the status line's median is taken of (requests)."""


class Outcome(Enum):
    """How a request ended."""

    OK = "ok"
    """Answered: a stop or max_tokens."""
    CANCELLED = "cancelled"
    """The caller left, or the server stopped."""
    DEADLINE = "deadline"
    """The caller's deadline came first."""
    REJECTED = "rejected"
    """Refused at admission: the queue was full, or the server not serving."""
    FAILED = "failed"
    """The engine failed."""


class Metrics:
    """One per server, with a registry of its own. Every method may be called from any thread and takes microseconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests by how they ended", labels=["outcome"])
        for outcome in Outcome:
            self._requests.labels(outcome.value)  # a series that is there from the start: rate() sees its first event
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that were admitted and ended")
        self._generated_tokens = self._counter("generated_tokens", "Answer tokens delivered, stop tokens left out")
        self._startup_s = self._gauge("startup_seconds", "From the process's start to SERVING, by stage", ["stage"])
        self._serving = self._gauge("serving", "1 while health checks say SERVING, else 0")
        self._slots = self._gauge("slots", "Decode slots")
        self._slots_in_use = self._gauge("slots_in_use", "Decode slots that hold a request")
        self._queue_depth = self._gauge("queue_depth", "Requests that wait for a slot")
        self._pages = _Pages()
        self.registry.register(self._pages)
        self._queue_s = self._histogram("queue", "From admission to prefill", WAIT_S)
        self._ttft_s = self._histogram("ttft", "From admission to the first token", WAIT_S)
        self._tpot_s = self._histogram("tpot", "Mean time of the tokens after the first", STEP_S)
        self._e2e_s = self._histogram("e2e", "From admission to the request's end", ANSWER_S)
        self._prefill_s = self._histogram(
            "prefill", "A piece of a prompt, or several together, apart from steps", WAIT_S
        )
        self._step_s = self._histogram(
            "decode_step", "One decode step of the slots in use, with the piece that it carries", STEP_S
        )
        self._slot_steps = self._counter(
            "decode_slot_steps", "Slots in use, summed over decode steps: tokens as they come"
        )
        self._preemptions = self._counter("preemptions", "Requests that gave their pages back and go on later")
        self._drafts = self._counter(
            "draft_tokens", "Drafts that took part in steps, by whether they were right", labels=["outcome"]
        )
        for outcome in ("accepted", "rejected"):
            self._drafts.labels(outcome)
        self._step_tokens = Histogram(
            "slipstream_step_tokens",
            "Tokens that a decode step brought, a slot in use",
            buckets=STEP_TOKENS,
            registry=self.registry,
        )
        self._prefix_cached_tokens = self._counter(
            "prefix_cached_tokens", "Prompt tokens that came from cached prefixes instead of being computed"
        )
        self._recent_ttft_s: deque[float] = deque(maxlen=RECENT)
        self._lock = threading.Lock()  # of the line above; Prometheus' own objects have theirs
        ProcessCollector(registry=self.registry)

    def watch(
        self,
        *,
        queue_depth: Callable[[], int],
        slots_in_use: Callable[[], int],
        slots: int,
        pages: Callable[[], Mapping[str, int]],
    ) -> None:
        """Gauges, asked at every scrape, from whatever thread scrapes. `pages()`: how many are "free", how many "live",
        in a slot's table, and how many "cached" alone."""
        self._slots.set(slots)
        self._slots_in_use.set_function(slots_in_use)
        self._queue_depth.set_function(queue_depth)
        self._pages.ask = pages

    def watch_for_routers(self, names: RouterNames | AdapterNames) -> None:
        """Called once for each: the load under the names that routers and autoscalers know."""
        self.registry.register(names)

    def watch_devices(self, devices: Sequence[Any], compilations: Callable[[], int]) -> None:
        """Called once, when all is warm. `devices` (JAX's) tell their memory from now on. `compilations()` counts the
        programs compiled so far: what it grows by from now on was compiled too late."""
        self.registry.register(_Devices(devices, compilations))

    def serving(self, is_ready: bool) -> None:
        """What health checks say from now on."""
        self._serving.set(is_ready)

    def started(self, stages: Mapping[str, float]) -> None:
        """The start is over: how long each of its stages took (seconds)."""
        for stage, seconds in stages.items():
            self._startup_s.labels(stage).set(seconds)

    def rejected(self) -> None:
        """A request was refused at admission."""
        self._requests.labels(Outcome.REJECTED.value).inc()

    def ended(
        self,
        outcome: Outcome,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        generated_tokens: int,
        queue_s: float | None,
        ttft_s: float | None,
        tpot_s: float | None,
        e2e_s: float,
        request_id: str = "",
    ) -> None:
        """An admitted request has ended: counts it and logs its one line.

        Times (seconds) run from admission; None where the request did not come so far, tpot_s also for one token.
        """
        self._requests.labels(outcome.value).inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._generated_tokens.inc(generated_tokens)
        times = ((self._queue_s, queue_s), (self._ttft_s, ttft_s), (self._tpot_s, tpot_s), (self._e2e_s, e2e_s))
        for histogram, seconds in times:
            if seconds is not None:
                histogram.observe(seconds)
        if ttft_s is not None:
            with self._lock:
                self._recent_ttft_s.append(ttft_s)
        fields = {
            "request_id": request_id,
            "outcome": outcome.value,
            "prompt_tokens": prompt_tokens,
            "cached_tokens": cached_tokens,
            "generated_tokens": generated_tokens,
            "queue_ms": _ms(queue_s),
            "ttft_ms": _ms(ttft_s),
            "total_ms": _ms(e2e_s),
        }
        log.info("request ended", extra={"fields": fields})

    def preempted(self) -> None:
        """A request gave its pages back, and waits to go on."""
        self._preemptions.inc()

    def prefix_cached(self, tokens: int) -> None:
        """So many tokens of a prompt came from a cached prefix."""
        self._prefix_cached_tokens.inc(tokens)

    def prefill(self, seconds: float) -> None:
        """A piece of a prompt, or several short prompts together, were computed."""
        self._prefill_s.observe(seconds)

    def step(self, seconds: float, slots: int) -> None:
        """One decode step was run for so many slots in use, and its tokens read."""
        self._step_s.observe(seconds)
        self._slot_steps.inc(slots)

    def tokens(self, tokens_per_slot: float) -> None:
        """That a decode step brought, the mean of its slots in use."""
        self._step_tokens.observe(tokens_per_slot)

    def drafts(self, *, accepted: int, rejected: int) -> None:
        """That took part in one decode step."""
        self._drafts.labels("accepted").inc(accepted)
        self._drafts.labels("rejected").inc(rejected)

    @property
    def recent_ttft_s(self) -> list[float]:
        """The last requests' times to first token (seconds), at most RECENT."""
        with self._lock:
            return list(self._recent_ttft_s)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"slipstream_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(f"slipstream_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, edges_s: Sequence[float]) -> Histogram:
        return Histogram(f"slipstream_{name}_seconds", text, buckets=edges_s, registry=self.registry)


class _Pages(Collector):
    """Asked once a scrape, so that the states add up to the pool."""

    def __init__(self) -> None:
        self.ask: Callable[[], Mapping[str, int]] = dict
        """How many pages, by state."""

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily("slipstream_pages", "Pages of the cache by who has them", labels=["state"])
        for state, count in self.ask().items():
            family.add_metric([state], count)
        yield family


class _Devices(Collector):
    """Asked at every scrape: what the devices hold, and what was compiled since this was made."""

    KINDS = (("in_use", "bytes_in_use"), ("peak", "peak_bytes_in_use"), ("limit", "bytes_limit"))

    def __init__(self, devices: Sequence[Any], compilations: Callable[[], int]) -> None:
        self._devices, self._compilations, self._warm = devices, compilations, compilations()

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        yield CounterMetricFamily(
            "slipstream_compilations_after_warmup",
            "Programs compiled under traffic; anything above 0 is a bug",
            value=self._compilations() - self._warm,
        )
        memory = GaugeMetricFamily(
            "slipstream_device_memory_bytes", "Device memory, where the backend tells it", labels=["device", "kind"]
        )
        for device in self._devices:
            stats = device.memory_stats() or {}  # None on CPUs
            for kind, key in self.KINDS:
                if key in stats:
                    memory.add_metric([str(device), kind], stats[key])
        yield memory


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
