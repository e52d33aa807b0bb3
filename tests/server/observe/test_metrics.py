"""What Prometheus is told."""

import logging
import threading

import pytest
from prometheus_client import generate_latest
from slipstream.server.observe.metrics import RECENT, Metrics, Outcome


@pytest.fixture
def metrics():
    return Metrics()


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"slipstream_{name}", labels)


def end(metrics, outcome=Outcome.OK, **changes):
    facts = {
        "prompt_tokens": 5, "cached_tokens": 2, "generated_tokens": 7, "request_id": "abc",
        "queue_s": 0.2, "ttft_s": 0.3, "tpot_s": 0.004, "e2e_s": 2.0,
    }  # fmt: skip
    metrics.ended(outcome, **facts | changes)


def test_every_outcome_is_a_series_from_the_start(metrics):
    assert [value(metrics, "requests_total", outcome=outcome.value) for outcome in Outcome] == [0] * 5


def test_an_end_is_counted_once_with_its_tokens_and_times(metrics):
    end(metrics)
    end(metrics, Outcome.DEADLINE, generated_tokens=0, queue_s=None, ttft_s=None, tpot_s=None, e2e_s=1.0)
    assert value(metrics, "requests_total", outcome="ok") == 1
    assert value(metrics, "requests_total", outcome="deadline") == 1
    assert value(metrics, "prompt_tokens_total") == 10
    assert value(metrics, "generated_tokens_total") == 7
    assert value(metrics, "queue_seconds_count") == 1
    assert value(metrics, "ttft_seconds_sum") == 0.3
    assert value(metrics, "tpot_seconds_bucket", le="0.005") == 1
    assert value(metrics, "tpot_seconds_bucket", le="0.002") == 0
    assert value(metrics, "e2e_seconds_sum") == 3.0


def test_a_refusal_is_no_request_with_times(metrics):
    metrics.rejected()
    assert value(metrics, "requests_total", outcome="rejected") == 1
    assert value(metrics, "e2e_seconds_count") == 0


def test_gauges_are_read_when_they_are_scraped(metrics):
    waiting = []
    metrics.watch(queue_depth=lambda: len(waiting), slots_in_use=lambda: 3, slots=8, pages=dict)
    waiting += "ab"
    assert value(metrics, "queue_depth") == 2
    assert (value(metrics, "slots_in_use"), value(metrics, "slots")) == (3, 8)


def test_pages_are_asked_for_once_a_scrape_so_that_they_add_up(metrics):
    counts = {"free": 5, "live": 3, "cached": 0}
    asked = []

    def pages():
        asked.append(None)
        return counts

    metrics.watch(queue_depth=int, slots_in_use=int, slots=8, pages=pages)
    counts |= {"free": 1, "cached": 4}
    asked.clear()
    text = generate_latest(metrics.registry).decode()
    assert len(asked) == 1
    for state, count in (("free", 1), ("live", 3), ("cached", 4)):
        assert f'\nslipstream_pages{{state="{state}"}} {count}.0\n' in text


def test_preemptions_and_cached_prefixes_are_counted_from_zero(metrics):
    names = ("preemptions_total", "prefix_cached_tokens_total")
    assert [value(metrics, name) for name in names] == [0, 0]
    metrics.preempted()
    metrics.prefix_cached(256)
    metrics.prefix_cached(128)
    assert [value(metrics, name) for name in names] == [1, 384]


def test_the_engines_pace(metrics):
    metrics.prefill(0.4)
    metrics.step(0.012, slots=2)
    metrics.step(0.02, slots=4)
    assert value(metrics, "prefill_seconds_sum") == 0.4
    assert value(metrics, "decode_step_seconds_bucket", le="0.015") == 1
    assert value(metrics, "decode_step_seconds_count") == 2
    assert value(metrics, "decode_slot_steps_total") == 6


class Device:
    def __init__(self, stats):
        self._stats = stats

    def memory_stats(self):
        return self._stats

    def __str__(self):
        return "TPU_0"


def test_only_what_is_compiled_after_the_warm_up_counts(metrics):
    compiled = 12
    metrics.watch_devices([], lambda: compiled)
    assert value(metrics, "compilations_after_warmup_total") == 0
    compiled = 14
    assert value(metrics, "compilations_after_warmup_total") == 2


def test_a_start_is_told_by_its_stages(metrics):
    assert value(metrics, "startup_seconds", stage="loading") is None, "nothing before it is over"
    metrics.started({"imports": 1.5, "loading": 2.5})
    assert [value(metrics, "startup_seconds", stage=stage) for stage in ("imports", "loading")] == [1.5, 2.5]


def test_a_device_tells_what_it_knows(metrics):
    """A CPU knows nothing, a TPU all three; another backend may know some."""
    metrics.watch_devices([Device(None), Device({"bytes_in_use": 5, "bytes_limit": 9, "largest_alloc_size": 1})], int)
    assert value(metrics, "device_memory_bytes", device="TPU_0", kind="in_use") == 5
    assert value(metrics, "device_memory_bytes", device="TPU_0", kind="limit") == 9
    assert value(metrics, "device_memory_bytes", device="TPU_0", kind="peak") is None


def test_the_text_form_has_the_names_that_dashboards_use(metrics):
    metrics.watch_devices([], int)
    end(metrics)
    text = generate_latest(metrics.registry).decode()
    for name in (
        'requests_total{outcome="ok"} 1.0', "slots ", "slots_in_use ", "queue_depth ", "ttft_seconds_bucket{",
        "preemptions_total 0.0", "prefix_cached_tokens_total 0.0",
        "tpot_seconds_bucket{", "e2e_seconds_bucket{", "queue_seconds_bucket{", "prefill_seconds_bucket{",
        "decode_step_seconds_bucket{", "prompt_tokens_total ", "generated_tokens_total ",
        "compilations_after_warmup_total 0.0",
    ):  # fmt: skip
        assert f"\nslipstream_{name}" in text
    assert "\nprocess_resident_memory_bytes " in text


def test_two_servers_in_one_process_count_apart(metrics):
    end(metrics)
    assert value(Metrics(), "requests_total", outcome="ok") == 0


def test_the_median_is_of_the_last_requests(metrics):
    for number in range(RECENT + 3):
        end(metrics, ttft_s=float(number))
    end(metrics, ttft_s=None)
    assert metrics.recent_ttft_s == [float(number) for number in range(3, RECENT + 3)]


def test_threads_lose_nothing(metrics):
    threads = [threading.Thread(target=lambda: [end(metrics) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "requests_total", outcome="ok") == 200
    assert value(metrics, "ttft_seconds_count") == 200


def test_an_end_is_one_line_in_the_log(metrics, caplog):
    with caplog.at_level(logging.INFO, "slipstream"):
        end(metrics, Outcome.CANCELLED, ttft_s=None)
    (record,) = caplog.records
    assert record.fields == {
        "request_id": "abc", "outcome": "cancelled", "prompt_tokens": 5, "cached_tokens": 2, "generated_tokens": 7,
        "queue_ms": 200.0, "ttft_ms": None, "total_ms": 2000.0,
    }  # fmt: skip
