"""The load generator against a real server over the fake engine: "a" answers "bcd..." and stops after "z"."""

import json

import pytest
from slipstream.benchmarks.load.grpc_caller import GrpcCaller
from slipstream.benchmarks.load.workload import LoadRequest
from slipstream.cli import main as cli

from tests.fakes import FakeEngine
from tests.serving import serving_in_thread

QUICK = ["bench", "serve", "--requests", "4", "--warm-up", "2", "--token-ids", "97:98", "--json"]
LENGTHS = ["--prompt-lengths", "fixed:3", "--output-lengths", "fixed:5"]


@pytest.fixture(scope="module")
def target():
    with serving_in_thread(FakeEngine()) as address:
        yield address


@pytest.fixture
def bench(target, capsys):
    """The JSON of a command line."""

    def run(*words, status=0):
        assert cli.run([*QUICK, "--target", target, *words]) == status
        out, err = capsys.readouterr()
        return err if status else json.loads(out.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    "pattern",
    [
        ["--load", "1,3"],
        ["--pattern", "poisson", "--load", "200,400"],
        ["--pattern", "bursts", "--burst-size", "2", "--load", "200,400"],
    ],
)
def test_every_load_is_a_row_and_warm_up_is_not_counted(bench, pattern):
    result = bench(*LENGTHS, *pattern, "--slo-e2e-ms", "60000")
    assert len(result["loads"]) == 2
    assert result["client"].keys() == {"cpu", "load_average", "slipstream-llm", "date"}
    for row in result["loads"]:
        assert (row["requests"], row["completed"], row["rejected"], row["failed"]) == (4, 4, 0, 0)
        assert row["output_tokens"] == 4 * 5
        assert row["goodput_requests_per_second"] == row["requests_per_second"]
        for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
            assert row[name].keys() == {"p50", "p90", "p99"}
        assert 0 < row["ttft_ms"]["p50"] <= row["e2e_ms"]["p50"]
        assert row["client_cpu_share"] > 0


def test_a_stop_token_ends_an_answer_early(bench):
    """From "a" there are 25 letters to "z", however many are asked for."""
    (row,) = bench("--prompt-lengths", "fixed:3", "--output-lengths", "fixed:100", "--load", "2")["loads"]
    assert row["output_tokens"] == 4 * 25


def test_stop_tokens_can_be_ignored(bench):
    (row,) = bench("--prompt-lengths", "fixed:3", "--output-lengths", "fixed:100", "--load", "2", "--ignore-eos")[
        "loads"
    ]
    assert row["output_tokens"] == 4 * 100


def test_prompts_are_sent_as_they_are():
    """Without a BOS before them, which would be another length."""
    message = GrpcCaller("localhost:1", 1.0).message(LoadRequest([5, 6], 7))
    assert (list(message.token_content.token_ids), message.max_tokens, message.has_bos) == ([5, 6], 7, True)


def test_a_busy_client_is_told(target, capsys, monkeypatch):
    monkeypatch.setattr("slipstream.benchmarks.serve.CLIENT_BUSY", 0.0)
    assert cli.run([*QUICK, "--target", target, *LENGTHS, "--load", "1"]) == 0
    assert "load 1: the client used" in capsys.readouterr().err


def test_latencies_are_drawn_against_load(bench, tmp_path):
    for name in ("load.svg", "load.png"):
        bench(*LENGTHS, "--load", "1,2", "--plot", str(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 1000


def test_refused_requests_fail_the_bench_and_are_told(bench):
    """Prompts of 17 tokens, where the server takes 16."""
    err = bench("--prompt-lengths", "fixed:17", "--load", "1", status=cli.FAILED)
    assert "none of 4 requests was answered; the first: INVALID_ARGUMENT: the prompt has 17 tokens" in err


def test_a_full_queue_is_counted_as_rejected(capsys):
    """One slot, one place to wait, eight at once."""
    with serving_in_thread(FakeEngine(max_concurrent_decodes=1, step_s=0.02), max_queued=1) as target:
        words = [*QUICK, "--target", target, *LENGTHS, "--warm-up", "0", "--requests", "8", "--load", "8"]
        assert cli.run(words) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["loads"]
    assert row["rejected"] >= 1
    assert row["completed"] + row["rejected"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--load", "1.5"], "load=1.5 must be a whole number"),
        (["--load", "-1"], "load='-1' must be positive"),
        (["--warm-up", "-1"], "warm_up=-1"),
        (["--plot", "load.gif"], "must end in one of .svg, .png"),
        (["--plot", "/nowhere/load.svg"], "the folder /nowhere does not exist"),
        (["--prompt-lengths", "many"], "lengths 'many' must be fixed:N"),
        (["--max-length", "1"], "max_length=1 must be at least 2"),
        (["--max-length", "601", "--prefix-share", "600"], "max_length=601 must be at least 602: the shared prefix"),
        (["--prefix-share", "-1"], "prefix_share=-1 must be 0 or more"),
        (["--timeout-s", "0"], "timeout_s=0.0 must be at least 1"),
    ],
)
def test_refusals(words, message, capsys):
    assert cli.run(["bench", "serve", "--target", "localhost:1", *words]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err


def test_nobody_there(capsys, monkeypatch):
    monkeypatch.setattr("slipstream.benchmarks.load.grpc_caller.CONNECT_S", 0.1)
    assert cli.run(["bench", "serve", "--target", "localhost:1"]) == cli.FAILED
    assert "nobody answers at localhost:1" in capsys.readouterr().err
