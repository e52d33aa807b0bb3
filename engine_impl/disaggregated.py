"""Two engines as one: prompts are computed on devices of their own, and their rows handed to those that decode.

Both caches have the same pages under the same numbers. A piece's rows are stored on the prefill side, where the next
piece reads them, and go from device to device into the same pages on the decode side. What decoding stores stays there:
before a prompt that begins with pages of earlier answers, those are copied back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from . import api
from .adapters.stacks import AdapterWeights
from .api import Allowed, Opening, Piece
from .engine import Engine
from .errors import AdaptersLostError, PieceError
from .forward import Params
from .state import DecodeState, Prefix, StepResult
from .text.tokenizer import Tokenizer
from .warm_up import blank, warm_up_steps

PAGES_AT_ONCE = (1, 8, 64)
"""That are copied by one program (pages)."""


@dataclass(frozen=True)
class BothParams:
    """The weights on either side."""

    prefill: Params
    decode: Params


@dataclass
class BothStates:
    """The states on either side. Whoever is handed one has the newest: it changes where it is."""

    prefill: DecodeState
    """Of its slots none is used."""
    decode: DecodeState
    has_P: np.ndarray
    """bool, pages that the prefill side has as well: decoding stored nothing in them"""
    known_B: np.ndarray
    """i64, tokens of each slot's text that the prefill side has computed; rows behind them are decode's"""
    most_B: np.ndarray
    """i64, tokens of each slot's text at most, with what the steps since may have stored"""


class _PageCopies:
    """From the decode side's cache into the same pages of the prefill side's."""

    def __init__(self) -> None:
        def take(caches: Any, page_M: jax.Array) -> Any:
            return jax.tree.map(lambda cache: cache[:, page_M], caches)

        def put(caches: Any, pages: Any, page_M: jax.Array) -> Any:
            return jax.tree.map(lambda cache, rows: cache.at[:, page_M].set(rows), caches, pages)

        self._take, self._put = jax.jit(take), jax.jit(put, donate_argnums=0)

    def copy(self, state: BothStates, page_M: np.ndarray) -> None:
        """In place."""
        taken = self._take(_caches(state.decode), page_M)
        there = _caches(state.prefill)
        moved = jax.tree.map(lambda rows, cache: jax.device_put(rows, cache.sharding), taken, there)
        cache, draft_cache = self._put(there, moved, page_M)
        state.prefill = replace(state.prefill, cache=cache, draft_cache=draft_cache)


def _caches(state: DecodeState) -> Any:
    return state.cache, state.draft_cache


class DisaggregatedEngine:
    """Satisfies `api.Engine`. The two have the same model, slots and pages."""

    prefills_apart = True

    def __init__(self, prefill: Engine, decode: Engine) -> None:
        """Raises ValueError for engines whose pages are not the same."""
        sizes = [(e.slots, e.page_rows, e.pages, e.cache_length) for e in (prefill.sizes, decode.sizes)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"(slots, page rows, pages, cache length) differ: {sizes}")
        of_prefill = prefill.sizes
        self.sizes = replace(
            decode.sizes,
            prefill_chunk=of_prefill.prefill_chunk,
            prefill_batch=of_prefill.prefill_batch,
            prefill_lengths=of_prefill.prefill_lengths,
            skips_padding=of_prefill.skips_padding,
        )
        self.prefill_engine, self.decode_engine = prefill, decode
        self.model_name = decode.model_name
        self._copies = _PageCopies()

    # What a caller may know

    def widths_of(self, slots: int) -> tuple[int, ...]:
        return self.decode_engine.widths_of(slots)

    @property
    def devices(self) -> list[api.Device]:
        return [*self.prefill_engine.devices, *self.decode_engine.devices]

    def reach_of(self, length: int) -> int:
        return self.decode_engine.reach_of(length)

    def get_tokenizer(self) -> Tokenizer:
        return self.decode_engine.get_tokenizer()

    # Weights

    def read_adapter(self, path: str) -> AdapterWeights:
        return self.decode_engine.read_adapter(path)

    def put_adapter(self, params: BothParams, index: int, adapter: AdapterWeights) -> BothParams:
        prefill = self.prefill_engine.put_adapter(params.prefill, index, adapter)
        try:
            return BothParams(prefill, self.decode_engine.put_adapter(params.decode, index, adapter))
        except Exception as error:  # one side has it, and gave up the others
            raise AdaptersLostError("the adapters on the devices are lost: the sides differ") from error

    def without_adapters(self, params: BothParams) -> BothParams:
        return BothParams(
            self.prefill_engine.without_adapters(params.prefill), self.decode_engine.without_adapters(params.decode)
        )

    # Verbs

    def init_decode_state(self) -> BothStates:
        slots = self.sizes.slots
        return BothStates(
            self.prefill_engine.init_decode_state(),
            self.decode_engine.init_decode_state(),
            has_P=np.zeros(self.sizes.pages, bool),
            known_B=np.zeros(slots, np.int64),
            most_B=np.zeros(slots, np.int64),
        )

    def warm_up(self, params: BothParams, decode_state: BothStates) -> BothStates:
        state, prefill, decode = decode_state, self.prefill_engine, self.decode_engine
        for shape in prefill.shapes.prefills:
            prefix, page_NJ = blank(prefill, params.prefill, state.prefill, shape)
            state = self.insert(prefix, state, [None] * len(page_NJ), page_NJ)
        for size in PAGES_AT_ONCE:
            self._copies.copy(state, np.zeros(size, np.int32))
        state.decode = warm_up_steps(decode, decode.shapes, params.decode, state.decode)
        return state

    def prefill(self, params: BothParams, decode_state: BothStates, pieces: Sequence[Piece]) -> Prefix:
        self._bring_back(decode_state, pieces)
        return self.prefill_engine.prefill(params.prefill, decode_state.prefill, pieces)

    def first_tokens(self, prefix: Prefix, openings: Sequence[Opening | None]) -> tuple[Prefix, StepResult]:
        return self.prefill_engine.first_tokens(prefix, openings)

    def insert(
        self, prefix: Prefix, decode_state: BothStates, slots: Sequence[int | None], page_NJ: np.ndarray
    ) -> BothStates:
        state, engine = decode_state, self.decode_engine
        end_N = np.asarray(prefix.start_N) + np.asarray(prefix.count_N)
        state.prefill = self.prefill_engine.insert(prefix, state.prefill, [None] * len(slots), page_NJ)
        moved = jax.device_put(prefix, engine.programs.prefix_sharding())
        state.decode = engine.insert(moved, state.decode, slots, page_NJ)
        for slot, end, page_J in zip(slots, end_N.tolist(), page_NJ, strict=False):
            state.has_P[page_J[: -(-end // self.sizes.page_rows)]] = True
            if slot is not None:
                state.known_B[slot] = state.most_B[slot] = end
        return state

    def generate(
        self,
        params: BothParams,
        decode_state: BothStates,
        slot_N: np.ndarray,
        page_NJ: np.ndarray,
        allowed: Allowed | None = None,
        width: int = 1,
    ) -> tuple[BothStates, StepResult]:
        state = decode_state
        state.decode, result = self.decode_engine.generate(params.decode, state.decode, slot_N, page_NJ, allowed, width)
        state.most_B[slot_N] += width
        first_J = np.arange(page_NJ.shape[1]) * self.sizes.page_rows
        is_behind_NJ = first_J + self.sizes.page_rows > state.known_B[slot_N, None]
        state.has_P[page_NJ[is_behind_NJ & (first_J < state.most_B[slot_N, None])]] = False
        return state, result

    def carries(self, slots: int, lengths: Sequence[int]) -> bool:
        """Pieces are computed elsewhere."""
        return False

    def carry(
        self,
        params: BothParams,
        decode_state: BothStates,
        slot_N: np.ndarray,
        page_NJ: np.ndarray,
        pieces: Sequence[Piece],
        allowed: Allowed | None = None,
    ) -> tuple[BothStates, StepResult, Prefix]:
        raise PieceError("a step carries no pieces where other devices compute them: prefill them")

    def _bring_back(self, state: BothStates, pieces: Sequence[Piece]) -> None:
        """What the prefill side lacks of the pages that the pieces' texts begin with."""
        pages = {int(page) for piece in pieces for page in piece.page_J[: -(-piece.start // self.sizes.page_rows)]}
        missing = sorted(page for page in pages if not state.has_P[page])
        while missing:
            size = next((size for size in PAGES_AT_ONCE if size >= len(missing)), PAGES_AT_ONCE[-1])
            now, missing = missing[:size], missing[size:]
            page_M = np.array(now + now[-1:] * (size - len(now)), np.int32)
            try:
                self._copies.copy(state, page_M)
            except Exception:
                self._begin_anew(state)
                raise
            state.has_P[now] = True

    def _begin_anew(self, state: BothStates) -> None:
        """A copy failed. The cache that it was to change in place may be lost with it: an empty one takes its place,
        and pages come back from the decode side, which has all, as texts need them."""
        leaves = jax.tree.leaves(_caches(state.prefill))
        if not any(leaf.is_deleted() for leaf in leaves):
            return
        for leaf in leaves:  # two may not fit the devices
            leaf.delete()
        state.prefill = self.prefill_engine.init_decode_state()
        state.has_P[:] = False


if TYPE_CHECKING:

    def _as_its_face(engine: DisaggregatedEngine) -> api.Engine[BothParams, Prefix, BothStates]:
        return engine
