"""Whatever comes in whatever order, into pools of any size: every answer is right, and no page is lost."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.request.events import FinishReason
from slipstream.server.request.limits import Limits
from slipstream.server.scheduler.loop import Loop
from slipstream.server.scheduler.queue import RequestQueue

from tests.server.scheduler.loop import Asked
from tests.server.scheduler.reading import FREE, answer, reading

LONGEST, ROWS = 48, 4
TEXTS = ["", "a", "a shared beginning of ", "a shared beginning of some twenty-six"]


class AnyOrder(RuleBasedStateMachine):
    """Turns are run here, one by one: there is no thread but delivery's."""

    @initialize(
        slots=st.integers(1, 4),
        pool=st.integers(7, 30),
        batch=st.integers(1, 3),
        chunk=st.sampled_from([4, 8, 48]),
        lengths=st.sampled_from([(), (1,), (2, 3)]),
        width=st.integers(1, 3),
        prefix_cache=st.booleans(),
        carries=st.booleans(),
        apart=st.sampled_from([0, 0, 1, 3]),
        entries=st.sampled_from([LONGEST // ROWS + 1, 20, 99]),
    )
    def build(self, slots, pool, batch, chunk, lengths, width, prefix_cache, carries, apart, entries):
        """`apart`: of so many times that a prefix is asked for, it is ready once."""
        asked = itertools.count(1)
        self.engine = reading(
            slots, cache_length=LONGEST, page_rows=ROWS, prefill_chunk=chunk, prefill_lengths=lengths, pages=pool,
            batch=batch, carries_pieces=carries and not apart, prefills_apart=apart > 0,
            is_prefix_ready=lambda: next(asked) % apart == 0, widths=(width,), table_entries=entries,
            count_of_step=lambda step: step * 7 % width + 1,
        )  # fmt: skip
        self.limits = Limits.of(self.engine)
        self.queue = RequestQueue(999)
        self.loop = Loop(self.engine, None, self.queue, None, prefix_cache=prefix_cache)
        self.loop.start(warm_up=False)
        self.loop.delivery.start()
        self.requests, self.cancelled = [], set()

    @rule(
        prefix=st.sampled_from(TEXTS),
        tail=st.text("xyz", min_size=1, max_size=9),
        tokens=st.integers(1, LONGEST),
        samples=st.sampled_from([1, 1, 1, 2]),
        priority=st.integers(-1, 1),
        key=st.sampled_from(["", "", "salt"]),
        logprobs=st.sampled_from([False, False, True]),
    )
    def arrive(self, prefix, tail, tokens, samples, priority, key, logprobs):
        text = prefix + tail
        if -(-len(text) // ROWS) * samples + samples > LONGEST // ROWS:
            samples = 1
        request = Asked(
            text,
            max(1, min(tokens, self.limits.longest - len(text))),
            num_samples=min(samples, self.engine.max_concurrent_decodes),
            priority=priority,
            prompt_logprobs=logprobs,
            sampling=FREE,
        )
        request.prefix_key = key
        try:
            self.limits.check(request)
        except RefusedError:
            return
        self.queue.put(request)
        self.requests.append(request)

    @rule(number=st.integers(0, 99))
    def cancel(self, number):
        if self.requests:
            request = self.requests[number % len(self.requests)]
            if not request.done:
                self.cancelled.add(request)
                if not self.queue.remove(request):
                    self.loop.ended.extend(request.samples)
                self.loop.delivery.end(request, FinishReason.CANCELLED)

    @rule(turns=st.integers(1, 12))
    def turn(self, turns):
        for _ in range(turns):
            self.loop._turn()

    @invariant()
    def no_page_is_lost(self):
        if hasattr(self, "loop"):
            self.loop._holdings.room.check_integrity()
            states = self.loop.pages()
            assert sum(states.values()) == self.engine.pages

    def teardown(self):
        if not hasattr(self, "loop"):
            return
        for _ in range(20 * (LONGEST + 1) * (len(self.requests) + 1)):
            if not len(self.queue) and not self.loop._has_work():
                break
            self.loop._turn()
        else:
            raise AssertionError("it stands still")
        self.loop.delivery.close()
        for request in self.requests:
            self.check(request)
        self.no_page_is_lost()
        assert self.loop.pages()["live"] == 0
        assert (self.loop.slots_in_use, self.loop.live) == (0, set())

    def check(self, request):
        events = request.all()
        prompt = list(request.prompt_ids)
        for sample in request.samples:
            found = [token_id for event in events if event.index == sample.index for token_id in event.token_ids]
            text = list(prompt)
            for number in range(len(found)):
                text.append(answer(text) + (10 * sample.index if number == 0 else 0))
            assert found == text[len(prompt) :]
            assert len(found) == request.max_tokens or request in self.cancelled
        if request.prompt_logprobs and request.delivered:
            assert [told.logprob for told in events[0].prompt_logprobs] == [0.0, *(-token / 8 for token in prompt[1:])]


TestAnyOrder = pytest.mark.slow(AnyOrder.TestCase)
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
