"""Long prompts beside running streams: numbers by hand, then against the fakes."""

import json

import pytest
from slipstream.benchmarks.load.caller import Record
from slipstream.benchmarks.mixed import LEAD, Block, ratios
from slipstream.cli import main as cli

from tests.benchmarks.load.openai_fake import OpenAiFake
from tests.fakes import FakeEngine
from tests.serving import serving_in_thread

LOAD = ["--streams", "2", "--prompts", "2", "--stream-prompt-tokens", "3", "--prompt-tokens", "9", "--json"]
ANSWERS = ["--stream-tokens", "60", "--answer-tokens", "4", "--token-ids", "97:120"]


@pytest.fixture
def bench(capsys):
    """The JSON of a command line, or what it says on stderr when it fails."""

    def run(target, *words, status=0):
        assert cli.run(["bench", "mixed", *LOAD, *ANSWERS, "--target", target, *words]) == status
        out, err = capsys.readouterr()
        return err if status else json.loads(out.splitlines()[-1])

    return run


def test_numbers_by_hand():
    """The prompts come after 1 s. One stream's message of 0.9 s is followed by one at 2.5 s: 1.6 s. Longer gaps before
    they came do not count."""

    def record(due, times, end, tokens):
        return Record(due=due, token_times=times, tokens=tokens, end=end, status="completed")

    streams = [record(0.0, [0.1, 0.5, 0.9, 2.5, 2.6], 2.6, 50), record(0.0, [0.2, 0.4, 1.1, 1.2], 1.2, 4)]
    prompts = [record(1.0, [1.5, 1.6], 1.7, 2), record(1.0, [2.0, 4.0], 5.0, 44)]
    block = Block(streams, prompts)
    assert block.longest_gap_ms == pytest.approx(1600)
    assert block.usual_gap_ms == pytest.approx(400)  # of 0.4, 0.4, 0.2
    assert (block.first_tokens_s, block.answered_s) == (1.0, 4.0)
    assert block.tokens_per_second == pytest.approx(100 / 5)
    assert block.outlasts
    assert not Block(streams[1:], prompts).outlasts  # at 1.2 s it is over, and a prompt waits until 2.0


def test_ratios_by_hand():
    """Shorter times and more tokens are better."""
    fast, slow = {"blocks": [2.0, 4.0]}, {"blocks": [8.0, 2.0]}
    times = ("longest_gap_ms", "usual_gap_ms", "first_tokens_s", "answered_s")
    ours, theirs = ({name: of for name in times} for of in (fast, slow))
    found = ratios(ours | {"tokens_per_second": slow}, theirs | {"tokens_per_second": fast})
    assert {tuple(ratio["pairs"]) for ratio in found.values()} == {(4.0, 0.5)}


def test_a_server_over_grpc_and_a_peer_over_http(bench, capsys):
    fake = OpenAiFake(pause_s=0.005)
    with serving_in_thread(FakeEngine(max_concurrent_decodes=4, step_s=0.004)) as ours, fake.serving() as peer:
        result = bench(ours, "--versus-target", peer, "--pairs", "2")
    for side in (result, result["versus"]):
        assert all(len(side[name]["blocks"]) == 2 for name in result["ratios"])
        assert 0 < side["first_tokens_s"]["p50"] <= side["answered_s"]["p50"]
        assert side["longest_gap_ms"]["p50"] > 0
    warm_up, blocks = fake.bodies[:2], fake.bodies[2:]
    assert [len(body["prompt"]) for body in warm_up] == [3, 9]
    assert sorted((len(body["prompt"]), body["max_tokens"]) for body in blocks) == [(3, 60)] * 4 + [(9, 4)] * 4
    assert len({tuple(body["prompt"]) for body in fake.bodies}) == len(fake.bodies)
    assert all(body["ignore_eos"] for body in fake.bodies)
    assert (result["streams"], result["prompt_tokens"], result["pairs"]) == (2, 9, 2)


def test_the_prompts_come_after_the_streams(bench):
    seen = []
    fake = OpenAiFake(pause_s=0.005, on_body=lambda body: seen.append(len(body["prompt"])))
    with fake.serving() as peer:
        bench(peer)
    assert seen[2:] == [3, 3, 9, 9]


@pytest.mark.parametrize(
    ("fake", "words", "message"),
    [
        (
            OpenAiFake(),
            ["--stream-tokens", "4"],
            f"a stream ended before all had {LEAD} messages; raise --stream-tokens",
        ),
        (OpenAiFake(full_after=3), [], "requests were not answered: 429: 8 requests wait already"),
        (OpenAiFake(full_after=5), [], "requests were not answered: 429: 8 requests wait already"),
        (OpenAiFake(breaks_after=20), [], "requests were not answered: ClientPayloadError"),
    ],
    ids=["short", "a stream is refused", "a prompt is refused", "streams break"],
)
def test_what_is_not_answered_ends_it(fake, words, message, bench):
    with fake.serving() as peer:
        assert message in bench(peer, *words, status=cli.FAILED)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--streams", "0"], "streams=0 must be at least 1"),
        (["--pairs", "2"], "--pairs and --versus-model are for two servers"),
        (["--token-ids", "5"], "token_ids='5' must be LOW:HIGH"),
    ],
)
def test_refusals(words, message, capsys):
    assert cli.run(["bench", "mixed", "--target", "localhost:1", *words]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
