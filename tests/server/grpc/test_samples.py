"""Where an answer stops, several of one prompt, and what is told about their tokens."""

import threading

import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.server.request.events import FinishReason, TokenLogprob

from tests.fakes import FakeEngine
from tests.server.scheduler.loop import ask, running, texts, until


@pytest.mark.parametrize(
    ("stops", "text", "tokens"),
    [
        (("f",), "bcde", 5),
        (("def",), "bc", 5),
        (("zz", "de"), "bc", 4),
        (("b",), "", 1),
        (("nope", "jklx"), "bcdefghijk", 10),
    ],
)
def test_a_stop_string_ends_the_answer_across_tokens_and_is_not_part_of_it(stops, text, tokens):
    engine = FakeEngine(max_concurrent_decodes=1)
    with running(engine) as orchestrator:
        events = (request := ask(orchestrator, "a", 10, stop_strings=stops)).all()
        assert texts(events) == {0: text}
        ids = [token_id for event in events for token_id in event.token_ids]
        assert ids == list(range(98, 98 + tokens)), "up to the token in which the stop string ended, and no more"
        is_stopped = stops[0] != "nope"
        assert events[-1].finish_reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
        assert events[-1].usage.generated_tokens == request.delivered == tokens
        assert ask(orchestrator, "A", 4).answer()[0] == "BCDE", "the slot is free again, and no token is left over"
        until(lambda: orchestrator.slots_in_use == 0)


def test_a_stop_string_frees_its_slot_within_the_steps_under_way():
    """Steps come one by one: the stop string is read with one step in flight and at most one more started."""
    engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        request = ask(orchestrator, "a", 200, stop_strings=("e",))
        for _ in range(4):
            event = request.next()
            engine.pace.release()
        assert (event.finish_reason, event.text) == (FinishReason.STOP, "")
        engine.pace.release(99)
        until(lambda: orchestrator.slots_in_use == 0)
    assert engine.steps <= 6


def test_stop_token_ids_and_ignore_eos():
    with running(FakeEngine()) as orchestrator:
        assert (
            ask(orchestrator, "a", 9, sampling=SamplingParams(stop_token_ids=(ord("e"), ord("d")))).answer()[0] == "bc"
        )
        assert ask(orchestrator, "a", 9, sampling=SamplingParams(stop_token_ids=(ord("b"),))).answer()[0] == ""
        text, last = ask(orchestrator, "w", 6, sampling=SamplingParams(ignore_eos=True)).answer()
        assert (text, last.finish_reason) == ("xyz{|}", FinishReason.LENGTH)


def test_several_samples_come_from_one_prefill():
    """The fake's samples start ten letters apart."""
    engine, sampling = FakeEngine(max_concurrent_decodes=3), SamplingParams(temperature=1.0, seed=7)
    with running(engine) as orchestrator:
        events = ask(orchestrator, "A", 4, num_samples=3, sampling=sampling).all()
        until(lambda: orchestrator.slots_in_use == 0)
    assert texts(events) == {0: "BCDE", 1: "LMNO", 2: "VWXY"}
    assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.LENGTH] * 3
    assert events[-1].usage.generated_tokens == 12
    assert [call.split()[0] for call in engine.log[:6]] == ["prefill", "first_tokens", "first_tokens", *["insert"] * 3]
    seeds = [sampling.seed for sampling in engine.samplings]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


def test_samples_end_one_by_one():
    """ "p" answers q..., and the second sample, ten letters later, begins with the stop token."""
    with running(FakeEngine(max_concurrent_decodes=2)) as orchestrator:
        events = ask(orchestrator, "p", 20, num_samples=2, stop_strings=("y",)).all()
    assert texts(events) == {0: "qrstuvwx", 1: ""}
    assert [event.index for event in events if event.finish_reason is FinishReason.STOP] == [1, 0]
    assert [event.index for event in events if event.usage] == [0]


def test_samples_of_one_token_need_no_slots():
    engine = FakeEngine(max_concurrent_decodes=2)
    with running(engine) as orchestrator:
        assert texts(ask(orchestrator, "A", 1, num_samples=2).all()) == {0: "B", 1: "L"}
    assert engine.steps == 0


def test_samples_wait_until_all_their_slots_are_free_and_are_not_overtaken():
    engine = FakeEngine(max_concurrent_decodes=2, pace=threading.Semaphore(1))
    with running(engine) as orchestrator:
        first = ask(orchestrator, "a", 6)
        first.next()
        wide, narrow = ask(orchestrator, "A", 3, num_samples=2), ask(orchestrator, "0", 3)
        engine.pace.release(99)
        assert texts(wide.all()) == {0: "BCD", 1: "LMN"}
        assert narrow.answer()[0] == "123"
        first.answer()
    assert [call for call in engine.log if call.startswith("prefill")] == ["prefill a", "prefill A", "prefill 0"]


def test_more_samples_than_slots_are_refused():
    with (
        running(FakeEngine(max_concurrent_decodes=2)) as orchestrator,
        pytest.raises(RefusedError, match="num_samples=3"),
    ):
        ask(orchestrator, "a", num_samples=3)


def test_cancelling_frees_the_slots_of_all_samples():
    engine = FakeEngine(max_concurrent_decodes=3, pace=threading.Semaphore(0))
    with running(engine) as orchestrator:
        request = ask(orchestrator, "A", 100, num_samples=3)
        request.next()
        until(lambda: orchestrator.slots_in_use == 3)
        orchestrator.cancel(request)
        engine.pace.release(99)
        events = request.all()
        assert {event.index: event.finish_reason for event in events if event.finish_reason} == {
            index: FinishReason.CANCELLED for index in range(3)
        }
        until(lambda: orchestrator.slots_in_use == 0)
    assert engine.steps <= 2


def test_logprobs_of_the_chosen_and_the_likeliest_tokens():
    """The fake's are minus an eighth of the id; see there."""
    with running(FakeEngine()) as orchestrator:
        none = ask(orchestrator, "a", 2)
        chosen = ask(orchestrator, "a", 2, sampling=SamplingParams(logprobs=0))
        top = ask(orchestrator, "@", 2, sampling=SamplingParams(logprobs=2))
        assert [event.logprobs for event in none.all()] == [(), ()]
        assert [event.logprobs for event in chosen.all()] == [(TokenLogprob(-98 / 8),), (TokenLogprob(-99 / 8),)]
        assert [event.logprobs for event in top.all()] == [
            (TokenLogprob(-65 / 8, ((65, -65 / 8), (66, -65 / 8 - 1))),),
            (TokenLogprob(-66 / 8, ((66, -66 / 8), (67, -66 / 8 - 1))),),
        ]


def test_prompt_logprobs_come_first_and_once():
    with running(FakeEngine()) as orchestrator:
        events = ask(orchestrator, "aB@", 3, prompt_logprobs=True, num_samples=2).all()
    assert [token.logprob for token in events[0].prompt_logprobs] == [0.0, -66 / 8, -64 / 8]
    assert all(event.prompt_logprobs is None for event in events[1:])
    assert texts(events) == {0: "ABC", 1: "KLM"}


def test_usage_tells_tokens_and_times():
    with running(FakeEngine(step_s=0.01)) as orchestrator:
        usage = ask(orchestrator, "abc", 5).answer()[1].usage
    assert (usage.prompt_tokens, usage.generated_tokens) == (3, 5)
    assert 0 <= usage.queue_ms <= usage.ttft_ms
    assert usage.total_ms - usage.ttft_ms > 4 * 10 * 0.9
