"""Steps that bring several tokens of a slot: the same answers as one by one, in fewer steps."""

import pytest
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.server.request.events import FinishReason

from tests.fakes import FakeEngine
from tests.server.scheduler.loop import ask, running, texts


def answer_of(engine, *args, **more):
    with running(engine) as orchestrator:
        events = ask(orchestrator, *args, **more).all()
    events.sort(key=lambda event: event.index)
    ids = [(event.index, token_id) for event in events for token_id in event.token_ids]
    logprobs = [token for event in events for token in event.logprobs]
    reasons = [event.finish_reason for event in events if event.finish_reason]
    return texts(events), ids, logprobs, reasons


@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize(
    ("prompt", "max_tokens", "more"),
    [
        ("a", 1, {}),
        ("a", 2, {}),
        ("a", 9, {}),
        ("w", 9, {}),  # a stop token within a step
        ("a", 20, {"stop_strings": ("fgh",)}),
        ("a", 20, {"stop_strings": ("e",)}),
        ("a", 20, {"stop_strings": ("e", "j"), "sampling": SamplingParams(min_tokens=5)}),
        ("a", 20, {"sampling": SamplingParams(stop_token_ids=(ord("g"),))}),
        ("w", 9, {"sampling": SamplingParams(ignore_eos=True)}),
        ("a", 9, {"sampling": SamplingParams(logprobs=0)}),
        ("a", 9, {"sampling": SamplingParams(logprobs=3)}),
        ("a", 9, {"num_samples": 2}),
        (chr(127), 9, {"sampling": SamplingParams(ignore_eos=True)}),
    ],
)
def test_an_answer_does_not_depend_on_how_many_tokens_a_step_brings(width, prompt, max_tokens, more):
    expected = answer_of(FakeEngine(), prompt, max_tokens, **more)
    assert answer_of(FakeEngine(widths=(width,)), prompt, max_tokens, **more) == expected
    uneven = FakeEngine(widths=(width,), count_of_step=lambda step: step % width + 1)
    assert answer_of(uneven, prompt, max_tokens, **more) == expected


def test_tokens_of_one_step_come_as_one_event():
    with running(FakeEngine(widths=(4,))) as orchestrator:
        events = ask(orchestrator, "a", 9).all()
    assert [len(event.token_ids) for event in events] == [1, 4, 4]
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_a_slot_is_free_as_soon_as_its_last_token_is_read():
    """One step more may be under way: how many tokens a step brought is known when it is read."""
    engine = FakeEngine(max_concurrent_decodes=1, widths=(4,))
    with running(engine) as orchestrator:
        first, second = ask(orchestrator, "a", 9), ask(orchestrator, "A", 9)
        assert (first.answer()[0], second.answer()[0]) == ("bcdefghij", "BCDEFGHIJ")
    assert engine.log.count("generate") <= 2 * (2 + 1)
