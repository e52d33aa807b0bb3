"""Statistics and tables, by cases computed by hand."""

import pytest
from slipstream.benchmarks.load.caller import Record
from slipstream.benchmarks.load.report import Slo, report
from slipstream.benchmarks.measure.machine import cpu_name, warn_if_busy
from slipstream.benchmarks.measure.stats import Ratio, percentile, slope
from slipstream.benchmarks.measure.table import table


def test_percentile_interpolates():
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert percentile([], 50) is None


def test_a_ratio_is_baseline_over_ours_pair_by_pair():
    """Of medians in a block, so that one slow step of A does not help B."""
    ours = [[10.0, 10.0, 90.0], [20.0, 20.0, 20.0], [10.0]]
    baseline = [[15.0, 15.0, 15.0], [20.0, 1.0, 99.0], [30.0]]
    ratio = Ratio.of(ours, baseline)
    assert ratio.json() == {"ratio_p50": 1.5, "ratio_min": 1.0, "ratio_max": 3.0, "pairs": [1.5, 1.0, 3.0]}


def test_slope_of_a_line():
    assert slope([1, 2, 3], [5, 7, 9]) == (pytest.approx(2), pytest.approx(3))


def test_a_table_aligns_numbers_right():
    assert table(["name", "ms"], [["a", 1.5], ["bb", None]]).splitlines() == [
        "name   ms",
        "----  ---",
        "a     1.5",
        "bb      -",
    ]


def test_cpu_name():
    assert cpu_name(lambda: "processor : 0\nmodel name\t: A CPU @ 2 GHz\n") == "A CPU @ 2 GHz"


def test_a_busy_machine_is_told(capsys):
    assert warn_if_busy(lambda: (0.2, 9.0, 9.0)) == 0.2
    assert capsys.readouterr().err == ""
    warn_if_busy(lambda: (3.0, 0.0, 0.0))
    assert "load average 3.0" in capsys.readouterr().err


def answered(due, times, tokens, end):
    return Record(due=due, token_times=times, tokens=tokens, end=end, status="completed")


def test_latencies_of_one_answer():
    """Four tokens in three messages: the second brought two."""
    record = answered(1.0, [1.5, 1.75, 2.0], 4, 2.25)
    assert record.ttft_ms == 500
    assert record.tpot_ms == pytest.approx(500 / 3)
    assert record.itl_ms == [250, 250]
    assert record.e2e_ms == 1250


def test_an_answer_without_tokens_has_no_ttft_and_meets_its_limit():
    record = answered(0.0, [], 0, 0.5)
    assert (record.ttft_ms, record.tpot_ms, record.itl_ms) == (None, None, [])
    assert Slo(ttft_ms=1, tpot_ms=1).is_met(record)


def test_a_report_counts_completed_answers_and_the_good_among_them():
    records = [
        answered(0.0, [0.25, 0.5], 2, 0.5),
        answered(1.0, [2.0, 4.0], 3, 4.0),
        Record(due=1.5, end=1.5, status="rejected"),
        Record(due=1.5, end=3.0, status="failed", detail="INTERNAL: no"),
    ]
    found = report([records], Slo(ttft_ms=250))
    assert (found["requests"], found["completed"], found["rejected"], found["failed"]) == (4, 2, 1, 1)
    assert found["first_failure"] == "INTERNAL: no"
    assert (found["seconds"], found["output_tokens"], found["tokens_per_second"]) == (4.0, 5, 1.25)
    assert (found["requests_per_second"], found["goodput_requests_per_second"]) == (0.5, 0.25)
    assert found["ttft_ms"] == {"p50": 625.0, "p90": 925.0, "p99": 992.5}
    assert report([records], Slo())["goodput_requests_per_second"] is None


def test_blocks_add_up_but_for_the_time_between_them():
    blocks = [[answered(0.0, [0.5], 1, 1.0)], [answered(90.0, [90.25], 5, 92.0)]]
    found = report(blocks, Slo())
    assert (found["requests"], found["seconds"], found["output_tokens"], found["tokens_per_second"]) == (2, 3.0, 6, 2.0)
    assert found["ttft_ms"]["p50"] == 375
