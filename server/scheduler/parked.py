"""Who gave his pages back for others, and goes on before the queue does."""

from bisect import insort
from collections.abc import Iterator

import numpy as np

from ..delivery.result import HostResult
from ..request.request import Request, Sample
from .prompt import Prompt
from .turns import rank


class Parked:
    """The loop's. One thread. A sample leaves its slot at once and is parked when the step in flight is read: then all
    its tokens are known."""

    def __init__(self) -> None:
        self.waiting: list[Prompt] = []
        """Who goes on first stands first."""
        self._leaving: dict[Sample, list[int]] = {}  # their texts so far

    def __bool__(self) -> bool:
        return bool(self.waiting or self._leaving)

    def leave(self, sample: Sample, text_T: np.ndarray) -> None:
        """A sample that has left its slot; `text_T` is its prompt and answer as far as they were read."""
        self._leaving[sample] = text_T.tolist()

    def forget(self, sample: Sample) -> None:
        """It was leaving, perhaps, and its answer is over."""
        self._leaving.pop(sample, None)

    def read(self, result: HostResult) -> None:
        """Takes in what a step in flight brought for those who left."""
        for sample, text in list(self._leaving.items()):
            for row in np.flatnonzero(result.roster.owner_B == sample):
                text += result.token_BW[row, : result.count_B[row]].tolist()
                if result.stopped_B[row]:
                    del self._leaving[sample]

    def left(self) -> Iterator[tuple[Sample, list[int]]]:
        """Those who left and whose answers go on, with their texts: nothing of them is in flight or at work."""
        for sample, text in list(self._leaving.items()):
            if sample.constraint is not None and sample.constraint.is_at_work:
                continue
            del self._leaving[sample]
            if not sample.done and len(text) - len(sample.request.prompt_ids) < sample.request.max_tokens:
                yield sample, text

    def wait(self, prompt: Prompt) -> None:
        """It goes on before the queue does, in its place among the parked."""
        insort(self.waiting, prompt, key=lambda one: rank(one.request))

    def holds_all(self, request: Request) -> bool:
        """Whether all of its samples that are not over are parked."""
        parked = {sample for prompt in self.waiting for sample in prompt.samples}
        return all(sample in parked or sample.done for sample in request.samples)

    def keep(self, requests: set[Request]) -> None:
        """Forgets all but these, and those who were leaving."""
        self.waiting = [prompt for prompt in self.waiting if prompt.request in requests]
        self._leaving.clear()
