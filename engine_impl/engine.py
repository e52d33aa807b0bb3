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

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .. import kernels
from ..cache_manager import KV, CacheLayout
from . import api, forward
from .adapters.peft_folder import adapter_folder, read_adapter
from .adapters.sites import adapt, sites_of
from .adapters.stacks import AdapterPlaces, AdapterWeights
from .api import Allowed, Opening, Piece
from .asked import counts_of, masks_of, masks_of_openings, sampling_of
from .caching import Drafting
from .checkpoints.contract import Checkpoint
from .config import EngineConfig
from .draft_model import DraftModel, beside
from .drafting import of_long_repeats, of_text
from .errors import PieceError, RefusedError
from .forward import LayerLoop, Params
from .layout import chunk_of, layout_of
from .models.decoder import Decoder
from .placing import placed
from .programs import Programs
from .quantization.swap import quantize
from .sampling.mask import Masks
from .shapes import Shapes
from .speculation.texts import texts_of
from .state import DecodeState, Prefix, StepResult
from .text.tokenizer import Tokenizer
from .warm_up import warm_up_prefills, warm_up_steps
from .weights.load import needed_shapes
from .weights.loaded import loaded


class Engine:
    """A model on a mesh, serving `slots` requests together. Nothing on it changes after it is built."""

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        config: EngineConfig,
        dtype: jnp.dtype,
        tokenizer: Tokenizer,
        model_name: str,
        kv_heads: int | None = None,
        draft: DraftModel | None = None,
        page_rows: int | None = None,
    ) -> None:
        """`model` may be on the meta device; its kv heads must be a multiple of the mesh's size (see `loading`). Its
        linear modules are swapped here if the config asks for quantised weights, and adapted if it asks for adapters.

        `kv_heads`: as checkpoints and adapters have them; default: the model's. `draft`: a draft model likewise, where
        the config speculates.

        `page_rows`: of pages that another engine has too; default: what suits the mesh.

        Raises RefusedError for a cache or a chunk that is not whole pages.
        """
        self.model_name = model_name
        self.mesh = mesh
        platform = mesh.devices.flat[0].platform
        self.layer_loop: LayerLoop = forward.layer_loop_for(platform, model, *([] if draft is None else [draft.model]))
        backend = kernels.backend_for(platform)
        self.layout = layout_of(config, model.config, mesh, dtype, page_rows)
        sites = sites_of(model, mesh) if config.max_adapters else ()
        quantize(model, config, dtype, mesh, backend)
        adapt(model, sites)
        self.model = model
        """The modules, with their linear ones as quantisation left them; they hold no weights."""
        self._weight_cache = None if config.weight_cache is None else Path(config.weight_cache).expanduser()
        self._tokenizer, self._kv_heads = tokenizer, kv_heads or model.config.num_kv_heads
        self.adapter_places: AdapterPlaces | None = None
        """Of the adapters that the devices hold; None: there are none."""
        if config.max_adapters:
            self.adapter_places = AdapterPlaces(
                sites, len(model.layers), config.max_adapters, config.max_adapter_rank, mesh, dtype
            )
        self.draft_model: Decoder | None = None
        drafting = None if config.speculate == "off" else Drafting(propose=of_text)
        if drafting is not None and draft is not None:
            quantize(draft.model, draft.config, dtype, mesh, backend)
            self.draft_model = draft.model
            small = Programs(draft.model, mesh, beside(self.layout, draft.model.config, backend), backend, False)
            drafting = Drafting(propose=of_long_repeats, model=small)
        self.programs = Programs(model, mesh, self.layout, backend, config.max_adapters > 0, drafting=drafting)
        """The device programs as functions: for whoever calls one within a program of his own."""
        self.jitted = self.programs.jitted()
        """The same, as they are run: for whoever lowers them."""
        self._masks = Masks(model.config.vocab_size, self.programs.everywhere)
        self.max_prefill_length = min(config.max_prefill_length or self.cache_length, self.cache_length)
        """Longest prompt (tokens)."""
        self.shapes = Shapes(
            slots=self.layout.slots,
            pages_per_slot=self.layout.pages_per_slot,
            page_rows=self.layout.page_rows,
            chunk=chunk_of(config, self.layout, self.max_prefill_length, platform),
            platform=platform,
            has_adapters=config.max_adapters > 0,
            has_reaches=self.programs.has_reaches,
            speculates=config.speculate != "off",
        )

    def twin(self, programs: Programs | None = None, layer_loop: LayerLoop | None = None) -> "Engine":
        """This engine with other programs or another layer loop, to be compared with it. With another layer loop the
        parameters have another form: load them anew."""
        twin = copy.copy(self)
        twin.programs = programs or self.programs
        twin.layer_loop = layer_loop or self.layer_loop
        twin.jitted = twin.programs.jitted()
        return twin

    @property
    def max_concurrent_decodes(self) -> int:
        """Slots."""
        return self.layout.slots

    @property
    def cache_length(self) -> int:
        """Prompt and answer of one request together (tokens)."""
        return self.programs.cache_length

    @property
    def prefill_chunk(self) -> int:
        """Most tokens of one piece; a multiple of `page_rows`."""
        return self.shapes.chunk

    @property
    def prefill_batch(self) -> tuple[int, int, int]:
        """(how many pieces go into one prefill, at least and at most, of how many tokens each at most)."""
        return self.shapes.burst

    @property
    def prefills_apart(self) -> bool:
        """Pieces and steps share the devices."""
        return False

    @property
    def tokens_per_step(self) -> int:
        """W: of the widest step."""
        return self.shapes.widths[-1]

    def widths_of(self, slots: int) -> tuple[int, ...]:
        """Of steps of so many slots, in tokens that they bring each at most."""
        return self.shapes.widths_of(slots)

    @property
    def page_rows(self) -> int:
        """R: tokens of a page."""
        return self.layout.page_rows

    @property
    def pages(self) -> int:
        """P: pages of the pool."""
        return self.layout.pages

    @property
    def pages_per_slot(self) -> int:
        """J: pages of the longest request."""
        return self.layout.pages_per_slot

    @property
    def table_entries(self) -> int:
        """Most pages that the tables of one step's slots may have together."""
        return self.layout.table_entries

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.model.config.vocab_size

    @property
    def devices(self) -> list[api.Device]:
        """What it runs on, of this host's."""
        return list(self.mesh.local_devices)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def cache_layouts(self) -> list[CacheLayout]:
        """Of all that is cached of a token: the model's, and the draft model's."""
        small = None if self.programs.drafting is None else self.programs.drafting.model
        return [self.layout] if small is None else [self.layout, small.layout]

    @property
    def cache_bytes(self) -> int:
        """Of these, over all devices."""
        return sum(layout.bytes for layout in self.cache_layouts)

    def load_params(self, checkpoint: Checkpoint, draft_checkpoint: Checkpoint | None = None) -> Params:
        """Read the weights onto the mesh, the draft model's too where there is one. Raises RefusedError when a
        checkpoint does not fit its model."""
        form = self.mesh, self.layout.dtype, self.layer_loop
        params = loaded(self.model, checkpoint, *form, self._weight_cache)
        if self.draft_model is not None and draft_checkpoint is not None:
            params |= {"draft": loaded(self.draft_model, draft_checkpoint, *form, self._weight_cache)}
        return self.without_adapters(params)

    @property
    def max_adapters(self) -> int:
        """Adapters that the devices hold at once."""
        return 0 if self.adapter_places is None else self.adapter_places.count

    def read_adapter(self, path: str) -> AdapterWeights:
        """A PEFT folder's, or a hub id's, into the host's memory; from any thread.

        Raises RefusedError for one that does not fit the model or its place, and where there are no places.
        """
        if self.adapter_places is None:
            raise RefusedError("there are no adapters; serve with --max-adapters N")
        shapes = needed_shapes(self.model, self._kv_heads)
        return read_adapter(adapter_folder(path), self.model, shapes, self._kv_heads, self.adapter_places)

    def put_adapter(self, params: Params, index: int, adapter: AdapterWeights) -> Params:
        """An adapter onto the devices, at `index` (from 1 to `max_adapters`), whatever was there. The adapters of
        `params` are donated: hold what it gives.

        Raises AdaptersLostError when it fails once they are donated; before, what made it fail.
        """
        assert self.adapter_places is not None
        return params | {"adapters": self.adapter_places.put(params["adapters"], index, adapter)}

    def without_adapters(self, params: Params) -> Params:
        """The parameters with no adapter on the devices, whatever has become of those that were there."""
        if self.adapter_places is None:
            return params
        return params | {"adapters": self.adapter_places.emptied(params.get("adapters", ()), self.layer_loop)}

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
