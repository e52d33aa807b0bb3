"""What a turn does, without an engine's programs. Pages have 4 rows; a piece has 8 tokens."""

import numpy as np
import pytest
from slipstream.server.request.request import Request
from slipstream.server.scheduler.plan import MOST_IN_WORK, Scene, StepPlan, plan
from slipstream.server.scheduler.prefill_budget import PrefillBudget
from slipstream.server.scheduler.prompt import Prompt
from slipstream.server.scheduler.room import Room
from slipstream.server.scheduler.slots import Slots
from slipstream.server.scheduler.widths import Widths

from tests.fakes import FakeEngine

ROWS = 4


class House:
    """A server's tables. `tokens`: of a turn's prefills, padding included; 0: there is one."""

    def __init__(self, slots=2, *, pages=0, batch=1, tokens=0, prefix_cache=True):
        self.engine = FakeEngine(
            max_concurrent_decodes=slots, cache_length=64, page_rows=ROWS, prefill_chunk=8, pages=pages, batch=batch
        )
        self.slots = Slots(slots, [], cache_length=64)
        self.room = Room(self.engine, prefix_cache=prefix_cache)
        self.in_work, self.parked, self.came = [], [], 0
        self.budget = PrefillBudget(self.engine.sizes.prefill_batch, (2, 4, 8), tokens)
        self.widths = Widths(self.engine.widths_of, slots)

    def prompt(self, tokens: int | list[int] = 1, *, answer: int = 0, **more) -> Prompt:
        """Of one that has come just now; `tokens` with `answer` of them the answer's."""
        token_T = np.arange(tokens) if isinstance(tokens, int) else np.array(tokens)
        asked = {"prompt_ids": token_T[: len(token_T) - answer].tolist(), "max_tokens": 40, "deliver": print} | more
        request = Request(**asked)
        self.came += 1
        request.queued_at = float(self.came)
        samples = tuple(request.samples[:1] if answer else request.samples)
        return Prompt(samples, token_T, self.room.names(token_T, ""))

    def working(self, *args, **more):
        """A prompt in work."""
        prompt = self.prompt(*args, **more)
        slots = [self.slots.reserve(sample) for sample in prompt.samples[: prompt.slots_needed]]
        self.room.let_in(prompt, slots)
        self.in_work.append(prompt)
        return prompt

    def decoding(self, *args, **more):
        """A prompt's samples, that decode."""
        prompt = self.working(*args, **more)
        self.in_work.remove(prompt)
        self.room.advance(prompt, prompt.left)
        for sample in prompt.samples:
            self.slots.seat(sample, prompt.token_T)
        return list(prompt.samples)

    def steps(self, count):
        for _ in range(count):
            self.slots.count_step(self.slots.live, 1)

    def turn(self, *queued, ended=(), now=0.0, probe=False, newcomers=True, is_computing=False):
        return plan(
            Scene(
                slots=self.slots, room=self.room, widths=self.widths, in_work=self.in_work, parked=self.parked,
                queued=queued, ended=ended, now=now, probe=probe, newcomers=newcomers, budget=self.budget,
                is_computing=is_computing,
            )
        )  # fmt: skip


def growing(sample, pages=1):
    assert sample.slot is not None
    return (sample.slot, pages)


def entering(*prompts):
    return StepPlan(let_in=prompts, prefills=(prompts,))


def test_an_idle_server_does_nothing():
    assert House().turn() == StepPlan()


def test_a_probe_is_a_step_of_nobodys():
    assert House().turn(probe=True) == StepPlan(idle_step=True)


def test_the_first_in_the_queue_is_let_in_and_prefilled():
    house = House()
    first, second = house.prompt(), house.prompt()
    assert house.turn(first, second) == entering(first)


def test_a_request_waits_until_all_its_slots_are_free_and_nobody_overtakes_it():
    house = House(3)
    (running,) = house.decoding()
    wide, narrow = house.prompt(num_samples=3), house.prompt()
    assert house.turn(wide, narrow) == StepPlan(is_full=True)
    assert house.turn(wide, narrow, ended=[running]).let_in == (wide,), "a slot given back in this turn counts"


def test_a_single_token_needs_no_slot():
    house = House(1)
    house.decoding()
    one = house.prompt(max_tokens=1, num_samples=3)
    assert house.turn(one) == entering(one)
    house.room._spare.clear()
    assert house.turn(one) == StepPlan(is_full=True), "but a table"


def test_short_prompts_are_prefilled_together():
    house = House(8, batch=3)
    short = [house.prompt([number]) for number in range(4)]
    assert house.turn(*short).let_in == tuple(short[:3])
    assert house.turn(short[0], house.prompt(9), short[1]).let_in == (short[0],), "what comes behind a long one waits"
    assert house.turn(house.prompt(9), *short).let_in[1:] == ()
    assert house.turn(house.prompt(2, num_samples=2), *short).let_in[1:] == ()
    assert house.turn(house.prompt(2, prompt_logprobs=True), *short).let_in[1:] == ()
    narrow = House(2, batch=3)
    short = [narrow.prompt([number]) for number in range(3)]
    assert narrow.turn(*short).let_in == tuple(short[:2]), "as many as there are slots"


def test_no_more_of_those_who_wait_are_looked_at_than_a_turn_computes(monkeypatch):
    """And one behind them: whether somebody waits decides how many prefills there are."""
    house, looked = House(8, tokens=12), []
    need = house.room.need
    monkeypatch.setattr(house.room, "need", lambda prompt: looked.append(prompt) or need(prompt))
    waiting = [house.prompt([number] * 7) for number in range(5)]
    assert house.turn(*waiting).let_in == (waiting[0],)
    assert looked == waiting[:2]
    house.working(5)
    looked.clear()
    assert house.turn(*waiting, newcomers=False).let_in == ()
    assert looked == waiting[:1]


def test_short_tails_of_cached_prefixes_are_prefilled_together():
    """However long what is there already."""
    house = House(8, batch=3)
    first = house.prompt([1] * 21)
    house.room.let_in(first, [house.slots.reserve(first.samples[0])])
    house.room.advance(first, 21)
    tails = [house.prompt([1] * 20 + [2, number]) for number in range(3)]
    assert all(len(house.room.need(prompt).shared) == 20 // house.room.rows for prompt in tails)
    assert house.turn(*tails).let_in == tuple(tails)


def test_newcomers_and_prompts_in_work_take_turns():
    house = House(4)
    long, new = house.working(30), house.prompt([7])
    assert house.turn(new) == entering(new)
    assert house.turn(new, newcomers=False) == StepPlan(prefills=((long,),))
    assert house.turn() == StepPlan(prefills=((long,),))


def test_a_long_prompt_waits_while_others_are_in_work():
    house = House(9)
    in_work = [house.working([number] * 20) for number in range(MOST_IN_WORK)]
    long, short = house.prompt([8] * 9), house.prompt([9] * 8)
    assert house.turn(long, short).prefills == ((in_work[0],),)
    assert house.turn(short).let_in == (short,)


def test_a_prompt_waits_for_the_one_that_computes_its_beginning():
    house = House(4, batch=4)
    first = house.prompt([1] * 8)
    same, other = house.prompt([1] * 6), house.prompt([2] * 6)
    assert house.turn(first, same, other).let_in == (first,)
    house.in_work.append(first)
    house.room.let_in(first, [house.slots.reserve(first.samples[0])])
    assert house.turn(same, other).prefills == ((first,),)
    house.room.advance(first, 8)
    house.in_work.clear()
    assert house.turn(same, other).let_in == (same, other)
    assert house.room.need(same).shared == house.room._pages.of_slot(first.tables[0])[:1]


def test_without_a_prefix_cache_nobody_waits_for_a_beginning():
    house = House(4, batch=4, prefix_cache=False)
    pair = house.prompt([1] * 8), house.prompt([1] * 8)
    assert house.turn(*pair).let_in == pair


def test_slots_of_ended_and_overdue_samples_are_given_back_once():
    house = House(4)
    (both,), (late,), _ = [house.decoding(deadline=deadline) for deadline in (5.0, 5.0, 6.0)]
    gone = house.prompt().samples[0]  # ended, and never had a slot, or has none any more
    decided = house.turn(ended=[both, gone, both], now=5.0)
    assert (set(decided.free), len(decided.free)) == ({both, late}, 2)
    assert set(decided.expired) == {both.request, late.request}


def test_samples_of_one_request_expire_together():
    house = House(2)
    wide = house.decoding(num_samples=2, deadline=1.0)
    decided = house.turn(now=1.0)
    assert (decided.expired, decided.free) == ((wide[0].request,), tuple(wide))


@pytest.mark.parametrize("place", ["in_work", "parked"])
def test_prompts_are_dropped_when_their_samples_end_or_expire(place):
    for more in ({"ended": True}, {"now": 5.0}):
        house = House()
        prompt = house.working(20, deadline=5.0) if place == "in_work" else house.prompt(20, answer=3, deadline=5.0)
        if place == "parked":
            house.parked.append(prompt)
        decided = house.turn(ended=prompt.samples if "ended" in more else (), now=more.get("now", 0.0))
        assert decided == StepPlan(drop=(prompt,), expired=(prompt.request,) if "now" in more else ())


def test_a_slot_grows_where_the_next_step_leaves_its_pages():
    house = House()
    (one,) = house.decoding(3)  # its page, with room for the first step
    assert house.turn().grow == ()
    house.steps(1)
    assert house.turn().grow == (growing(one),)


def test_the_youngest_of_the_lowest_priority_gives_way():
    house = House(4, pages=3)
    (low,), (old,), (young,) = house.decoding(3, priority=-1), house.decoding(3), house.decoding(3)
    house.steps(1)  # each wants a second page, and none is left
    assert house.turn().preempt == (low, young)
    assert house.turn().grow == (growing(old),)
    assert house.turn(ended=[low, young]) == StepPlan(free=(low, young), grow=(growing(old),))


def test_a_prompt_in_work_gives_way_too():
    house = House(4, pages=5)
    (old,) = house.decoding(3)
    prompt = house.working([7] * 15)
    house.steps(1)
    assert house.turn() == StepPlan(postpone=(prompt,), grow=(growing(old),))


def test_who_grows_may_be_the_one_who_gives_way():
    house = House(4, pages=2)
    house.decoding(2)
    (young,) = house.decoding(3)
    house.steps(1)
    assert house.turn() == StepPlan(preempt=(young,))


def test_cached_prefixes_go_before_anybody_gives_way():
    house = House(4, pages=3)
    (gone,), (one,) = house.decoding([5] * 5), house.decoding(3)
    house.room.leave_text(house.slots.take_back(gone), np.array([5] * 5), "")
    assert house.room.states() == {"free": 1, "live": 1, "cached": 1}
    house.decoding(1)
    house.steps(1)
    assert house.turn() == StepPlan(grow=(growing(one),))


def test_a_shared_page_is_nobodys_to_give():
    house = House(4, pages=3)
    text = [5] * 7
    (first,), (second,) = house.decoding(text), house.decoding(text)
    assert house.room.states()["free"] == 0
    house.steps(1)
    assert house.turn().preempt == (second,), "which frees its second page alone; the first is shared"
    assert house.turn().grow == (growing(first),)


def test_entries_of_the_tables_are_a_room_of_their_own():
    house = House(4)
    house.room._pages.entries_left = 3
    (old,), (young,) = house.decoding(3), house.decoding(3)
    assert house.turn(house.prompt(4)).let_in == ()
    assert house.turn(house.prompt(2)).let_in != ()
    house.steps(1)
    assert house.turn().preempt == (young,)
    assert house.turn().grow == (growing(old),)


def test_priorities_age_for_those_who_give_way_too():
    """A level is worth five seconds of waiting: else newcomers could take the pages of a low request for ever."""
    house = House(4, pages=2)
    (low,) = house.decoding(3, priority=-1)
    house.came = 100
    (young,) = house.decoding(3)
    house.steps(1)
    assert house.turn().preempt == (young,)
    assert house.turn().grow == (growing(low),)


def test_parked_prompts_go_before_the_queue_and_leave_room_to_grow():
    house = House(4, pages=8)
    house.decoding(2)
    house.decoding(2)
    back = house.prompt([7] * 15, answer=5)  # 4 pages
    house.parked.append(back)
    assert house.turn(house.prompt()).let_in == (back,), "2 of 8 are used, 4 wanted, and 2 can grow"
    house.decoding(1)
    assert house.turn(house.prompt()).let_in == (), "else it would be pre-empted again, and again"


def test_what_is_alone_needs_no_margin():
    house = House(2, pages=4)
    whole = house.prompt(15)
    assert house.turn(whole).let_in == (whole,)
    house.decoding(1)
    assert house.turn(house.prompt(7)).let_in != ()
    assert house.turn(house.prompt(11)).let_in == (), "3 are left, and none would be"


def test_planning_changes_nothing():
    house = House()
    house.decoding(3, deadline=1.0)
    house.steps(1)
    waiting = house.prompt(5)
    assert house.turn(waiting, now=2.0) == house.turn(waiting, now=2.0)
    assert (house.slots.in_use, house.room.states()["live"]) == (1, 1)


def test_too_few_short_prompts_are_not_prefilled_together():
    """A batch costs what it would if it were full."""
    house = House(8, batch=4)
    house.budget = PrefillBudget((3, 4, 8), (8,), 0)
    short = [house.prompt([number]) for number in range(5)]
    assert house.turn(*short[:2]).let_in == (short[0],)
    assert house.turn(*short[:3]).let_in == tuple(short[:3])


def test_prompts_are_prefilled_one_behind_the_other_as_far_as_their_padded_tokens_go():
    """A piece has 2, 4 or 8 tokens, padding included."""
    house = House(9, tokens=8)
    waiting = [house.prompt([number] * tokens) for number, tokens in enumerate([1, 3, 2, 1])]
    assert house.turn(*waiting) == StepPlan(let_in=tuple(waiting[:3]), prefills=tuple((p,) for p in waiting[:3]))
    assert house.turn(waiting[0], house.prompt([7] * 5), waiting[1]).let_in == (waiting[0],), "nobody overtakes"
    long = house.prompt([8] * 30)
    assert house.turn(long, waiting[0]) == entering(long), "its piece is all that a turn computes"
    house.budget = PrefillBudget((1, 1, 8), (2, 4, 8), 4)
    assert house.turn(long, waiting[0]) == entering(long), "the first is computed whatever it comes to"


def test_where_padding_is_free_true_tokens_are_counted():
    """A prefill counts as the shortest piece at least, a text as its next piece at most."""
    house = House(9)
    waiting = [house.prompt([number] * tokens) for number, tokens in enumerate([5, 1, 1, 1])]
    for tokens, computed in ((8, 2), (9, 3), (10, 3)):
        house.budget = PrefillBudget((1, 1, 8), (2, 4, 8), tokens, skips_padding=True)
        assert house.turn(*waiting).let_in == tuple(waiting[:computed])
    house.budget = PrefillBudget((2, 3, 4), (2, 4, 8), 8, skips_padding=True)
    short = [house.prompt([number]) for number in range(6)]
    assert house.turn(*short, house.prompt([7] * 30)).prefills == (tuple(short[:3]), tuple(short[3:]))


def test_few_prompts_are_prefilled_a_turn_each():
    """All that wait would fit; then the first token of the first does not wait for the others' prefills."""
    house = House(9, tokens=8)
    waiting = [house.prompt([number] * tokens) for number, tokens in enumerate([1, 3, 2])]
    assert house.turn(*waiting) == entering(waiting[0])


def test_what_stands_alone_is_prefilled_behind_others():
    house = House(9, batch=3, tokens=8)
    two, told = house.prompt([1] * 2, num_samples=2), house.prompt([2] * 2, prompt_logprobs=True)
    assert house.turn(two, told, house.prompt([3] * 8)).prefills == ((two,), (told,))


def test_a_batch_counts_as_though_it_were_full():
    house = House(9, tokens=12)
    house.budget = PrefillBudget((2, 3, 4), (2, 4, 8), 12)
    short, longer = [house.prompt([number]) for number in range(6)], house.prompt([7] * 5)
    assert house.turn(*short).prefills == (tuple(short[:3]),)
    assert house.turn(*short[:2], longer).prefills == (tuple(short[:2]),)
    assert house.turn(longer, *short[:3]).prefills == ((longer,),)
    house.budget = PrefillBudget((2, 3, 4), (2, 4, 8), 24)
    assert house.turn(*short, longer).prefills == (tuple(short[:3]), tuple(short[3:]))
    assert house.turn(longer, *short).prefills == ((longer,), tuple(short[:3]))


def test_what_a_turn_has_left_goes_to_the_others():
    """To prompts in work behind newcomers, and to newcomers behind those."""
    house = House(9, tokens=8)
    first, second, new = house.working([1] * 11), house.working([2] * 10), house.prompt([7] * 3)
    house.room.advance(first, 8)
    house.room.advance(second, 8)
    assert house.turn(new).prefills == ((new,), (first,))
    assert house.turn(new, newcomers=False).prefills == ((first,), (second,))
    house.in_work.remove(second)
    two = house.turn(new, house.prompt([8] * 3), newcomers=False)
    assert two == StepPlan(let_in=(new,), prefills=((first,), (new,)))
    assert house.turn(new, is_computing=True) == StepPlan(), "none while devices apart are at work"


def test_slots_and_pages_of_a_turn_are_counted_together():
    house = House(3, pages=9, tokens=8)
    house.working([9] * 16)
    short = [house.prompt([number]) for number in range(3)]
    assert house.turn(*short).let_in == tuple(short[:2]), "two slots are free"
    house = House(9, pages=8, tokens=8)
    house.working([9] * 16)
    assert house.turn(*short).let_in == tuple(short[:2]), "a page stays available"


@pytest.mark.parametrize(
    ("tokens", "most"), [(0, 4), (8, 5), (2, 4)], ids=["one prefill", "short ones behind each other", "a batch"]
)
def test_so_many_prompts_of_the_queue_are_looked_at(tokens, most):
    assert PrefillBudget((2, 3, 8), (2, 4, 8), tokens).most_prompts == most
