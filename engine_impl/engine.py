"""The engine: token ids in, token ids out, in JetStream's verbs. Knows nothing of text, requests or the network.

    prefix, first = engine.prefill(params, *engine.pad(prompt_ids), sampling=...)
    state = engine.insert(prefix, state, slot)
    state, result = engine.generate(params, state)      # one token for every live slot
    state = engine.free(state, slot)

    prefix, other = engine.resample(prefix, sampling)   # several answers to one prompt

Given texts are scored by the same steps, with tokens that the caller chooses:

    prefix, logprob = engine.force(prefix, token)
    state, logprob_B = engine.score_step(params, state, token_B)

State in, state out, donated. Every program has one shape, so each is compiled once; prefill and insert are compiled
once per bucket.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .. import cache_manager, kernels
from . import api, forward
from .attention import stored_head_dim
from .checkpoints.contract import Checkpoint
from .config import EngineConfig
from .errors import RefusedError
from .forward import LayerLoop, Params
from .models.decoder import Decoder
from .programs import GREEDY, Programs
from .quantization.swap import quantize
from .sampling.params import SamplingParams
from .sampling.slots import SlotSampling
from .state import DecodeState, Prefix, StepResult
from .text.tokenizer import Tokenizer
from .weights.load import load_params


class Engine:
    """A model on a mesh, serving `slots` requests together. Nothing on it changes after it is built."""

    def __init__(
        self, model: Decoder, mesh: Mesh, config: EngineConfig, dtype: jnp.dtype, tokenizer: Tokenizer, model_name: str
    ) -> None:
        """`model` may be on the meta device; its kv heads must be a multiple of the mesh's size (see `loading`). Its
        linear modules are swapped here if the config asks for quantised weights."""
        self.model_name = model_name
        self.mesh = mesh
        slots, cache_length = config.chosen
        self.buckets = config.buckets
        platform = mesh.devices.flat[0].platform
        self.layer_loop: LayerLoop = forward.layer_loop_for(platform)
        backend = kernels.backend_for(platform)
        of_slot: dict[str, Any] = {
            "kv_heads": model.config.num_kv_heads,
            "length": cache_length,
            "head_dim": stored_head_dim(model.config.head_dim, backend),
            "dtype": dtype,
            "codec": cache_manager.codec_for(config.quantize_kv),
        }
        self.layout = cache_manager.CacheLayout(
            layers=model.config.num_layers,
            slots=slots,
            page_rows=cache_manager.tuned_page_rows(**of_slot, mesh=mesh, backend=backend),
            **of_slot,
        )
        self.page_BJ = self.layout.own_pages()
        """The page table (i32): every slot has the pages of its longest request for itself."""
        quantize(model, config, dtype, mesh, backend)
        self.model = model
        """The modules, with their linear ones as quantisation left them; they hold no weights."""
        self._tokenizer = tokenizer
        self.programs = Programs(model, mesh, self.layout, backend)
        """The device programs as functions: for whoever calls one within a program of his own."""
        self.jitted = self.programs.jitted()
        """The same, as they are run: for whoever lowers them."""

    def twin(self, programs: Programs | None = None, layer_loop: LayerLoop | None = None) -> "Engine":
        """This engine with other programs or another layer loop, to be compared with it; its prefill stays the same
        program. With another layer loop the parameters have another form: load them anew."""
        twin = copy.copy(self)
        twin.programs = programs or self.programs
        twin.layer_loop = layer_loop or self.layer_loop
        twin.jitted = twin.programs.jitted()._replace(prefill=self.jitted.prefill)
        return twin

    @property
    def max_concurrent_decodes(self) -> int:
        """Slots."""
        return self.layout.slots

    @property
    def max_prefill_length(self) -> int:
        """Longest prompt (tokens)."""
        return self.buckets[-1]

    @property
    def cache_length(self) -> int:
        """Prompt and answer of one request together (tokens)."""
        return self.programs.cache_length

    @property
    def page_rows(self) -> int:
        """R: tokens of a page."""
        return self.layout.page_rows

    @property
    def pages(self) -> int:
        """P: pages of the pool."""
        return self.layout.pages

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.model.config.vocab_size

    @property
    def devices(self) -> list[api.Device]:
        """What it runs on."""
        return list(self.mesh.devices.flat)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def load_params(self, checkpoint: Checkpoint) -> Params:
        """Read the weights onto the mesh. Raises RefusedError when the checkpoint does not fit the model."""
        return load_params(self.model, checkpoint, self.mesh, self.layout.dtype, self.layer_loop)

    def init_decode_state(self) -> DecodeState:
        """All slots empty."""
        return self.jitted.empty_state()

    def pad(self, token_ids: Sequence[int]) -> tuple[np.ndarray, int]:
        """A prompt in the smallest bucket that holds it: (padded_T i32, true length).

        Raises RefusedError for an empty prompt and for one longer than the largest bucket.
        """
        length = len(token_ids)
        if not 0 < length <= self.max_prefill_length:
            raise RefusedError(f"a prompt of {length} tokens must have from 1 to {self.max_prefill_length}")
        bucket = next(bucket for bucket in self.buckets if bucket >= length)
        padded_T = np.zeros(bucket, np.int32)
        padded_T[:length] = token_ids
        return padded_T, length

    def prefill(
        self,
        params: Params,
        padded_tokens: np.ndarray,
        true_length: int,
        *,
        sampling: SamplingParams = GREEDY,
        prompt_logprobs: bool = False,
    ) -> tuple[Prefix, StepResult]:
        """Compute a prompt's keys and values and choose its first token: (prefix, that token's result, B = 1).

        `prompt_logprobs` fills the prefix's prompt_logprob_T, at the price of all the prompt's logits.
        """
        return self.jitted.prefill(
            params, padded_tokens, np.int32(true_length), self._on_device(sampling), np.bool_(prompt_logprobs)
        )

    def resample(self, prefix: Prefix, sampling: SamplingParams) -> tuple[Prefix, StepResult]:
        """Another first token for the same prompt: what prefill would give with these parameters, without its work."""
        token, chosen, result = self.jitted.resample(
            prefix.logits_V, prefix.count_V, prefix.length, self._on_device(sampling)
        )
        return replace(prefix, token=token, sampling=chosen), result

    def force(self, prefix: Prefix, token: int) -> tuple[Prefix, jax.Array]:
        """A given first token instead of a chosen one: (prefix, its log-probability, an f32 scalar)."""
        forced, logprob = self.jitted.force(prefix.logits_V, np.int32(token))
        return replace(prefix, token=forced), logprob

    def insert(self, prefix: Prefix, decode_state: DecodeState, slot: int) -> DecodeState:
        """Put a prefix into a slot; whatever was there is gone. The state is donated, the prefix is not."""
        return self.jitted.insert(prefix, decode_state, np.int32(slot), self.page_BJ[slot])

    def generate(self, params: Params, decode_state: DecodeState) -> tuple[DecodeState, StepResult]:
        """One decode step: every slot that is neither empty nor full gets its next token. The state is donated."""
        return self.jitted.generate(params, decode_state, self.page_BJ)

    def score_step(
        self, params: Params, decode_state: DecodeState, next_token_B: np.ndarray
    ) -> tuple[DecodeState, jax.Array]:
        """`generate` with the tokens given (i32) instead of chosen: (state, logprob_B f32, each given token's).

        The same pass over the cache, the same flush; sampling parameters play no part. What is told of an empty or
        full slot is without meaning. Compiled when first called; the state is donated.
        """
        return self.jitted.score_step(params, decode_state, self.page_BJ, np.asarray(next_token_B, np.int32))

    def free(self, decode_state: DecodeState, slot: int) -> DecodeState:
        """Empty a slot. The state is donated."""
        return self.jitted.free(decode_state, np.int32(slot))

    def warm_up(self, params: Params, decode_state: DecodeState) -> DecodeState:
        """Compile every program of serving by running it once; slots must be empty and are empty again after."""
        for bucket in self.buckets:
            prefix, _ = self.prefill(params, np.zeros(bucket, np.int32), bucket)
            decode_state = self.insert(prefix, decode_state, 0)
        self.resample(prefix, GREEDY)
        decode_state, result = self.generate(params, decode_state)
        decode_state = self.free(decode_state, 0)
        result.token_BW.block_until_ready()
        return decode_state

    def _on_device(self, sampling: SamplingParams) -> SlotSampling:
        return SlotSampling.of(sampling, self.get_tokenizer().stop_ids if sampling.min_tokens else ())


if TYPE_CHECKING:

    def _as_its_face(engine: Engine) -> api.Engine[Params, Prefix, DecodeState]:
        return engine
