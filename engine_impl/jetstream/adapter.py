"""What our engine says and does as JetStream's, whichever of its releases: all but prefill, insert and generate.

JetStream cannot take a slot's request away again, so every slot has the pages of its longest request for itself. A
prompt is computed in one piece, on JetStream's thread for prefills and perhaps on other devices than the slots'. An
existing prefix's rows are put into a cache of the adapter's own for it, which holds one request.
"""

import abc
import logging
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..engine import Engine
from ..errors import RefusedError
from ..forward import Params
from ..sampling.params import GREEDY, SamplingParams
from ..state import DecodeState, Prefix, StepResult
from . import compat as jetstream_compat
from .prompts import JetStreamPrefix, Prompts
from .tokenizer import NO_BOS, JetStreamTokenizer

with jetstream_compat.importing():
    from jetstream.engine.tokenizer_pb2 import TokenizerParameters  # pyright: ignore[reportAttributeAccessIssue]

log = logging.getLogger(__name__)

LONGEST_PREFILL = 32768
"""The last of the lengths that JetStream pads a prompt to (tokens)."""


class Adapter(abc.ABC):
    """The members that do not differ. JetStream's threads may call them at the same time."""

    api: ClassVar[Any]
    """`jetstream.engine.engine_api`, whose Engine this is."""

    def __init__(self, engine: Engine, params: Params) -> None:
        """Raises RefusedError for a cache that is too small for all slots' longest requests, and for an engine that
        drafts: JetStream asks for one token a step."""
        if engine.sizes.tokens_per_step > 1:
            raise RefusedError("speculate='auto' drafts what JetStream never asks for; leave --speculate out under it")
        self._engine, self._params = engine, params
        sizes = engine.sizes
        slots, pages, rows = sizes.slots, sizes.pages_per_slot, sizes.page_rows
        if sizes.pages < slots * pages:
            raise RefusedError(
                f"cache_tokens={sizes.cache_tokens} must be at least {slots * pages * rows} under JetStream, where "
                f"each of {slots} slots has {pages * rows} tokens for itself; use fewer --slots or a shorter "
                "--cache-length"
            )
        self._page_BJ = np.arange(slots * pages, dtype=np.int32).reshape(slots, pages)
        self._slot_B = np.arange(slots, dtype=np.int32)
        self._tokenizer = JetStreamTokenizer(engine.get_tokenizer())
        self._stop_ids = np.array(sorted(engine.get_tokenizer().stop_ids), np.int32)
        # Two threads that start programs on the same devices in turn could start them in another order on each device,
        # and their collectives would wait for one another. Also, tracing a torch module is for one thread at a time.
        self._turn = threading.Lock()
        self._everywhere = NamedSharding(engine.mesh, PartitionSpec())
        self._prompts = Prompts(engine, self._page_BJ[0])

    @abc.abstractmethod
    def init_decode_state(self, *args: Any, **kwargs: Any) -> Any:
        """All slots empty."""

    @abc.abstractmethod
    def insert(self, prefix: JetStreamPrefix, decode_state: Any, slot: int) -> Any:
        """Put a prefix into a slot, whatever was there; the state is donated, the prefix is not."""

    @abc.abstractmethod
    def generate(self, params: Params, decode_state: Any) -> tuple[Any, Any]:
        """One token of every slot: (state, JetStream's ResultTokens). The state is donated."""

    def prefix_of(
        self,
        params: Params,
        padded_tokens: Any,
        true_length: int,
        existing_prefix: Any = None,
        samplings: Sequence[SamplingParams] = (GREEDY,),
    ) -> tuple[JetStreamPrefix, list[StepResult]]:
        """A prompt's keys and values, and the first tokens of its answers, one for each sampling. The tokens go on
        behind those of an existing prefix, which stays as it is; its whole pages are not computed again.

        A prompt that cannot be answered (empty, too long, or with ids outside the vocabulary) gives a prefix whose
        answers end before their first tokens, and no results: an exception here would take JetStream's thread, and the
        server, down.
        """
        tokens = np.asarray(padded_tokens)[:true_length]
        with self._turn:
            try:
                before, prompt_ids = self._whole(existing_prefix, tokens)
                self._prompts.check(prompt_ids)
            except RefusedError as error:
                log.warning("a request gets an empty answer: %s", error)
                return self._prompts.refused(params, len(samplings)), []
            return self._prompts.computed(params, prompt_ids, before, samplings)

    def warm_up(self) -> None:
        """Compile every program, but for those of existing prefixes. Without it a program compiles when its first
        request comes."""
        state = self.init_decode_state()
        for pieces, tokens in self._engine.shapes.prefills:
            if pieces == 1:
                prefix, _ = self.prefix_of(self._params, np.zeros(tokens, np.int32), tokens)
                state = self.insert(prefix, state, 0)
        with self._turn:
            refused = self._prompts.refused(self._params, 1)
        state = self.insert(refused, state, 0)
        self.generate(self._params, state)[1].convert_to_numpy()

    def load_params(self, *args: Any, **kwargs: Any) -> Params:
        """The parameters that the engine was built with."""
        return self._params

    def get_prefix_destination_sharding(self) -> Any:
        """The shardings that a prefix of another engine takes on this one: a tree like a JetStreamPrefix."""
        return self._prompts.sharding()

    def get_tokenizer(self) -> TokenizerParameters:
        """Names the model; what JetStream asks of a tokenizer is `build_tokenizer`'s."""
        return TokenizerParameters(path=self._engine.model_name, extra_ids=0)

    def build_tokenizer(self, metadata: TokenizerParameters) -> JetStreamTokenizer:
        """The model's own, which came with its weights."""
        return self._tokenizer

    @property
    def max_concurrent_decodes(self) -> int:
        """Slots."""
        return self._engine.sizes.slots

    @property
    def samples_per_slot(self) -> int:
        """One."""
        return 1

    @property
    def max_prefill_length(self) -> int:
        """Longest prompt (tokens): a power of two up to 32768, of which JetStream keeps a list."""
        return 1 << (min(self._prompts.longest, LONGEST_PREFILL).bit_length() - 1)

    @property
    def mesh(self) -> Mesh:
        """The engine's devices."""
        return self._engine.mesh

    @property
    def colocated_cpus(self) -> list[Any] | None:
        """This host's CPU devices; None when JAX was started without."""
        try:
            return jax.local_devices(backend="cpu")
        except RuntimeError:
            return None

    def _whole(self, existing: Any, tokens: np.ndarray) -> tuple[JetStreamPrefix | None, list[int]]:
        """(our prefix that a prompt begins with, the whole prompt).

        The wheel hands a prefix on as it is; the last source tells with it which of its tokens still count, as its
        ExistingPrefix. Raises RefusedError where those are not the prefix's.
        """
        if existing is None:
            return None, self._as_begun(tokens)
        if isinstance(existing, JetStreamPrefix):
            return existing, existing.prompt_ids() + self._as_begun(tokens)
        before, common_ids = existing.cache, self._as_begun(np.asarray(existing.common_prefix_tokens))
        if before.prompt_ids()[: len(common_ids)] != common_ids:
            raise RefusedError("an existing prefix must begin with its common_prefix_tokens")
        return before, common_ids + tokens.astype(np.int32).tolist()

    def _as_begun(self, tokens: np.ndarray) -> list[int]:
        """A prompt as the model's tokenizer begins one."""
        prompt_ids = tokens.astype(np.int32).tolist()
        bos = self._tokenizer.bos_id
        is_doubled = bos != NO_BOS and prompt_ids[:2] == [bos, bos]
        return prompt_ids[1:] if is_doubled or prompt_ids[:1] == [NO_BOS] else prompt_ids

    def _generated(self, params: Params, decode: DecodeState) -> tuple[DecodeState, StepResult]:
        """A step of all slots, each with its own pages."""
        return self._engine.generate(params, decode, self._slot_B, self._page_BJ)

    def _inserted(self, text: Prefix, decode: DecodeState, slot: int) -> DecodeState:
        """A text in a slot, and in its pages."""
        return self._engine.insert(text, decode, [slot], self._page_BJ[slot : slot + 1])

    def _none_B(self) -> jax.Array:
        """i32 zeros."""
        return jax.device_put(np.zeros(self.max_concurrent_decodes, np.int32), self._everywhere)
