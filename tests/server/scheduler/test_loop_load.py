"""What a step costs the loop, and everything at once."""

import random
import sys
import threading
import time

import pytest
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.server.errors import DeadlineError, FailedError, QueueFullError
from slipstream.server.observe.metrics import Metrics, Outcome
from slipstream.server.request.grammar import Grammar

from tests.fakes import FakeEngine, FakeTokenizer
from tests.server.calls import sample
from tests.server.scheduler.loop import Asked, ask, running, texts, until


def calls_per_step(slots, steps=20):
    """Calls, of Python and of C, that the loop makes in so many steps with every slot live."""
    counted, engine = (
        [],
        FakeEngine(max_concurrent_decodes=slots, cache_length=10_000, page_rows=10_000, pages=2 * slots),
    )
    begin = slots + 20

    def on_generate(step):  # in the loop's thread
        if step == begin:
            sys.setprofile(lambda frame, event, argument: counted.append(event))
        elif step == begin + steps:
            sys.setprofile(None)

    engine.on_generate = on_generate
    with running(engine, max_queued=slots) as orchestrator:
        requests = [ask(orchestrator, "a", slots + 100, sampling=SamplingParams(ignore_eos=True)) for _ in range(slots)]
        for request in requests:
            request.all()
    return sum(event.endswith("call") for event in counted) / steps


def test_a_step_costs_the_loop_the_same_however_many_slots_are_live():
    """Counted, not timed: nothing in the loop is done once per slot, but where one comes to a page's border."""
    few, many = calls_per_step(2), calls_per_step(64)
    assert few == pytest.approx(many, abs=10)  # a wait may take a call more; work for each slot would take 62
    assert 10 < few < 230  # half of it in the fake engine


@pytest.mark.parametrize(("seed", "width"), [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 4), (6, 4)])
def test_any_mixture_answers_every_request_once_and_leaves_nothing_behind(seed, width):
    """Cancels, deadlines, stop strings, samples, priorities, grammars and faults at random, from several threads; up to
    `width` tokens per step."""
    faults, counts = random.Random(seed), random.Random(seed)

    def on_call(call):
        if call.startswith(("prefill", "insert", "generate")) and faults.random() < 0.003:
            raise RuntimeError(f"{call} broke")

    metrics, engine = (
        Metrics(),
        FakeEngine(
            max_concurrent_decodes=4,
            step_s=0.0002,
            on_call=on_call,
            widths=(width,),
            count_of_step=lambda step: counts.randint(1, width),
        ),
    )
    threads = threading.active_count()
    with running(engine, max_queued=20, max_queued_tokens=100, metrics=metrics) as orchestrator:
        asked, refused = [], []

        def work(number):
            dice = random.Random(seed * 100 + number)
            for _ in range(40):
                time.sleep(dice.random() * 0.004)
                samples = dice.choice([1, 1, 1, 2, 4])
                deadline = time.monotonic() + dice.random() * 0.1 if dice.random() < 0.3 else None
                stops = dice.choice([(), ("x",), ("fg", "Z")])
                request = Asked(
                    dice.choice(["a", "A", "0123456789", "w"]),
                    dice.choice([1, 2, 10, 60]),
                    num_samples=samples,
                    deadline=deadline,
                    stop_strings=stops,
                    priority=dice.randint(-10, 10),
                    sampling=SamplingParams(logprobs=dice.choice([None, 0, 3])),
                    grammar=Grammar("*" * dice.randint(1, 30)) if width == 1 and dice.random() < 0.4 else None,
                )
                request.constrain(FakeTokenizer())
                try:
                    orchestrator.submit(request)
                except (QueueFullError, DeadlineError) as error:
                    refused.append(error)
                    continue
                asked.append(request)
                if dice.random() < 0.3:
                    time.sleep(dice.random() * 0.01)
                    orchestrator.cancel(request)

        workers = [threading.Thread(target=work, args=[number]) for number in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for request in asked:
            events = request.all()
            check_answer(request, events)
        until(lambda: orchestrator.slots_in_use == 0)
        assert (orchestrator.queue_depth, orchestrator._queue.tokens) == (0, 0)
        assert not orchestrator._loop.live
        assert not orchestrator._loop.delivery._texts
    until(lambda: threading.active_count() <= threads)  # fewer: those of a test before may have ended
    total = sum(sample(metrics, "slipstream_requests_total", outcome=outcome.value) for outcome in Outcome)
    assert total == len(asked) + sum(isinstance(error, QueueFullError) for error in refused)


def check_answer(request, events):
    """Each sample counts up from its first token, ends once, and holds no stop string."""
    if events[-1].error is not None:
        assert isinstance(events[-1].error, FailedError)
    else:
        reasons = [event.index for event in events if event.finish_reason]
        assert sorted(reasons) == list(range(request.num_samples))
        assert events[-1].usage.generated_tokens == sum(len(event.token_ids) for event in events)
    for index, text in texts(events).items():
        ids = [token_id for event in events if event.index == index for token_id in event.token_ids]
        first = request.prompt_ids[-1] + 1 + 10 * index
        assert ids == list(range(first, first + len(ids)))
        assert len(ids) <= min(request.max_tokens, len(request.grammar.text) if request.grammar else 60)
        assert not any(stop in text for stop in request.stop_strings)
