"""The engine: token ids in, token ids out. Knows nothing of text, requests or the network. Its face is `api.Engine`.

    prefix = engine.prefill(params, state, [Piece(token_T=..., start=0, page_J=pages)])
    prefix, first = engine.first_tokens(prefix, [Opening(text=..., prompt_length=..., sampling=...)])
    state = engine.insert(prefix, state, [slot], page_NJ)
    state, result = engine.generate(params, state, slot_N, page_NJ)      # one token for every slot named
    state, result = engine.generate(params, state, slot_N, page_NJ, width=4)                # or up to four
    state, result, prefix = engine.carry(params, state, slot_N, page_NJ, [Piece(...)])   # and a piece beside it

Given texts are scored by the same steps, with tokens that the caller chooses:

    prefix = engine.force(prefix, [token])
    state, logprob_N = engine.score_step(params, state, slot_N, page_NJ, token_N)

State in, state out, donated. Every program has a few shapes (`shapes.py`), each compiled once. Whoever has no scheduler
takes a `Session`, which knows the pages and the slots in use.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import numpy as np

from ..cache_manager import KV
from . import api
from .adapters.stacks import AdapterWeights
from .api import Allowed, Opening, Piece
from .asked import counts_of, masks_of, masks_of_openings, sampling_of
from .errors import PieceError
from .forward import Params
from .parameters import Parameters
from .placing import placed
from .programs import Programs
from .sampling.mask import Masks
from .shapes import Shapes
from .speculation.texts import texts_of
from .state import DecodeState, Prefix, StepResult
from .text.tokenizer import Tokenizer
from .warm_up import warm_up_prefills, warm_up_steps


class Engine:
    """A model on a mesh, serving `sizes.slots` requests together. Nothing on it changes after it is built; see
    `assembly.assembled`."""

    prefills_apart = False
    """Pieces and steps share the devices."""

    def __init__(
        self,
        programs: Programs,
        parameters: Parameters,
        shapes: Shapes,
        sizes: api.Sizes,
        tokenizer: Tokenizer,
        model_name: str,
    ) -> None:
        self.programs = programs
        """The device programs as functions: for whoever calls one within a program of his own."""
        self.jitted = programs.jitted()
        """The same, as they are run: for whoever lowers them."""
        self.parameters, self.shapes, self.sizes, self.model_name = parameters, shapes, sizes, model_name
        self.model, self.mesh, self.layout = programs.model, programs.mesh, programs.layout
        self._tokenizer, self._masks = tokenizer, Masks(self.sizes.vocab_size, programs.everywhere)

    @property
    def devices(self) -> list[api.Device]:
        """What it runs on, of this host's."""
        return list(self.mesh.local_devices)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def widths_of(self, slots: int) -> tuple[int, ...]:
        """Of steps of so many slots, in tokens that they bring each at most."""
        return self.shapes.widths_of(slots)

    def read_adapter(self, path: str) -> AdapterWeights:
        """See `Parameters.read_adapter`."""
        return self.parameters.read_adapter(path)

    def put_adapter(self, params: Params, index: int, adapter: AdapterWeights) -> Params:
        """See `Parameters.put_adapter`."""
        return self.parameters.put_adapter(params, index, adapter)

    def without_adapters(self, params: Params) -> Params:
        """See `Parameters.without_adapters`."""
        return self.parameters.without_adapters(params)

    def reach_of(self, length: int) -> int:
        """What decides the angles of a text that may come to `length` tokens, see `ModelConfig.reach_of`."""
        return self.programs.reach_of(length)

    def init_decode_state(self) -> DecodeState:
        """All slots empty."""
        return self.jitted.empty_state()

    def prefill(self, params: Params, decode_state: DecodeState, pieces: Sequence[Piece]) -> Prefix:
        """Compute the pieces' keys and values; their texts' earlier tokens are read from the state's cache.

        Raises PieceError for pieces that no shape holds, see `Shapes.pieces`.
        """
        batch = self.shapes.pieces(pieces)
        return self.jitted.prefill(params, decode_state.cache, batch, decode_state.draft_cache)

    def prefill_behind(self, params: Params, cache: KV, pieces: Sequence[Piece]) -> Prefix:
        """`prefill` for whoever has the earlier tokens in a cache of his own; compiled for each size of a pool."""
        return self.jitted.prefill(params, cache, self.shapes.pieces(pieces))

    def first_tokens(self, prefix: Prefix, openings: Sequence[Opening | None]) -> tuple[Prefix, StepResult]:
        """Choose the token behind each piece: (prefix, result); None for one whose text is not complete.

        Raises ValueError for more openings than the prefix may have pieces.
        """
        rows = prefix.token_N.shape[0]
        if len(openings) > rows:
            raise ValueError(f"{len(openings)} openings for a prefix of {rows}")
        openings = [*openings, *[None] * (rows - len(openings))]
        is_complete_N = np.array([opening is not None for opening in openings])
        texts = None if self.programs.drafting is None else texts_of(openings, self.layout.length)
        token_N, sampling, count_NV, texts, result = self.jitted.first_tokens(
            prefix.logits_NV, prefix.start_N, prefix.count_N, is_complete_N,
            sampling_of(openings, self.get_tokenizer()), counts_of(openings, prefix.count_NV),
            self._masks.of(rows, masks_of_openings(openings)), texts,
        )  # fmt: skip
        return replace(prefix, token_N=token_N, sampling=sampling, count_NV=count_NV, texts=texts), result

    def force(self, prefix: Prefix, tokens: Sequence[int]) -> Prefix:
        """Given tokens behind the pieces instead of chosen ones, one for each."""
        token_N = np.full(prefix.token_N.shape, -1, np.int32)
        token_N[: len(tokens)] = tokens
        return replace(prefix, token_N=placed(token_N, prefix.token_N.sharding))

    def insert(
        self, prefix: Prefix, decode_state: DecodeState, slots: Sequence[int | None], page_NJ: np.ndarray
    ) -> DecodeState:
        """Store the pieces' rows in their texts' pages; a text that has a slot is complete and the slot takes it over,
        whatever was there. The state is donated, the prefix is not."""
        rows = prefix.token_N.shape[0]
        slot_N = self.shapes.filled([self.layout.slots if slot is None else slot for slot in slots], rows)
        return self.jitted.insert(prefix, decode_state, slot_N, self.shapes.table(page_NJ, rows))

    def generate(
        self,
        params: Params,
        decode_state: DecodeState,
        slot_N: np.ndarray,
        page_NJ: np.ndarray,
        allowed: Allowed | None = None,
        width: int = 1,
    ) -> tuple[DecodeState, StepResult]:
        """One decode step: every slot named that is neither empty nor full gets its next token, or tokens, up to
        `width`, one of `shapes.widths`. The state is donated.

        Row n of the result belongs to slot_N[n]; rows behind them have a count of 0. `allowed`: which tokens may come.
        Where no step of so many slots is that wide, it is narrower: see `Shapes.wide_steps`.

        Raises ValueError for more slots than there are, and for another width.
        """
        width = self.shapes.width_of(len(slot_N), width)
        slot_N = self.shapes.step(slot_N)
        mask = self._masks.of(len(slot_N), masks_of(allowed), width)
        page_NJ = self.shapes.table(page_NJ, len(slot_N))
        return self.jitted.generate(params, decode_state, slot_N, page_NJ, mask, width=width)

    def carries(self, slots: int, lengths: Sequence[int]) -> bool:
        """Whether `carry` takes a step of so many slots and pieces of so many tokens."""
        return self.shapes.carry_of(slots, lengths) is not None

    def carry(
        self,
        params: Params,
        decode_state: DecodeState,
        slot_N: np.ndarray,
        page_NJ: np.ndarray,
        pieces: Sequence[Piece],
        allowed: Allowed | None = None,
    ) -> tuple[DecodeState, StepResult, Prefix]:
        """`generate` and `prefill` as one program, which reads the weights once: (state, result, prefix). The state is
        donated.

        Raises PieceError, before anything is started, for pieces that the step does not carry.
        """
        shape = self.shapes.carry_of(len(slot_N), lengths := [len(piece.token_T) for piece in pieces])
        if shape is None:
            raise PieceError(f"a step of {len(slot_N)} slots does not carry pieces of {lengths} tokens: prefill them")
        slots, tokens = shape
        batch = self.shapes.pieces(pieces, (1, tokens))
        slot_N, mask = self.shapes.filled(slot_N, slots), self._masks.of(slots, masks_of(allowed))
        return self.jitted.carry(params, decode_state, slot_N, self.shapes.table(page_NJ, slots), batch, mask)

    def score_step(
        self,
        params: Params,
        decode_state: DecodeState,
        slot_N: np.ndarray,
        page_NJ: np.ndarray,
        next_token_N: np.ndarray,
    ) -> tuple[DecodeState, jax.Array]:
        """`generate` with the tokens given (i32) instead of chosen: (state, logprob_N f32, each given token's).

        The same pass over the cache, the same flush; sampling parameters play no part. What is told of an empty or
        full slot is without meaning. Compiled when first called; the state is donated.
        """
        slot_N = self.shapes.step(slot_N)
        given_N = np.zeros(len(slot_N), np.int32)
        given_N[: len(next_token_N)] = next_token_N
        page_NJ = self.shapes.table(page_NJ, len(slot_N))
        return self.jitted.score_step(params, decode_state, slot_N, page_NJ, given_N)

    def warm_up(self, params: Params, decode_state: DecodeState) -> DecodeState:
        """Compile every program of serving by running it once; no slot may be in use, and none is after."""
        decode_state = warm_up_prefills(self, self.shapes, params, decode_state)
        return warm_up_steps(self, self.shapes, params, decode_state)


if TYPE_CHECKING:

    def _as_its_face(engine: Engine) -> api.Engine[Params, Prefix, DecodeState]:
        return engine
