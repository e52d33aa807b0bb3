"""The load generator over HTTP, at a fake of other people's servers and at our own."""

import asyncio
import json
import ssl
import time

import pytest
import trustme
from slipstream.benchmarks.load.caller import Record
from slipstream.benchmarks.load.hosted import hosted
from slipstream.benchmarks.load.http_caller import HttpCaller
from slipstream.benchmarks.load.workload import LoadRequest
from slipstream.benchmarks.serve import Block, ratios
from slipstream.cli import main as cli
from slipstream.server.config import ServerConfig
from slipstream.server.errors import FailedError

from tests.benchmarks.load.openai_fake import OpenAiFake
from tests.fakes import FakeEngine

QUICK = ["bench", "serve", "--requests", "4", "--warm-up", "1", "--token-ids", "97:98", "--load", "2", "--json"]
LENGTHS = ["--prompt-lengths", "fixed:3", "--output-lengths", "fixed:5"]


@pytest.fixture
def bench(capsys):
    """The one row of a command line, or what it says on stderr when it fails."""

    def run(target, *words, status=0):
        assert cli.run([*QUICK, *LENGTHS, "--target", target, *words]) == status
        out, err = capsys.readouterr()
        return err if status else json.loads(out.splitlines()[-1])["loads"][0]

    return run


def test_a_request_is_what_the_servers_expect(bench):
    fake = OpenAiFake()
    with fake.serving() as url:
        bench(url)
        bench(url, "--ignore-eos", "--model", "other")
    first, last = fake.bodies[0], fake.bodies[-1]
    assert first == {
        "model": "fake",
        "prompt": [97, 97, 97],
        "max_tokens": 5,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    assert last == first | {"model": "other", "ignore_eos": True}


@pytest.mark.parametrize("told", [{}, {"sends_ids": False}, {"sends_usage": False}], ids=str)
def test_tokens_are_counted_by_ids_or_by_usage(told, bench):
    with OpenAiFake(**told).serving() as url:
        row = bench(url + "/v1/")  # OpenAI's base URL will do
    assert (row["completed"], row["rejected"], row["failed"], row["output_tokens"]) == (4, 0, 0, 20)
    assert 0 < row["ttft_ms"]["p50"] < row["e2e_ms"]["p50"]


def test_no_request_meets_a_connection_that_is_being_closed(bench):
    """Some servers close theirs behind an answer, when the next request may be on its way already."""
    fake = OpenAiFake()
    with fake.serving() as url:
        bench(url)
    assert len({*fake.connections}) == len(fake.bodies)


@pytest.mark.parametrize("sends_ids", [True, False])
def test_every_chunk_with_tokens_has_its_time(sends_ids):
    """Five tokens in three chunks."""

    async def call(url):
        async with HttpCaller(url, 10.0) as caller:
            record = Record(due=time.perf_counter())
            await caller.call(LoadRequest([97], 5), record)
            return record

    with OpenAiFake(sends_ids=sends_ids).serving() as url:
        record = asyncio.run(call(url))
    assert (record.status, record.tokens, len(record.token_times)) == ("completed", 5, 3)
    assert record.due < record.token_times[0] < record.token_times[1] < record.token_times[2] <= record.end


@pytest.mark.parametrize(("told", "total"), [(None, None), (0, 0), (2, 8)])
def test_cached_tokens_are_summed_where_they_are_told(told, total, bench, capsys):
    with OpenAiFake(cached_tokens=told).serving() as url:
        row = bench(url)
    assert (row["prompt_tokens"], row["cached_tokens"]) == (4 * 3, total)


def test_every_block_has_prompts_of_its_own(capsys):
    """Two loads, two blocks of each at each server: five prompts in each block. A pair of blocks has the same ones."""
    fakes = OpenAiFake(), OpenAiFake()
    words = ["bench", "serve", "--requests", "4", "--warm-up", "1", "--load", "1,2", "--pairs", "2", *LENGTHS]
    with fakes[0].serving() as one, fakes[1].serving() as other:
        words += ["--target", one, "--versus-target", other, "--prefix-share", "6", "--ignore-eos"]
        assert cli.run(words) == 0
    prompts, theirs = ([tuple(body["prompt"]) for body in fake.bodies] for fake in fakes)
    assert len(set(prompts)) == len(prompts) == 2 * 2 * 5
    assert sorted(theirs) == sorted(prompts)
    assert len({prompt[:6] for prompt in prompts}) == 1
    assert {len(prompt) for prompt in prompts} == {6 + 3}
    assert "prompts 6 shared tokens + fixed:3" in capsys.readouterr().out


def test_answers_end_at_stop_tokens_unless_those_are_ignored(bench):
    """From "a" there are 25 letters to "z"."""
    with OpenAiFake().serving() as url:
        long = ["--output-lengths", "fixed:40"]
        assert bench(url, *long)["output_tokens"] == 4 * 25
        assert bench(url, *long, "--ignore-eos")["output_tokens"] == 4 * 40


def test_429_is_a_rejection(bench):
    with OpenAiFake(full_after=3).serving() as url:
        row = bench(url)
    assert (row["completed"], row["rejected"], row["failed"]) == (2, 2, 0)


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (OpenAiFake(breaks_after=2), "ClientPayloadError"),
        (OpenAiFake(error_after=2), "in the stream: the engine failed"),
        (OpenAiFake(sends_ids=False, sends_usage=False), "neither token ids nor usage"),
    ],
    ids=["cut", "error", "uncountable"],
)
def test_an_answer_that_breaks_is_a_failure(fake, message, bench):
    with fake.serving() as url:
        assert message in bench(url, status=cli.FAILED)


def test_other_statuses_are_failures_with_their_message(bench):
    with OpenAiFake().serving() as url:
        assert "404: no model absent" in bench(url, "--model", "absent", status=cli.FAILED)


def test_a_server_without_models_asks_for_a_name(bench):
    with OpenAiFake(models=()).serving() as url:
        assert "names no model" in bench(url, status=cli.FAILED)


def test_tls_and_a_token(bench, tmp_path):
    ca = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("localhost").configure_cert(context)
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "token").write_text("secret\n")
    with OpenAiFake(token="secret").serving(context) as url:
        trust = ["--tls-ca", str(tmp_path / "ca.pem")]
        assert bench(url, *trust, "--token-file", str(tmp_path / "token"))["completed"] == 4
        assert "who are you?" in bench(url, *trust, status=cli.FAILED)
        assert "nobody answers" in bench(url, status=cli.FAILED)


@pytest.mark.slow
def test_two_servers_take_turns(bench, capsys, tmp_path):
    """Two blocks each: all of a block's requests reach one server before the next block begins at the other."""
    order, fakes = [], (OpenAiFake(), OpenAiFake(pause_s=0.05))
    for name, fake in zip("ab", fakes, strict=True):
        fake.on_body = lambda body, name=name: order.append(name)
    with fakes[0].serving() as quick, fakes[1].serving() as slow:
        words = ["--versus-target", slow, "--pairs", "2", "--plot", str(tmp_path / "load.svg")]
        row = bench(quick, *words)
    assert "".join(order) == "aaaaabbbbb" * 2  # one to warm up, four that count
    for side in (row, row["versus"]):
        assert (side["requests"], side["completed"], side["output_tokens"]) == (8, 8, 40)
    for name in ("tokens_per_second_ratio", "ttft_p50_ratio"):
        assert len(row[name]["pairs"]) == 2
    assert row["tokens_per_second_ratio"]["ratio_min"] > 1  # chunks 50 ms apart against 1 ms
    assert (tmp_path / "load.svg").stat().st_size > 1000


def test_unequal_work_is_told(capsys):
    """One server stops at "z", the other knows no stop token."""
    words = [*QUICK, "--prompt-lengths", "fixed:3", "--output-lengths", "fixed:40", "--pairs", "1"]
    with OpenAiFake().serving() as stops, OpenAiFake(stop_id=1000).serving() as goes_on:
        assert cli.run([*words, "--target", stops, "--versus-target", goes_on]) == 0
    out, err = capsys.readouterr()
    assert "load 2: the servers gave 100 and 160 tokens, not the same work" in err
    assert "against it, pair by pair" in out


def test_ratios_by_hand():
    """Twice the tokens/s, then the same; a TTFT three times as short, then half as short."""

    def block(seconds, ttft):
        times = [ttft, seconds]
        return Block([Record(due=0.0, token_times=times, tokens=10, end=seconds, status="completed")], 0.1)

    found = ratios([block(5.0, 1.0), block(5.0, 2.0)], [block(10.0, 3.0), block(5.0, 1.0)])
    assert found["tokens_per_second_ratio"]["pairs"] == [2.0, 1.0]
    assert found["ttft_p50_ratio"]["pairs"] == [3.0, 0.5]
    with pytest.raises(FailedError, match="without a token"):
        ratios([block(5.0, 1.0)], [Block([Record(due=0.0, end=1.0, status="rejected")], 0.1)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "localhost:1", "--model", "m"], "model='m' is for http:// targets"),
        (["--versus-target", "localhost:1", "--versus-model", "m"], "model='m' is for http:// targets"),
        (["--pairs", "2"], "--pairs and --versus-model are for two servers: add --versus-target"),
        (["--versus-target", "localhost:1", "--pairs", "0"], "pairs=0 must be at least 1"),
        (["--target", "ftp://localhost:1"], "must be host:port (gRPC), http://... or https://..."),
        (["--target", "http://localhost:1", "--tls"], "is in the clear; --tls flags are for https://"),
        (["--target", "https://localhost:1", "--tls-ca", "/nowhere/ca.pem"], "cannot be used"),
    ],
)
def test_refusals(words, message, capsys):
    assert cli.run(["bench", "serve", *words]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err


def test_nobody_there(bench):
    assert "nobody answers at http://127.0.0.1:1" in bench("http://127.0.0.1:1", status=cli.FAILED)


@pytest.mark.parametrize("ignore_eos", [[], ["--ignore-eos"]], ids=["to the stop token", "whole"])
def test_our_server_answers_the_same_load_alike_over_grpc_and_http(ignore_eos, bench):
    """Prompts of 1 to 9 random letters: each answer ends after "z", or is 30 tokens long."""
    words = ["--token-ids", "97:120", "--prompt-lengths", "uniform:1:9", "--output-lengths", "fixed:30", *ignore_eos]
    with hosted(FakeEngine(), None, ServerConfig(port=0, http_port=0, grace_s=1.0)) as serving:
        over_grpc = bench(serving.address, *words)
        over_http = bench(f"http://{serving.http_address}", *words)
    counts = [(row["completed"], row["failed"], row["output_tokens"]) for row in (over_grpc, over_http)]
    assert counts[0] == counts[1]
    assert (counts[0][2] == 4 * 30) == bool(ignore_eos)


def test_our_full_queue_rejects_over_http(bench):
    """One slot, one place to wait, eight at once."""
    engine = FakeEngine(max_concurrent_decodes=1, step_s=0.02)
    with hosted(engine, None, ServerConfig(port=0, http_port=0, grace_s=1.0, max_queued=1)) as serving:
        words = ["--warm-up", "0", "--requests", "8", "--load", "8"]
        row = bench(f"http://{serving.http_address}", *words)
    assert row["rejected"] >= 1
    assert row["completed"] + row["rejected"] == 8
