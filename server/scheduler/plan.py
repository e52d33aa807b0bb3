"""What the next turn does: policy alone, decided from queue, slots, pages and clock. Touches no device."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from ..request.adapter import LoadedAdapter
from ..request.request import Request, Sample
from .lookahead import Lookahead
from .prefill_budget import PrefillBudget, Work
from .prompt import Prompt
from .queue import is_overdue
from .room import Room
from .slots import Slots
from .turns import rank
from .widths import Widths

MOST_IN_WORK = 4
"""Prompts of several pieces that are computed in turns (count): a short one waits for as few pieces of long ones."""

MARGIN = 0.01
"""Share of the pool that must stay available when a prompt is let in beside others: else the next page would pre-empt
it again."""


@dataclass(frozen=True)
class StepPlan:
    """One turn of the loop, in this order."""

    expired: tuple[Request, ...] = ()
    """Requests past their deadline: to be ended."""
    drop: tuple[Prompt, ...] = ()
    """Prompts that are not computed any more, as their samples have ended."""
    free: tuple[Sample, ...] = ()
    """Samples that decode no more, and whose slots and pages are given back."""
    postpone: tuple[Prompt, ...] = ()
    """Prompts in work whose pages others need: they wait again."""
    preempt: tuple[Sample, ...] = ()
    """Samples whose pages others need: they wait and go on later."""
    grow: tuple[tuple[int, int], ...] = ()
    """(slot, pages): what the step may fill."""
    let_in: tuple[Prompt, ...] = ()
    """Prompts that get slots and pages."""
    prefills: tuple[tuple[Prompt, ...], ...] = ()
    """Whose next pieces are computed, one prefill behind the other, see `PrefillBudget`: of those let in and those in
    work."""
    is_full: bool = False
    """Whether the first that waits finds no slot or no pages."""
    idle_step: bool = False
    """Whether a step is started even if nobody decodes."""
    width: int = 1
    """Tokens that the step brings a slot at most."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a plan is made from."""

    slots: Slots
    room: Room
    widths: Widths
    in_work: Sequence[Prompt]
    """Prompts that have slots and pages, and some pieces to go; who is next stands first."""
    parked: Sequence[Prompt]
    """Of pre-empted samples, who goes on first stands first."""
    queued: Sequence[Prompt] | Lookahead[Prompt]
    """Of requests in the queue, likewise; looked at as far as the turn's budget goes."""
    ended: Sequence[Sample]
    """Samples that ended by themselves since the last turn: cancelled, or at a stop string."""
    now: float
    """s of time.monotonic()"""
    probe: bool
    """Whether somebody waits for a step and none is on its way: one is run over no slots, too."""
    newcomers: bool
    """Whether it is the turn of those who wait, rather than of those in work."""
    budget: PrefillBudget
    max_adapters: int = 0
    """See `Sizes.max_adapters`."""
    is_computing: bool = False
    """Whether devices that compute prompts apart are at work: they get no more until that is stored. The prompts that
    they have are not in `in_work`."""


def plan(scene: Scene) -> StepPlan:
    """The next turn."""
    slots, room = scene.slots, scene.room
    overdue = slots.overdue(scene.now)
    over = {*scene.ended, *overdue}
    late = [prompt for prompt in (*scene.in_work, *scene.parked) if is_overdue(prompt.request, scene.now)]
    drop = [p for p in (*scene.in_work, *scene.parked) if p in late or any(s in over for s in p.samples)]
    computed = [prompt for prompt in scene.in_work if prompt not in drop]
    in_prompts = {sample for prompt in scene.in_work for sample in prompt.samples}
    free = [s for s in dict.fromkeys([*scene.ended, *overdue]) if s.slot is not None and s not in in_prompts]
    gone = [*slots_of(free), *(table for prompt in drop for table in prompt.tables)]

    width = scene.widths.choose(slots.due)
    grow = growth(slots, room, gone, width)
    if width > 1 and grow and not fits(room, grow, gone):  # nobody gives way to drafts
        width = 1
        grow = growth(slots, room, gone, width)
    victims: list[Sample | Prompt] = []
    if grow and not fits(room, grow, gone):
        running = [*computed, *(sample for sample in slots.live.owner_B if sample not in over)]
        victims = give_way(room, running, grow, gone)
        gone += [table for victim in victims for table in tables_of(victim)]
        computed = [prompt for prompt in computed if prompt not in victims]
        grow = {slot: pages for slot, pages in grow.items() if slot not in gone}

    waiting: Sequence[Prompt] | Lookahead[Prompt] = ()
    if scene.parked or scene.queued:
        waiting = Lookahead(prompt for prompt in chain(scene.parked, scene.queued) if prompt not in drop)
    new: Sequence[Work] | Lookahead[Work] = ()
    if waiting and not victims:
        new = Lookahead(admissible(scene, waiting, computed, gone, sum(grow.values())))
    prefills = prefills_of(scene, new, [(prompt, prompt.left) for prompt in computed])
    let_in = [prompt for prompts in prefills for prompt in prompts if prompt not in scene.in_work]
    return StepPlan(
        expired=tuple(dict.fromkeys([*(s.request for s in overdue), *(p.request for p in late)])),
        drop=tuple(drop),
        free=tuple(free),
        postpone=tuple(victim for victim in victims if isinstance(victim, Prompt)),
        preempt=tuple(victim for victim in victims if isinstance(victim, Sample)),
        grow=tuple(grow.items()),
        let_in=tuple(let_in),
        prefills=tuple(prefills),
        is_full=bool(waiting) and not new,
        idle_step=scene.probe,
        width=width,
    )


def prefills_of(
    scene: Scene, new: Sequence[Work] | Lookahead[Work], begun: Sequence[Work]
) -> Sequence[tuple[Prompt, ...]]:
    """Whose next pieces are computed: of those who can be let in, and of those in work."""
    if scene.is_computing or not (new or begun):
        return ()
    return scene.budget.prefills(chain(new, begun) if scene.newcomers else chain(begun, new))


def growth(slots: Slots, room: Room, gone: Sequence[int], width: int) -> dict[int, int]:
    """{slot: pages} that a step of this width may fill and that it has not."""
    slot_N = slots.live.slot_B
    pages_N = room.growth(slot_N, slots.rows_wanted(width))
    return {int(slot): int(pages) for slot, pages in zip(slot_N[pages_N > 0], pages_N[pages_N > 0], strict=True)
            if slot not in gone}  # fmt: skip


def fits(room: Room, grow: Mapping[int, int], gone: Sequence[int]) -> bool:
    """Whether there are pages for the slots that grow and are not gone themselves."""
    wanted = sum(pages for slot, pages in grow.items() if slot not in gone)
    return wanted <= min(room.available(gone), room.entries_left + room.entries_of(gone))


def give_way(
    room: Room, running: Sequence[Sample | Prompt], grow: Mapping[int, int], gone: Sequence[int]
) -> list[Sample | Prompt]:
    """Who gives its pages back so that the others can grow: the last in the queue's own order, in which priorities age,
    so that nobody gives way for ever."""
    tables, victims = list(gone), list[Sample | Prompt]()
    for one in sorted(running, key=lambda one: rank(one.request), reverse=True):
        if fits(room, grow, tables):
            break
        victims.append(one)
        tables += tables_of(one)
    return victims


def admissible(
    scene: Scene, waiting: Iterable[Prompt], in_work: Sequence[Prompt], gone: Sequence[int], grown: int
) -> Iterator[Work]:
    """Who can be let in, and how many tokens of each are to be computed: the first that waits, as soon as its slots and
    pages are there, and those behind it that have theirs too; nobody overtakes another, or a request for many slots
    might wait for ever.

    A prompt waits while another computes what both begin with.
    """
    slots, room = scene.slots, scene.room
    free_slots = slots.free + sum(table < len(slots.roster.owner_B) for table in gone)
    spare_tables = room.spare_tables + sum(table >= len(slots.roster.owner_B) for table in gone)
    pages, entries = room.available(gone) - grown, room.entries_left + room.entries_of(gone) - grown
    on_its_way = {name for prompt in in_work for name in room.missing(prompt)}
    is_alone = not in_work and {*slots.live.slot_B.tolist()} <= {*gone}
    adapters = adapters_used(slots, in_work, gone) if scene.max_adapters else frozenset[LoadedAdapter]()
    is_first = True
    for prompt in waiting:
        need = room.need(prompt)
        left = len(prompt.token_T) - len(need.shared) * room.rows
        margin = 0 if is_alone and is_first else margin_for(prompt, scene)
        if (
            (left > room.chunk and len(in_work) >= MOST_IN_WORK)
            or prompt.slots_needed > free_slots
            or (not prompt.slots_needed and not spare_tables)
            or need.pages + margin > pages
            or need.entries > entries
            or (need.missing and need.missing[0] in on_its_way)
            or len(adapters | adapter_of(prompt)) > scene.max_adapters
        ):
            return
        yield prompt, left
        is_first = False
        adapters |= adapter_of(prompt)
        free_slots -= prompt.slots_needed
        spare_tables -= not prompt.slots_needed
        pages, entries = pages - need.pages, entries - need.entries
        on_its_way.update(need.missing)


def adapters_used(slots: Slots, in_work: Iterable[Prompt], gone: Sequence[int]) -> frozenset[LoadedAdapter]:
    """Those that must stay on the devices, but for the tables that are `gone`."""
    staying = (sample.request.adapter for sample in slots.live.owner_B if sample.slot not in gone)
    return frozenset(adapter for adapter in (*staying, *(p.request.adapter for p in in_work)) if adapter is not None)


def adapter_of(prompt: Prompt) -> frozenset[LoadedAdapter]:
    """The one that it needs, if any."""
    return frozenset() if prompt.request.adapter is None else frozenset({prompt.request.adapter})


def margin_for(prompt: Prompt, scene: Scene) -> int:
    """Pages that must stay available beside a prompt's: for one that was pre-empted, that all others can grow."""
    return max(1, int(MARGIN * scene.room.size), 0 if prompt.is_fresh else len(scene.slots.live.slot_B))


def slots_of(samples: Iterable[Sample]) -> list[int]:
    return [sample.slot for sample in samples if sample.slot is not None]


def tables_of(one: Sample | Prompt) -> list[int]:
    return one.tables if isinstance(one, Prompt) else slots_of([one])
