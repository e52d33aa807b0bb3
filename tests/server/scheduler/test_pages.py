"""Pages in the loop: prompts in pieces, cached prefixes, pre-emption. The fake engine reads what its pages hold."""

import itertools
import threading

import pytest
from slipstream.server.errors import FailedError, QueueFullError
from slipstream.server.observe.metrics import Metrics
from slipstream.server.request.events import FinishReason, TokenLogprob
from slipstream.server.scheduler import planner

from tests.server.scheduler.loop import Asked, ask, running, until
from tests.server.scheduler.reading import FREE, answer, expected, reading


def pages(orchestrator):
    return orchestrator._loop.pages()


@pytest.mark.parametrize("carries", [False, True])
def test_a_long_prompt_is_computed_in_pieces_with_a_step_behind_each(carries):
    engine, prompt = reading(carries_pieces=carries), "the quick brown fox jumps"
    with running(engine) as orchestrator:
        other = ask(orchestrator, "a", 50, sampling=FREE)
        other.next()
        long = ask(orchestrator, prompt, 5, sampling=FREE)
        assert long.answer()[0] == expected(prompt, 5)
        assert other.answer()[0] == expected("a", 50)[1:]
    at = [number for number, call in enumerate(engine.log) if call.startswith("prefill")][1:]
    assert [engine.log[number] for number in at] == [
        "prefill the quic",
        "prefill k brown ",
        "prefill fox jump",
        "prefill s",
    ]
    for before, behind in itertools.pairwise(at):
        assert engine.log[before:behind].count("generate") == 1, "running answers wait for one piece"
        assert engine.log[before + 1] == ("generate" if carries else "insert")


def test_a_prefix_is_computed_once():
    engine, metrics = reading(), Metrics()
    with running(engine, metrics=metrics) as orchestrator:
        for tail in ("one", "two", "one"):
            request = ask(orchestrator, "a shared beginning, " + tail, 6, sampling=FREE)
            assert request.answer()[0] == expected("a shared beginning, " + tail, 6)
            until(lambda: orchestrator.slots_in_use == 0)
        assert request.cached_tokens == 20
        assert pages(orchestrator)["live"] == 0
    assert [call for call in engine.log if call.startswith("prefill")][3:] == ["prefill two", "prefill one"]


def test_the_answer_is_part_of_the_next_turns_prefix():
    engine, first = reading(), "hello there, "
    with running(engine) as orchestrator:
        said = ask(orchestrator, first, 12, sampling=FREE).answer()[0]
        until(lambda: orchestrator.slots_in_use == 0)
        second = ask(orchestrator, first + said + "and?", 3, sampling=FREE)
        assert second.answer()[0] == expected(first + said + "and?", 3)
    assert second.cached_tokens == 20, "13 tokens of the prompt, 11 of the answer read before its slot was given back"


def test_without_the_cache_nothing_is_kept():
    engine = reading()
    with running(engine, prefix_cache=False) as orchestrator:
        for _ in range(2):
            request = ask(orchestrator, "twice the same", 3, sampling=FREE)
            assert request.answer()[0] == expected("twice the same", 3)
            until(lambda: orchestrator.slots_in_use == 0)
        assert request.cached_tokens == 0
        assert pages(orchestrator) == {"free": engine.pages, "live": 0, "cached": 0}


def test_keys_keep_prefixes_apart():
    with running(reading()) as orchestrator:
        for key, cached in (("mine", 0), ("yours", 0), ("mine", 12)):
            request = Asked("a text of some", 3, sampling=FREE)
            request.prefix_key = key
            orchestrator.submit(request)
            request.answer()
            until(lambda: orchestrator.slots_in_use == 0)
            assert request.cached_tokens == cached


def test_texts_of_other_angles_share_no_pages():
    """A text's angles follow from its prompt and max_tokens, and are its pages' and its pieces'; where one token is
    asked for, as for a prompt that is scored, from its prompt alone."""

    def reach_of(length: int) -> int:
        return 0 if length <= 20 else length

    engine, prompt = reading(), "a text of some letters"[:16]
    engine.on_reach = reach_of
    prefill, reaches = engine.prefill, []

    def noted(params, decode_state, pieces):
        reaches.extend(piece.reach for piece in pieces)
        return prefill(params, decode_state, pieces)

    engine.prefill = noted
    with running(engine) as orchestrator:
        for max_tokens, cached in ((3, 0), (4, 12), (5, 0), (5, 12), (6, 0), (3, 12)):
            request = ask(orchestrator, prompt, max_tokens, sampling=FREE)
            assert request.answer()[0] == expected(prompt, max_tokens)
            until(lambda: orchestrator.slots_in_use == 0)
            assert request.cached_tokens == cached
        ask(orchestrator, "x" * 20, 1, sampling=FREE).answer()
        ask(orchestrator, "y" * 20, 2, sampling=FREE).answer()
    assert set(reaches) == {0, 21, 22}


def test_samples_share_what_stands_before_the_last_piece():
    engine, prompt = reading(), "three samples of a prompt"
    with running(engine) as orchestrator:
        events = ask(orchestrator, prompt, 20, num_samples=3, sampling=FREE).all()
    for index in range(3):
        found = [token_id for event in events if event.index == index for token_id in event.token_ids]
        text = list(prompt.encode())
        text.append(answer(text) + 10 * index)  # the fake's further samples begin with another token
        while len(text) < len(prompt) + 20:
            text.append(answer(text))
        assert found == text[len(prompt) :]
    assert len([call for call in engine.log if call.startswith("prefill")]) == 4


def test_prompt_logprobs_of_several_pieces():
    engine, prompt = reading(), "a prompt of several pieces"
    with running(engine) as orchestrator:
        for _ in range(2):  # the second time the prefix is cached, and computed all the same
            request = ask(orchestrator, prompt, 2, prompt_top_logprobs=2, sampling=FREE)
            first, *told = request.all()[0].prompt_logprobs
            assert first == TokenLogprob(0.0)
            for letter, token in zip(prompt[1:], told, strict=True):
                logprob = -ord(letter) / 8
                assert token == TokenLogprob(logprob, ((ord(letter), logprob), (ord(letter) + 1, logprob - 1)))
            assert request.cached_tokens == 0
            until(lambda: orchestrator.slots_in_use == 0)


def test_a_pool_takes_what_is_live_and_not_what_may_come():
    """4,096 tokens of cache: four requests that may each grow to 1,024, if that were kept for them."""
    engine = reading(16, cache_length=1024, page_rows=128, prefill_chunk=512, pages=32, pace=threading.Semaphore(40))
    with running(engine, max_queued=16) as orchestrator:
        prompts = [f"{number:02}" * (50 + number * 13 % 100) for number in range(16)]
        requests = [ask(orchestrator, prompt, 1024 - len(prompt), sampling=FREE) for prompt in prompts]
        until(lambda: orchestrator.slots_in_use >= 12)
        for request in requests:
            orchestrator.cancel(request)
        engine.pace.release(9999)


@pytest.mark.parametrize("width", [1, 3])
def test_a_pool_that_is_too_small_for_all_pre_empts_and_loses_nothing(width):
    counts = itertools.cycle(range(1, width + 1))
    engine, metrics = (
        reading(pages=16, widths=(width,), count_of_step=lambda step: next(counts)),
        Counting(),
    )
    prompts = [f"{number} asks" for number in range(6)]
    with running(engine, metrics=metrics) as orchestrator:
        requests = [ask(orchestrator, prompt, 50, sampling=FREE) for prompt in prompts]
        for prompt, request in zip(prompts, requests, strict=True):
            events = request.all()
            assert "".join(event.text for event in events) == expected(prompt, 50)
            assert events[-1].finish_reason is FinishReason.LENGTH
            assert events[-1].usage.generated_tokens == 50
            if width == 1:
                assert [len(event.token_ids) for event in events] == [1] * 50, "no token twice, none left out"
        until(lambda: orchestrator.slots_in_use == 0)
        assert pages(orchestrator)["live"] == 0
        orchestrator._loop._holdings.room.check_integrity()
    assert metrics.preemptions > 3


class Counting(Metrics):
    preemptions = 0

    def preempted(self):
        self.preemptions += 1


def test_the_oldest_is_never_pre_empted():
    engine, metrics = reading(pages=16), Counting()
    with running(engine, metrics=metrics) as orchestrator:
        requests = [ask(orchestrator, "old", 60, sampling=FREE)]
        requests[0].next()
        requests += [ask(orchestrator, f"{number}", 60, sampling=FREE) for number in range(3)]
        for request in requests:
            request.all()
    assert metrics.preemptions
    assert engine.log.count("prefill old") == 1


def test_a_pre_empted_request_can_be_cancelled_and_can_expire():
    engine = reading(2, pages=16, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        old = ask(orchestrator, "o", 60, sampling=FREE)
        old.next()
        young = ask(orchestrator, "y", 60, sampling=FREE)
        engine.pace.release(40)
        until(lambda: orchestrator._loop._holdings.parked)
        orchestrator.cancel(young)
        engine.pace.release(999)
        assert young.all()[-1].finish_reason is FinishReason.CANCELLED
        assert old.answer()[0] == expected("o", 60)[1:]
        until(lambda: not orchestrator._loop._holdings.parked)


def test_a_failed_step_leaves_alone_who_is_parked():
    engine = reading(2, pages=16, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        old = ask(orchestrator, "o", 60, sampling=FREE)
        old.next()
        young = ask(orchestrator, "y", 60, sampling=FREE)
        engine.pace.release(40)
        until(lambda: orchestrator._loop._holdings.parked)
        engine.late_errors[engine.steps] = RuntimeError("broke")
        engine.pace.release(999)
        assert isinstance(old.all()[-1].error, FailedError)
        assert young.answer()[0] == expected("y", 60)
    assert engine.states_made == 2


def test_a_damaged_page_table_is_found_and_built_anew(monkeypatch):
    monkeypatch.setattr(planner, "TURNS_A_CHECK", 1)
    engine = reading(pace=threading.Semaphore(3))
    with running(engine) as orchestrator:
        request = ask(orchestrator, "a", 40, sampling=FREE)
        request.next()
        orchestrator._loop._holdings.room._pages._page_BJ[3, 0] = 9
        engine.pace.release(999)
        error = request.all()[-1].error
        assert isinstance(error, FailedError)
        assert "slot=3 has 0 pages, but entries behind them" in str(error)
        assert ask(orchestrator, "a", 9, sampling=FREE).answer()[0] == expected("a", 9)


def test_prompts_in_a_batch_that_fails_fail_alone():
    def on_prefill(prompt):
        if prompt == [ord("2")]:
            raise RuntimeError("no two")

    engine = reading(8, batch=4, on_prefill=on_prefill, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        first = ask(orchestrator, "first", 3, sampling=FREE)
        first.next()
        requests = [ask(orchestrator, f"{number}", 5, sampling=FREE) for number in range(4)]
        engine.pace.release(999)
        for number, request in enumerate(requests):
            text, last = request.answer()
            if number == 2:
                assert "no two" in str(last.error)
            else:
                assert text == expected(f"{number}", 5)
    assert engine.states_made == 1


def test_several_prompts_of_a_batch_that_fail_are_one_failure():
    def on_prefill(prompt):
        if prompt[0] in b"123":
            raise RuntimeError("no")

    engine = reading(8, batch=4, on_prefill=on_prefill, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        first = ask(orchestrator, "first", 30, sampling=FREE)
        first.next()
        requests = [ask(orchestrator, letter, 5, sampling=FREE) for letter in "1a23"]
        engine.pace.release(999)
        assert first.answer()[0] == expected("first", 30)[1:]
        for letter, request in zip("1a23", requests, strict=True):
            assert (request.answer()[1].error is None) == (letter == "a")


def test_pages_bound_the_queue_as_slots_do():
    """Free slots admit nobody beyond --max-queued while the first that waits finds no pages."""
    engine = reading(16, pages=16, pace=threading.Semaphore(0))
    with running(engine, max_queued=2) as orchestrator:
        whole = ask(orchestrator, "a" * 40, 24, sampling=FREE)
        whole.next()
        accepted = []
        for number in range(2):
            accepted.append(ask(orchestrator, f"{number}" + "b" * 39, 24, sampling=FREE))
            engine.pace.release(1)
            until(lambda: orchestrator._loop.slots_free == 0)
        with pytest.raises(QueueFullError, match="2 requests wait already and max_queued=2"):
            ask(orchestrator, "c" * 40, 24, sampling=FREE)
        engine.pace.release(9999)
        for request in accepted:
            request.all()
