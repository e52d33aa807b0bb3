"""Which width a step has: arithmetic of drafts and times, without an engine."""

import itertools
import random

import numpy as np
import pytest
from prometheus_client import generate_latest
from slipstream.engine_impl.errors import TooLongError
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.server.delivery.result import HostResult
from slipstream.server.delivery.roster import Roster
from slipstream.server.observe.metrics import Metrics
from slipstream.server.request.constraint import Constraint
from slipstream.server.request.limits import Limits
from slipstream.server.request.request import Request
from slipstream.server.scheduler.widths import Widths

from tests.fakes import FakeEngine, FakeMatcher, FakeTokenizer
from tests.server.scheduler.loop import ask, running

ON = SamplingParams(ignore_eos=True)


def tokens(asked):
    return [token_id for event in asked.all() for token_id in event.token_ids]


def of(slots, constrained=(), grammar="*" * 9):
    """A roster of so many, all in slots of their own."""
    roster = Roster.empty(slots, 1)
    for slot in range(slots):
        sample = Request(prompt_ids=[1], deliver=print).samples[0]
        if slot in constrained:
            sample.constraint = Constraint(FakeMatcher(grammar), ())
        roster = roster.having(slot, sample)
    return roster


class Steps:
    """Steps that take `step_s[width]` and whose drafts are right by `agreed(slot, width)`."""

    def __init__(self, slots, step_s, constrained=(), grammar="*" * 9):
        self.roster, self.step_s = of(slots, constrained, grammar), step_s
        self.widths = Widths(lambda taken: tuple(self.step_s), slots)
        self.seconds = self.tokens = 0.0

    def run(self, steps, agreed, noise=lambda: 1.0):
        """The widths of so many steps."""
        used = []
        for _ in range(steps):
            width = self.widths.choose(self.roster)
            used.append(width)
            agreed_N = np.array([min(agreed(slot, width), width) for slot in self.roster.slot_B], np.int32)
            count_N = np.minimum(agreed_N, width - 1) + 1
            token_NW = np.zeros((len(agreed_N), width), np.int32)
            result = HostResult(
                self.roster, token_NW, count_N, count_N, count_N < 0, None, None, None, agreed_N, agreed_N, *[None] * 3
            )
            self.widths.took(result, self.step_s[width] * noise())
            self.widths.read(result)
            self.seconds += self.step_s[width]
            self.tokens += count_N.sum() / len(count_N)
        return used

    @property
    def speed(self):
        """Beside narrow steps."""
        return self.tokens / self.seconds * self.step_s[1]


def test_without_drafts_there_is_one_width():
    assert set(Steps(2, {1: 1.0}).run(20, lambda slot, width: 0)) == {1}


def test_a_text_with_nothing_to_copy_never_pays_for_a_wide_step():
    assert set(Steps(1, {1: 1.0, 4: 1.1}).run(2000, lambda slot, width: 0)) == {1}


def test_an_answer_that_copies_gets_wide_steps_within_a_few():
    used = Steps(1, {1: 1.0, 4: 1.2}).run(40, lambda slot, width: 4)
    assert set(used[12:]) == {4}


def test_the_widest_is_taken_where_runs_are_long_and_a_narrower_one_where_they_are_short():
    step_s = {1: 1.0, 4: 1.1, 8: 1.3}
    assert set(Steps(1, step_s).run(200, lambda slot, width: 8)[-40:]) == {8}
    short = Steps(1, step_s | {8: 2.0}).run(200, lambda slot, width: 3)[-40:]
    assert short.count(4) > 30


def test_a_wide_step_that_costs_more_than_it_brings_is_given_up_and_seldom_tried_again():
    used = Steps(8, {1: 1.0, 4: 5.0}).run(1000, lambda slot, width: 4)
    assert 1 <= used.count(4) < 20


def test_what_became_slow_is_found_out():
    steps = Steps(1, {1: 1.0, 4: 1.2})
    steps.run(40, lambda slot, width: 4)
    steps.step_s[4] = 9.0
    assert steps.run(200, lambda slot, width: 4)[-20:].count(4) <= 1


class Text:
    """One whose drafts are right by chance: behind a wrong one, and behind a right one."""

    def __init__(self, rng, behind_wrong, behind_right):
        self.rng, self.shares, self.is_right = rng, (behind_wrong, behind_right), False

    def agreed(self, width):
        for agreed in range(width):
            self.is_right = self.rng.random() < self.shares[self.is_right]
            if not self.is_right:
                return agreed
        return width


@pytest.mark.parametrize(
    ("slots", "row_costs"),
    [
        pytest.param(slots, costs, marks=() if (slots == 8) == (costs in (0.02, 0.5)) else pytest.mark.product)
        for slots in (1, 8)
        for costs in (0.02, 0.15, 0.5, 1.0)
    ],
)
def test_no_text_is_slower_than_without_drafts(slots, row_costs):
    """Whatever its drafts are and wide steps cost, and however step times vary."""
    step_s = {width: 1 + row_costs * (width - 1) for width in (1, 2, 4, 8)}
    for behind_wrong, behind_right in itertools.product((0, 0.05, 0.2, 0.5), (0, 0.3, 0.6, 0.95)):
        rng = random.Random(7)
        texts = [Text(rng, behind_wrong, behind_right) for _ in range(slots)]
        steps = Steps(slots, step_s)
        steps.run(600, lambda slot, width: texts[slot].agreed(width), lambda: rng.lognormvariate(0, 0.1))  # noqa: B023
        assert steps.speed > 0.98, (behind_wrong, behind_right)


def test_drafts_that_lie_cost_a_hundredth():
    """They are right whenever a step is narrow, and wrong whenever it is wide."""
    steps = Steps(8, {1: 1.0, 4: 2.4})
    used = steps.run(1000, lambda slot, width: 1 if width == 1 else 0)
    assert 4 in used
    assert steps.speed > 0.98


def test_a_step_that_was_held_up_once_does_not_end_wide_steps():
    steps = Steps(1, {1: 1.0, 4: 1.2})
    steps.run(40, lambda slot, width: 4)
    assert set(steps.run(1, lambda slot, width: 4, lambda: 50.0)) == {4}
    assert set(steps.run(40, lambda slot, width: 4)[10:]) == {4}


def test_an_unmeasured_width_is_held_to_cost_what_another_did():
    """Without that, each of them had to be tried."""
    used = Steps(8, {1: 1.0, 2: 3.0, 4: 6.0, 8: 9.0}).run(300, lambda slot, width: 8)
    assert len([width for width in used if width > 1]) <= 2


def test_what_the_warm_up_measured_is_believed_before_a_width_was_tried():
    """Dear steps are never tried, cheap ones at once; of steps of fewer slots it was not measured."""
    dear, free = {1: 1.0, 8: 9.0}, {1: 1.0, 8: 1.0}
    for warm, tries in (({2: dear}, False), ({1: free, 2: dear, 4: free}, False), ({1: dear}, True)):
        steps = Steps(2, dear)
        for slots, seconds in warm.items():
            steps.widths.warmed(slots, seconds)
        assert (8 in steps.run(300, lambda slot, width: 8)) == tries
    cheap = Steps(2, {1: 1.0, 8: 1.5})
    cheap.widths.warmed(8, {1: 0.5, 8: 0.75})
    assert set(cheap.run(40, lambda slot, width: 8)[10:]) == {8}


def test_one_narrow_step_that_seems_short_costs_no_wide_one():
    """The first is read right behind a prefill that was late: beside it wide steps would seem to lose."""
    steps = Steps(1, {1: 0.2, 4: 1.1})
    steps.widths.warmed(1, {1: 1.0, 4: 1.1})
    steps.run(1, lambda slot, width: 4)
    steps.step_s = {1: 1.0, 4: 1.1}
    assert steps.run(60, lambda slot, width: 4).count(4) >= 55


def test_the_warm_up_times_each_step_that_may_be_wide():
    engine = FakeEngine(max_concurrent_decodes=4, widths=(1, 2, 4), widest=lambda slots: 4 if slots < 3 else 1)
    with running(engine, warm_up=True) as orchestrator:
        assert tokens(ask(orchestrator, "a", 1, sampling=ON)) == [ord("b")]
    assert engine.widths_used[:12] == [1, 2, 4] * 4
    plain = FakeEngine()
    with running(plain, warm_up=True) as orchestrator:
        ask(orchestrator, "a", 1, sampling=ON).all()
    assert plain.log[:2] == ["warm_up", "prefill a"]


def test_one_that_copies_among_many_that_do_not_is_not_worth_a_wide_step():
    used = Steps(8, {1: 1.0, 4: 1.9}).run(200, lambda slot, width: width if slot == 3 else 0)
    assert set(used[20:]) == {1}


def test_answers_with_a_grammar_count_for_one_token_and_what_must_come():
    step_s = {1: 1.0, 4: 1.9}
    assert 4 in Steps(2, step_s).run(60, lambda slot, width: 4)
    assert 4 not in Steps(2, step_s, constrained=(0, 1)).run(60, lambda slot, width: 4)
    assert 4 not in Steps(2, step_s, constrained=(0,), grammar="x*").run(60, lambda slot, width: 0)[9:]
    must_come = Steps(2, step_s, constrained=(0,), grammar="xx*")
    assert {*must_come.run(60, lambda slot, width: 0 if slot else 2)[1:]} == {4}


def test_a_width_that_steps_of_so_many_lack_is_not_asked_for():
    steps = Steps(8, {1: 1.0, 4: 1.1})
    steps.widths = Widths(lambda taken: (1, 4) if taken < 8 else (1, 2), 8)
    steps.step_s = {1: 1.0, 2: 1.05, 4: 1.1}
    assert {*steps.run(300, lambda slot, width: 4)} == {1, 2}
    steps.roster = steps.roster.of(np.arange(3))
    assert {*steps.run(300, lambda slot, width: 4)} == {1, 4}


def test_sizes_are_told_apart():
    """A step of one slot may gain where one of eight does not."""
    steps = Steps(8, {1: 1.0, 4: 5.0})
    steps.run(40, lambda slot, width: 4)
    steps.roster, steps.step_s = steps.roster.of(np.array([2])), {1: 1.0, 4: 1.1}
    assert steps.run(40, lambda slot, width: 4)[-10:] == [4] * 10


@pytest.mark.parametrize("right", [0, 1, 2, 3, 4])
def test_answers_are_the_same_whatever_widths_the_loop_takes(right):
    """The fake engine brings one token more than its drafts are right."""
    with running(FakeEngine()) as orchestrator:
        expected = tokens(ask(orchestrator, "a", 25, sampling=ON))
    engine = FakeEngine(widths=(1, 4), count_of_step=lambda step: right + 1)
    with running(engine) as orchestrator:
        assert tokens(ask(orchestrator, "a", 25, sampling=ON)) == expected
    assert (4 in engine.widths_used) == (right > 0)


def test_nobody_gives_pages_back_for_drafts():
    """A pool that holds both answers to their last row, and not a row more: at its end the loop goes on with narrow
    steps."""
    engine = FakeEngine(
        cache_length=32, page_rows=4, prefill_chunk=4, pages=16, widths=(1, 4), count_of_step=lambda _: 5
    )
    with running(engine) as orchestrator:
        asked = [ask(orchestrator, text, 31, sampling=ON) for text in ("a", "A")]
        assert [len(tokens(one)) for one in asked] == [31, 31]
    assert [call for call in engine.log if call.startswith("prefill")] == ["prefill a", "prefill A"]


def test_a_step_that_is_narrower_than_asked_takes_no_pages_for_what_it_cannot_bring():
    """An engine has no wide steps of many slots: each one brings a token, whatever is asked."""
    engine = FakeEngine(
        cache_length=64, page_rows=4, prefill_chunk=4, pages=20, widths=(1, 4), widest=lambda _: 1,
        count_of_step=lambda _: 5,
    )  # fmt: skip
    with running(engine) as orchestrator:
        asked = [ask(orchestrator, text, 33, sampling=ON) for text in ("a", "A")]
        assert [len(tokens(one)) for one in asked] == [33, 33]
    assert [call for call in engine.log if call.startswith("prefill")] == ["prefill a", "prefill A"]


def test_drafts_that_took_part_are_told_to_the_caller_and_counted():
    """Steps of 4 of which two drafts are right, and one is wrong."""
    metrics, engine = Metrics(), FakeEngine(widths=(4,), count_of_step=lambda step: 3)
    with running(engine, metrics=metrics) as orchestrator:
        last = ask(orchestrator, "a", 10, sampling=ON).all()[-1]
    assert (last.usage.accepted_draft_tokens, last.usage.rejected_draft_tokens) == (6, 3)
    scraped = generate_latest(metrics.registry).decode()
    steps = engine.widths_used.count(4)
    for line in (
        f'slipstream_draft_tokens_total{{outcome="accepted"}} {2.0 * steps}',
        f'slipstream_draft_tokens_total{{outcome="rejected"}} {1.0 * steps}',
        f"slipstream_step_tokens_sum {3.0 * steps}",
        f"slipstream_step_tokens_count {1.0 * steps}",
    ):
        assert line in scraped


def test_a_prediction_comes_to_the_engine_in_tokens():
    seen = []

    class Noting(FakeEngine):
        def first_tokens(self, prefix, openings):
            seen.extend(list(opening.prediction) for opening in openings if opening)
            return super().first_tokens(prefix, openings)

    engine = Noting(widths=(1, 4))
    prediction_ids = Limits.of(engine).ids_of_prediction(engine.get_tokenizer(), "bcd")
    with running(engine) as orchestrator:
        ask(orchestrator, "a", 3, prediction_ids=prediction_ids).all()
    assert seen == [[ord(letter) for letter in "bcd"]]


def test_a_prediction_longer_than_any_answer_is_refused():
    limits = Limits.of(FakeEngine(widths=(1, 4)))
    with pytest.raises(TooLongError, match=r"^prediction: more than 256 tokens, which no answer has here"):
        limits.ids_of_prediction(FakeTokenizer(), "x" * 10_000)
