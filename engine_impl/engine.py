"""The engine: token ids in, token ids out, in JetStream's verbs. Knows nothing of text, requests or the network.

    prefix, first = engine.prefill(params, *engine.pad(prompt_ids), sampling=...)
    state = engine.insert(prefix, state, slot)
    state, result = engine.generate(params, state)      # one token for every live slot
    state = engine.free(state, slot)

Functional: state in, state out, donated. Every program has one shape, so each is compiled once (prefill and insert once
a bucket).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import cache_manager, kernels
from . import forward, weights
from .attention import attend_cache, attend_prompt
from .config import EngineConfig
from .errors import RefusedError
from .forward import LayerLoop, Params
from .models.decoder import Decoder
from .sampling import SlotSampling, sample
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

GREEDY = SamplingParams()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """A prompt after prefill, ready for any slot."""

    kv_LKTC: jax.Array
    """the cache's dtype; rows past `length` are padding"""
    length: jax.Array
    """i32 scalar, tokens of the prompt"""
    token: jax.Array
    """i32 scalar, the first token of the answer, not in kv"""
    sampling: SlotSampling
    """scalars"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All slots between two steps."""

    cache_LBKSC: jax.Array
    """k and v of all layers, see cache_manager/layout.py"""
    token_B: jax.Array
    """i32, last sampled token, not yet in the cache"""
    length_B: jax.Array
    """i32, tokens in the cache; 0 = empty slot, S = full slot"""
    sampling: SlotSampling
    """[B] each"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepResult:
    """What a decode step tells the host."""

    token_B: jax.Array
    """i32, the step's token; -1 for a slot that is empty or full"""


class Engine:
    """A model on a mesh, serving `slots` requests together. Nothing on it changes after it is built."""

    def __init__(
        self, model: Decoder, mesh: Mesh, config: EngineConfig, dtype: jnp.dtype, tokenizer: Tokenizer, model_name: str
    ) -> None:
        """`model` may be on the meta device; its kv heads must be a multiple of the mesh's size (see `loading`)."""
        self.model_name = model_name
        self.mesh = mesh
        self.buckets = config.buckets
        platform = mesh.devices.flat[0].platform
        self.layer_loop: LayerLoop = forward.layer_loop_for(platform)
        self.layout = cache_manager.CacheLayout(
            layers=model.config.num_layers,
            slots=config.slots,
            kv_heads=model.config.num_kv_heads,
            length=config.cache_length,
            head_dim=model.config.head_dim,
            dtype=dtype,
        )
        self._model, self._tokenizer = model, tokenizer
        self._backend: kernels.Backend = kernels.backend_for(platform)

        everywhere: Any = NamedSharding(mesh, PartitionSpec())
        cache: Any = NamedSharding(mesh, cache_manager.CACHE_SPEC)
        kv: Any = NamedSharding(mesh, cache_manager.PREFIX_SPEC)
        sampling = SlotSampling(everywhere, everywhere, everywhere, everywhere)
        state = DecodeState(cache, everywhere, everywhere, sampling)
        prefix = Prefix(kv, everywhere, everywhere, sampling)
        self._state_sharding, self._prefix_sharding = state, prefix
        self._prefill = jax.jit(self._prefill_program, out_shardings=prefix)
        self._insert = jax.jit(_insert_program, donate_argnums=1, out_shardings=state)
        self._free = jax.jit(_free_program, donate_argnums=0, out_shardings=state)
        self._generate = jax.jit(
            self._generate_program, donate_argnums=1, out_shardings=(state, StepResult(everywhere))
        )

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
        return self.layout.length

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._model.config.vocab_size

    @property
    def prefix_sharding(self) -> Any:
        """Where a prefix of another engine has to be put for `insert`: shardings, a tree like a Prefix."""
        return self._prefix_sharding

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def load_params(self, checkpoint: weights.Checkpoint) -> Params:
        """Read the weights onto the mesh. Raises RefusedError when the checkpoint does not fit the model."""
        return weights.load(self._model, checkpoint, self.mesh, self.layout.dtype, self.layer_loop)

    def init_decode_state(self) -> DecodeState:
        """All slots empty."""
        return jax.jit(self._empty_state, out_shardings=self._state_sharding)()

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
        self, params: Params, padded_tokens: np.ndarray, true_length: int, *, sampling: SamplingParams = GREEDY
    ) -> tuple[Prefix, jax.Array]:
        """Compute a prompt's keys and values and sample its first token: (prefix, first token, an i32 scalar)."""
        prefix = self._prefill(params, padded_tokens, np.int32(true_length), SlotSampling.of(sampling))
        return prefix, prefix.token

    def insert(self, prefix: Prefix, decode_state: DecodeState, slot: int) -> DecodeState:
        """Put a prefix into a slot; whatever was there is gone. The state is donated, the prefix is not."""
        return self._insert(prefix, decode_state, np.int32(slot))

    def generate(self, params: Params, decode_state: DecodeState) -> tuple[DecodeState, StepResult]:
        """One decode step: every slot that is neither empty nor full gets its next token. The state is donated."""
        return self._generate(params, decode_state)

    def free(self, decode_state: DecodeState, slot: int) -> DecodeState:
        """Empty a slot. The state is donated."""
        return self._free(decode_state, np.int32(slot))

    def warm_up(self, params: Params, decode_state: DecodeState) -> DecodeState:
        """Compile every program by running it once; slots must be empty and are empty again after."""
        for bucket in self.buckets:
            prefix, _ = self.prefill(params, np.zeros(bucket, np.int32), bucket)
            decode_state = self.insert(prefix, decode_state, 0)
        decode_state, result = self.generate(params, decode_state)
        decode_state = self.free(decode_state, 0)
        result.token_B.block_until_ready()
        return decode_state

    def lower_prefill(self, bucket: int) -> jax.stages.Lowered:
        """The prefill of a bucket on abstract arguments: nothing is allocated, the devices may be a mere topology."""
        return self._prefill.lower(*self._prefill_arguments(bucket))

    def lower_insert(self, bucket: int) -> jax.stages.Lowered:
        """The insert of a bucket's prefix, likewise."""
        prefix = jax.eval_shape(self._prefill_program, *self._prefill_arguments(bucket))
        return self._insert.lower(
            _placed(prefix, self._prefix_sharding), self._abstract_state(), self._scalar(jnp.int32)
        )

    def lower_generate(self) -> jax.stages.Lowered:
        """The decode step, likewise."""
        return self._generate.lower(self.abstract_params(), self._abstract_state())

    def abstract_params(self) -> Params:
        """Shapes, types and shardings of the parameters."""
        return weights.abstract(self._model, self.mesh, self.layout.dtype, self.layer_loop)

    def _abstract_state(self) -> DecodeState:
        return _placed(jax.eval_shape(self._empty_state), self._state_sharding)

    def _prefill_arguments(self, bucket: int) -> tuple[Params, Any, Any, SlotSampling]:
        sampling = jax.tree.map(lambda value: self._scalar(value.dtype), SlotSampling.of(GREEDY))
        token_T = jax.ShapeDtypeStruct((bucket,), jnp.int32, sharding=self._scalar(jnp.int32).sharding)
        return self.abstract_params(), token_T, self._scalar(jnp.int32), sampling

    def _scalar(self, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def _empty_state(self) -> DecodeState:
        slots = self.layout.slots
        nothing_B = jnp.zeros((slots,), jnp.int32)
        cache_LBKSC = jnp.zeros(self.layout.shape, self.layout.dtype)
        return DecodeState(cache_LBKSC, nothing_B, nothing_B, SlotSampling.greedy(slots))

    def _prefill_program(self, params: Params, token_T, true_length, sampling: SlotSampling) -> Prefix:
        attend = attend_prompt(mesh=self.mesh, backend=self._backend)
        logits_V, kv_LKTC = forward.prefill(self._model, params, token_T, true_length, attend)
        batch_of_one = jax.tree.map(lambda value: value[None], sampling)
        (token,) = sample(logits_V[None], batch_of_one, true_length[None])
        return Prefix(kv_LKTC, true_length, token, sampling)

    def _generate_program(self, params: Params, state: DecodeState) -> tuple[DecodeState, StepResult]:
        cache_LBKSC, length_B = state.cache_LBKSC, state.length_B
        live_B = (length_B > 0) & (length_B < self.cache_length)
        attend = attend_cache(cache_LBKSC, length_B, mesh=self.mesh, backend=self._backend)
        logits_BV, new_LBKC = forward.decode(self._model, params, state.token_B, length_B, attend)
        # The text so far is `length` cached tokens and this step's own: what is sampled now stands behind both.
        token_B = jnp.where(live_B, sample(logits_BV, state.sampling, length_B + 1), state.token_B)
        # No token is negative, but XLA does not know: so the flush waits for the last layer's attention too. Nothing
        # else orders the two, and to keep that read safe XLA:CPU would copy the whole cache, every step.
        flushed_B = live_B & (token_B >= 0)
        cache_LBKSC = cache_manager.flush(
            cache_LBKSC, new_LBKC, length_B, flushed_B, mesh=self.mesh, backend=self._backend
        )
        state = DecodeState(cache_LBKSC, token_B, length_B + live_B, state.sampling)
        return state, StepResult(jnp.where(live_B, token_B, -1))


def _placed(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with a sharding for each."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def _insert_program(prefix: Prefix, state: DecodeState, slot: jax.Array) -> DecodeState:
    return DecodeState(
        cache_manager.insert(state.cache_LBKSC, prefix.kv_LKTC, slot),
        state.token_B.at[slot].set(prefix.token),
        state.length_B.at[slot].set(prefix.length),
        jax.tree.map(lambda values_B, value: values_B.at[slot].set(value), state.sampling, prefix.sampling),
    )


def _free_program(state: DecodeState, slot: jax.Array) -> DecodeState:
    """Sampling goes back to greedy, so that an empty slot asks nothing of the sampler."""
    return replace(
        state,
        length_B=state.length_B.at[slot].set(0),
        sampling=replace(state.sampling, temperature=state.sampling.temperature.at[slot].set(0.0)),
    )
