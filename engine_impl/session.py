"""An engine's slots for a caller without a scheduler.

session = Session(engine, params)
first = session.start(0, prompt_ids)        # slot 0; a prompt of any length, in chunks
result = session.step()                     # a token for every slot in use
session.stop(0)
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from .adapters.stacks import AdapterWeights
from .api import Opening, Piece
from .engine import Engine
from .errors import RefusedError
from .forward import Params
from .sampling.params import GREEDY, SamplingParams
from .state import DecodeState, Prefix, StepResult


class Session:
    """An engine with parameters and a state of its own. Every slot has the pages of its longest request for itself.

    Not safe to use from several threads.
    """

    def __init__(self, engine: Engine, params: Params) -> None:
        self.engine, self.params = engine, params
        self.state: DecodeState = engine.init_decode_state()
        self.adapter = 0
        """Index of the adapter that texts begin with; 0 is none."""
        self.slots: list[int] = []
        """Those in use, in the order of a step's results."""
        each = engine.sizes.pages_per_slot
        slots = min(engine.sizes.slots, engine.sizes.pages // each)
        self.page_BJ = np.arange(slots * each, dtype=np.int32).reshape(slots, each)
        """The page table, of as many slots as the pool has pages for."""

    def use_adapter(self, adapter: AdapterWeights) -> None:
        """It changes the model for all texts from now on; the engine has a place for it."""
        self.params, self.adapter = self.engine.put_adapter(self.params, 1, adapter), 1

    def prefill(
        self, slot: int, token_ids: Sequence[int], next_id: int | None = None, length: int | None = None
    ) -> Iterator[Prefix]:
        """A text for a slot, piece by piece. A piece is stored when the next one is asked for; the last is left to
        `insert`.

        `next_id` is the token behind the text, -1 if nobody knows; None: no log-probabilities are wanted. `length`:
        what the text may come to (tokens), by which some ropes turn; None: to all that a slot holds.

        Raises RefusedError for an empty text, one that is longer than the engine takes, and a slot that the pool has no
        pages for.
        """
        sizes = self.engine.sizes
        chunk, longest = sizes.prefill_chunk, sizes.max_prefill_length
        if not 0 < len(token_ids) <= longest:
            raise RefusedError(f"a prompt of {len(token_ids)} tokens must have from 1 to {longest}")
        if slot >= len(self.page_BJ):
            enough = (slot + 1) * sizes.pages_per_slot * sizes.page_rows
            raise RefusedError(
                f"{slot=}: the cache has pages for {len(self.page_BJ)} slots; raise --cache-tokens to {enough}, "
                "or lower --cache-length"
            )
        reach = self.engine.reach_of(length or sizes.cache_length)
        prefix = None
        for start in range(0, len(token_ids), chunk):
            if prefix is not None:
                self.insert(prefix, slot, is_last=False)
            end = min(start + chunk, len(token_ids))
            piece = Piece(
                token_T=np.array(token_ids[start:end], np.int32),
                start=start,
                page_J=self.page_BJ[slot],
                next_id=token_ids[end] if end < len(token_ids) else -1 if next_id is None else next_id,
                logprobs=None if next_id is None else 0,
                adapter=self.adapter,
                reach=reach,
            )
            prefix = self.engine.prefill(self.params, self.state, [piece])
            yield prefix

    def insert(self, prefix: Prefix, slot: int, *, is_last: bool = True) -> None:
        """A piece into the slot's pages; the last one brings the slot into use."""
        table = self.page_BJ[slot : slot + 1]
        self.state = self.engine.insert(prefix, self.state, [slot if is_last else None], table)
        if is_last and slot not in self.slots:
            self.slots.append(slot)

    def prefilled(self, slot: int, token_ids: Sequence[int], length: int | None = None) -> Prefix:
        """A text's last piece; those before it are stored. `length`: as of `prefill`."""
        prefix = None
        for prefix in self.prefill(slot, token_ids, length=length):  # noqa: B007
            pass
        assert prefix is not None
        return prefix

    def start(
        self,
        slot: int,
        token_ids: Sequence[int],
        sampling: SamplingParams = GREEDY,
        prompt_length: int | None = None,
        prediction: Sequence[int] = (),
        length: int | None = None,
    ) -> StepResult:
        """A text into a slot, whatever was there: the token behind it, N = 1.

        `prompt_length`: how many of its tokens are the prompt; the rest is an answer's beginning. None: all.
        `prediction`: of the answer, see `Opening`. `length`: as of `prefill`.
        """
        of_prompt = len(token_ids) if prompt_length is None else prompt_length
        opening = Opening(text=token_ids, prompt_length=of_prompt, sampling=sampling, prediction=prediction)
        prefix, result = self.engine.first_tokens(self.prefilled(slot, token_ids, length), [opening])
        self.insert(prefix, slot)
        return result

    def start_given(self, slot: int, token_ids: Sequence[int]) -> None:
        """A text into a slot whose last token is not computed yet: it is the next step's."""
        *earlier, last = token_ids
        self.insert(self.engine.force(self.prefilled(slot, earlier), [last]), slot)

    def step(self, width: int = 1) -> StepResult:
        """A token for every slot in use, or up to `width`, see `Engine.generate`."""
        slot_N = np.array(self.slots, np.int32)
        self.state, result = self.engine.generate(self.params, self.state, slot_N, self.page_BJ[slot_N], width=width)
        return result

    def score(self, next_token_N: Sequence[int] | np.ndarray) -> jax.Array:
        """A step with given tokens, one for each slot in use: their logprob_N, f32."""
        slot_N = np.array(self.slots, np.int32)
        self.state, logprob_N = self.engine.score_step(
            self.params, self.state, slot_N, self.page_BJ[slot_N], np.asarray(next_token_N)
        )
        return logprob_N

    def stop(self, slot: int) -> None:
        """A slot out of use."""
        self.slots.remove(slot)
