"""What requests hold: their slots and pages, the prompts that are computed into them, and who gave them back for others
and goes on later."""

from collections.abc import Collection, Sequence

import numpy as np

from ...engine_impl.api import AnyEngine
from ..request.request import Request, Sample
from .parked import Parked
from .plan import StepPlan
from .prompt import Prompt
from .room import Room
from .slots import Slots


class Holdings:
    """The loop's. One thread."""

    def __init__(self, engine: AnyEngine, *, prefix_cache: bool) -> None:
        self._engine, self._prefix_cache = engine, prefix_cache
        self._stop_ids = sorted(engine.get_tokenizer().stop_ids)
        self.slots, self.room = self._nothing_taken()
        self.in_work: list[Prompt] = []
        """Prompts that have slots and pages, and some pieces to go; who is next stands first."""
        self.parked = Parked()

    def prompt(self, samples: Sequence[Sample], text: Sequence[int]) -> Prompt:
        """That holds nothing yet."""
        token_T = np.asarray(text, np.int32)
        return Prompt(tuple(samples), token_T, self.room.names(token_T, samples[0].request.shared_key))

    def let_in(self, prompt: Prompt) -> None:
        """It gets its slots and pages, and is in work."""
        slots = [self.slots.reserve(sample) for sample in prompt.samples[: prompt.slots_needed]]
        self.room.let_in(prompt, slots)
        self.in_work.append(prompt)

    def advance(self, prompt: Prompt) -> None:
        """Its piece was stored: the others in work go first, or it is complete."""
        self.in_work.remove(prompt)
        if prompt.left:
            self.in_work.append(prompt)
        elif not prompt.slots_needed:
            self.room.leave(prompt.tables[0])

    def give_back(self, turn: StepPlan) -> None:
        """What the plan takes from some, and gives to others that grow."""
        for prompt in turn.drop:
            self.drop(prompt)
        for sample in turn.free:
            self.free(sample)
        for prompt in turn.postpone:
            self.drop(prompt)
            self.parked.wait(Prompt(prompt.samples, prompt.token_T, prompt.names))
        for sample in turn.preempt:
            self.preempt(sample)
        for slot, pages in turn.grow:
            self.room.grow(slot, pages)

    def drop(self, prompt: Prompt) -> None:
        """One that waits or is in work. Its full pages that are computed stay as a cached prefix."""
        for table in prompt.tables:
            self.room.leave(table)
        for sample in prompt.samples:
            if sample.slot is not None:
                self.slots.take_back(sample)
        (self.in_work if prompt.tables else self.parked.waiting).remove(prompt)

    def free(self, sample: Sample) -> None:
        """Of a sample that decodes. What its text fills stays as a cached prefix; its last token may lack its row."""
        if sample.slot is not None:
            text_T = self.slots.text(sample)[:-1]
            self.room.leave_text(self.slots.take_back(sample), text_T, sample.request.shared_key)

    def preempt(self, sample: Sample) -> None:
        """Of a sample that decodes: it is parked when the step in flight was read."""
        self.parked.leave(sample, self.slots.text(sample))
        self.free(sample)

    def park(self) -> None:
        """Whoever left, and of whom nothing is in flight any more."""
        for sample, text in self.parked.left():
            self.parked.wait(self.prompt([sample], text))

    def lose(self, failed: Collection[Request], others: Collection[Request]) -> None:
        """The cache is lost, and `failed` with it. Those of `others` that are parked had nothing in it."""
        of_failed = (sample for request in failed for sample in request.samples)
        in_work = (sample for prompt in self.in_work for sample in prompt.samples)
        for sample in (*self.slots.live.owner_B, *in_work, *of_failed):
            sample.slot = None
        self.in_work = []
        self.parked.keep(set(others))
        self.slots, self.room = self._nothing_taken()

    def _nothing_taken(self) -> tuple[Slots, Room]:
        engine = self._engine
        slots = Slots(engine.sizes.slots, self._stop_ids, cache_length=engine.sizes.cache_length)
        return slots, Room(engine, prefix_cache=self._prefix_cache)
