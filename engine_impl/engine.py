"""The engine: token ids in, token ids out, in JetStream's verbs. Knows nothing of text, requests or the network.

    prefix, first = engine.prefill(params, *engine.pad(prompt_ids), sampling=...)
    state = engine.insert(prefix, state, slot)
    state, result = engine.generate(params, state)      # one token for every live slot
    state = engine.free(state, slot)

    prefix, other = engine.resample(prefix, sampling)   # several answers to one prompt

Given texts are scored by the same steps, with tokens that the caller chooses:

    prefix, logprob = engine.force(prefix, token)
    state, logprob_B = engine.score_step(params, state, token_B)

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
from . import forward
from .attention import Attend, attend_cache, attend_prompt, stored_head_dim
from .config import EngineConfig
from .errors import RefusedError
from .forward import LayerLoop, Params
from .models.decoder import Decoder
from .quantization.swap import quantize
from .sampling.choose import sample
from .sampling.logprobs import logprob_of, logprobs
from .sampling.params import SamplingParams
from .sampling.penalties import count_answer, counts_of_prompt
from .sampling.slots import SlotSampling
from .text.tokenizer import Tokenizer
from .weights import load as weights
from .weights import sharding

GREEDY = SamplingParams()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """A prompt after prefill, ready for any slot."""

    kv: cache_manager.KV
    """[L, K, T, C], as the cache stores it; rows past `length` are padding"""
    length: jax.Array
    """i32 scalar, tokens of the prompt"""
    token: jax.Array
    """i32 scalar, the first token of the answer, not in kv"""
    sampling: SlotSampling
    """scalars"""
    logits_V: jax.Array
    """the model's dtype, what `token` was chosen from"""
    count_V: jax.Array
    """u16, what the prompt has, see penalties.py"""
    prompt_logprob_T: jax.Array
    """f32, log p(token t | tokens before it); 0 at the first token, at padding, and where nobody asked"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All slots between two steps."""

    cache: cache_manager.KV
    """k and v of all layers, [L, B, K, S, C], see cache_manager/layout.py"""
    token_B: jax.Array
    """i32, last sampled token, not yet in the cache"""
    length_B: jax.Array
    """i32, tokens in the cache; 0 = empty slot, S = full slot"""
    sampling: SlotSampling
    """[B] each"""
    count_BV: jax.Array
    """u16, what the cached tokens are, see penalties.py; up to date for slots with a penalty"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepResult:
    """What a decode step tells the host. A prefill's result is that of a batch of one."""

    token_B: jax.Array
    """i32, the step's token; -1 for a slot that is empty or full"""
    logprob_B: jax.Array
    """f32, the token's log-probability under the model itself; valid where the slot's sampling asks for logprobs"""
    top_token_BP: jax.Array
    """i32, the P = MAX_LOGPROBS likeliest tokens, likeliest first; valid where the slot asks for more than 0 of them"""
    top_logprob_BP: jax.Array
    """f32, theirs"""


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
        self._backend: kernels.Backend = kernels.backend_for(platform)
        self.layout = cache_manager.CacheLayout(
            layers=model.config.num_layers,
            slots=slots,
            kv_heads=model.config.num_kv_heads,
            length=cache_length,
            head_dim=stored_head_dim(model.config.head_dim, self._backend),
            dtype=dtype,
            codec=cache_manager.codec_for(config.quantize_kv),
        )
        quantize(model, config, dtype, mesh, self._backend)
        self.model = model
        """The modules, with their linear ones as quantisation left them; they hold no weights."""
        self._tokenizer = tokenizer
        self._attention: dict[str, Any] = {
            "window_of_layer": model.config.window_of_layer,
            "soft_cap": model.config.attn_soft_cap,
            "mesh": mesh,
            "backend": self._backend,
        }

        everywhere: Any = NamedSharding(mesh, PartitionSpec())
        cache, kv = self.layout.shardings(mesh)
        # The vocabulary lies as the logits come: as lm_head's rows, [V, D].
        rows = sharding.parameter_spec(model, "lm_head.weight", (self.vocab_size, 1), mesh)[:1]
        v: Any = NamedSharding(mesh, PartitionSpec(*rows))
        bv: Any = NamedSharding(mesh, PartitionSpec(None, *rows))
        sampling = jax.tree.map(lambda _: everywhere, SlotSampling.of(GREEDY))
        state = DecodeState(cache, everywhere, everywhere, sampling, bv)
        prefix = Prefix(kv, everywhere, everywhere, sampling, v, v, everywhere)
        self._state_sharding, self._prefix_sharding = state, prefix
        self._prefill = jax.jit(self._prefill_program, out_shardings=(prefix, everywhere))
        self._resample = jax.jit(self._resample_program, out_shardings=everywhere)
        self._force = jax.jit(_force_program, out_shardings=everywhere)
        self._insert = jax.jit(_insert_program, donate_argnums=1, out_shardings=state)
        self._free = jax.jit(_free_program, donate_argnums=0, out_shardings=state)
        self._generate = jax.jit(self._generate_program, donate_argnums=1, out_shardings=(state, everywhere))
        self._score_step = jax.jit(self._score_program, donate_argnums=1, out_shardings=(state, everywhere))

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
        """Prompt and answer of one request together (tokens): the cache's rows, at most the model's positions."""
        return min(self.layout.length, self.model.config.context_length)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.model.config.vocab_size

    @property
    def prefix_sharding(self) -> Any:
        """Where a prefix of another engine has to be put for `insert`: shardings, a tree like a Prefix."""
        return self._prefix_sharding

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def load_params(self, checkpoint: weights.Checkpoint) -> Params:
        """Read the weights onto the mesh. Raises RefusedError when the checkpoint does not fit the model."""
        return weights.load(self.model, checkpoint, self.mesh, self.layout.dtype, self.layer_loop)

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
        return self._prefill(
            params, padded_tokens, np.int32(true_length), SlotSampling.of(sampling), np.bool_(prompt_logprobs)
        )

    def resample(self, prefix: Prefix, sampling: SamplingParams) -> tuple[Prefix, StepResult]:
        """Another first token for the same prompt: what prefill would give with these parameters, without its work."""
        token, chosen, result = self._resample(
            prefix.logits_V, prefix.count_V, prefix.length, SlotSampling.of(sampling)
        )
        return replace(prefix, token=token, sampling=chosen), result

    def force(self, prefix: Prefix, token: int) -> tuple[Prefix, jax.Array]:
        """A given first token instead of a chosen one: (prefix, its log-probability, an f32 scalar)."""
        forced, logprob = self._force(prefix.logits_V, np.int32(token))
        return replace(prefix, token=forced), logprob

    def insert(self, prefix: Prefix, decode_state: DecodeState, slot: int) -> DecodeState:
        """Put a prefix into a slot; whatever was there is gone. The state is donated, the prefix is not."""
        return self._insert(prefix, decode_state, np.int32(slot))

    def generate(self, params: Params, decode_state: DecodeState) -> tuple[DecodeState, StepResult]:
        """One decode step: every slot that is neither empty nor full gets its next token. The state is donated."""
        return self._generate(params, decode_state)

    def score_step(
        self, params: Params, decode_state: DecodeState, next_token_B: np.ndarray
    ) -> tuple[DecodeState, jax.Array]:
        """`generate` with the tokens given (i32) instead of chosen: (state, logprob_B f32, each given token's).

        The same pass over the cache, the same flush; sampling parameters play no part. What is told of an empty or
        full slot is without meaning. Compiled when first called; the state is donated.
        """
        return self._score_step(params, decode_state, np.asarray(next_token_B, np.int32))

    def free(self, decode_state: DecodeState, slot: int) -> DecodeState:
        """Empty a slot. The state is donated."""
        return self._free(decode_state, np.int32(slot))

    def warm_up(self, params: Params, decode_state: DecodeState) -> DecodeState:
        """Compile every program of serving by running it once; slots must be empty and are empty again after."""
        for bucket in self.buckets:
            prefix, _ = self.prefill(params, np.zeros(bucket, np.int32), bucket)
            decode_state = self.insert(prefix, decode_state, 0)
        self.resample(prefix, GREEDY)
        decode_state, result = self.generate(params, decode_state)
        decode_state = self.free(decode_state, 0)
        result.token_B.block_until_ready()
        return decode_state

    def lower_prefill(self, bucket: int) -> jax.stages.Lowered:
        """The prefill of a bucket on abstract arguments: nothing is allocated, the devices may be a mere topology."""
        return self._prefill.lower(*self._prefill_arguments(bucket))

    def lower_insert(self, bucket: int) -> jax.stages.Lowered:
        """The insert of a bucket's prefix, likewise."""
        prefix, _ = jax.eval_shape(self._prefill_program, *self._prefill_arguments(bucket))
        return self._insert.lower(
            _placed(prefix, self._prefix_sharding), self._abstract_state(), self._scalar(jnp.int32)
        )

    def lower_generate(self) -> jax.stages.Lowered:
        """The decode step, likewise."""
        return self._generate.lower(self.abstract_params(), self._abstract_state())

    def lower_resample(self) -> jax.stages.Lowered:
        """Another first token, likewise."""
        prefix, _ = jax.eval_shape(self._prefill_program, *self._prefill_arguments(self.buckets[0]))
        prefix = _placed(prefix, self._prefix_sharding)
        return self._resample.lower(prefix.logits_V, prefix.count_V, prefix.length, prefix.sampling)

    def lower_score_step(self) -> jax.stages.Lowered:
        """The decode step with given tokens, likewise."""
        given_B = jax.ShapeDtypeStruct((self.layout.slots,), jnp.int32, sharding=self._scalar(jnp.int32).sharding)
        return self._score_step.lower(self.abstract_params(), self._abstract_state(), given_B)

    def attend(self, decode_state: DecodeState) -> Attend:
        """How the layers of a decode step attend to this state: for whoever times that alone."""
        return attend_cache(decode_state.cache, decode_state.length_B, **self._attention)

    def abstract_params(self) -> Params:
        """Shapes, types and shardings of the parameters."""
        return weights.abstract(self.model, self.mesh, self.layout.dtype, self.layer_loop)

    def _abstract_state(self) -> DecodeState:
        return _placed(jax.eval_shape(self._empty_state), self._state_sharding)

    def _prefill_arguments(self, bucket: int) -> tuple[Params, Any, Any, SlotSampling, Any]:
        sampling = jax.tree.map(lambda value: self._scalar(value.dtype), SlotSampling.of(GREEDY))
        token_T = jax.ShapeDtypeStruct((bucket,), jnp.int32, sharding=self._scalar(jnp.int32).sharding)
        return self.abstract_params(), token_T, self._scalar(jnp.int32), sampling, self._scalar(jnp.bool)

    def _scalar(self, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def _empty_state(self) -> DecodeState:
        slots = self.layout.slots
        nothing_B = jnp.zeros((slots,), jnp.int32)
        count_BV = jnp.zeros((slots, self.vocab_size), jnp.uint16)
        return DecodeState(self.layout.empty(), nothing_B, nothing_B, SlotSampling.greedy(slots), count_BV)

    def _prefill_program(
        self, params: Params, token_T, true_length, sampling: SlotSampling, wants_logprobs
    ) -> tuple[Prefix, StepResult]:
        attend = attend_prompt(
            token_T.shape[0], head_dim=self.layout.head_dim, codec=self.layout.codec, **self._attention
        )
        logits_V, kv, logprob_T = forward.prefill(self.model, params, token_T, true_length, attend, wants_logprobs)
        count_V = counts_of_prompt(token_T, true_length, self.vocab_size)
        token, sampling, result = self._resample_program(logits_V, count_V, true_length, sampling)
        return Prefix(kv, true_length, token, sampling, logits_V, count_V, logprob_T), result

    def _resample_program(
        self, logits_V: jax.Array, count_V: jax.Array, length: jax.Array, sampling: SlotSampling
    ) -> tuple[jax.Array, SlotSampling, StepResult]:
        """A prompt's first token, with its parameters as they go into the prefix."""
        batch_of_one = jax.tree.map(lambda value: value[None], sampling)
        token_B = sample(logits_V[None], count_V[None], batch_of_one, length[None])
        told = logprobs(logits_V[None], token_B, batch_of_one.logprobs, self.mesh)
        return token_B[0], sampling, StepResult(token_B, *told)

    def _generate_program(self, params: Params, state: DecodeState) -> tuple[DecodeState, StepResult]:
        logits_BV, new_LBKC = self._decode(params, state)
        advanced, result = next_tokens(logits_BV, state, self._live(state), self.mesh)
        return self._flushed(state, advanced, new_LBKC), result

    def _score_program(self, params: Params, state: DecodeState, next_token_B) -> tuple[DecodeState, jax.Array]:
        logits_BV, new_LBKC = self._decode(params, state)
        logprob_B = logprob_of(logits_BV, next_token_B)
        # No log-probability is positive, but XLA does not know: so these tokens wait for the logits too, see _flushed.
        token_B = jnp.where(logprob_B > 0, -1, next_token_B)
        advanced = replace(state, token_B=token_B, length_B=state.length_B + self._live(state))
        return self._flushed(state, advanced, new_LBKC), logprob_B

    def _live(self, state: DecodeState) -> jax.Array:
        """bool [B], slots neither empty nor full."""
        return (state.length_B > 0) & (state.length_B < self.cache_length)

    def _decode(self, params: Params, state: DecodeState) -> tuple[jax.Array, jax.Array]:
        """(logits_BV, new_LBKC)"""
        return forward.decode(self.model, params, state.token_B, state.length_B, self.attend(state))

    def _flushed(self, state: DecodeState, advanced: DecodeState, new_LBKC: jax.Array) -> DecodeState:
        """The state after a step, with the step's own rows in the cache."""
        # No token is negative, but XLA does not know: so the flush waits for the last layer's attention too. Nothing
        # else orders the two, and to keep that read safe XLA:CPU would copy the whole cache, every step.
        flushed_B = self._live(state) & (advanced.token_B >= 0)
        cache = cache_manager.flush(
            *(state.cache, new_LBKC, state.length_B, flushed_B),
            codec=self.layout.codec, mesh=self.mesh, backend=self._backend,
        )  # fmt: skip
        return replace(advanced, cache=cache)


def next_tokens(
    logits_BV: jax.Array, state: DecodeState, live_B: jax.Array, mesh: Mesh
) -> tuple[DecodeState, StepResult]:
    """What follows from a step's logits: (the state behind it, but for the cache; what to tell the host)."""
    count_BV = count_answer(state.count_BV, state.token_B, state.sampling)
    # The text so far is `length` cached tokens and this step's own: what is sampled now stands behind both.
    chosen_B = sample(logits_BV, count_BV, state.sampling, state.length_B + 1)
    told = logprobs(logits_BV, chosen_B, state.sampling.logprobs, mesh)
    token_B = jnp.where(live_B, chosen_B, state.token_B)
    advanced = replace(state, token_B=token_B, length_B=state.length_B + live_B, count_BV=count_BV)
    return advanced, StepResult(jnp.where(live_B, token_B, -1), *told)


def _placed(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with a sharding for each."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def _force_program(logits_V: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    return token, logprob_of(logits_V[None], token[None])[0]


def _insert_program(prefix: Prefix, state: DecodeState, slot: jax.Array) -> DecodeState:
    return DecodeState(
        cache_manager.insert(state.cache, prefix.kv, slot),
        state.token_B.at[slot].set(prefix.token),
        state.length_B.at[slot].set(prefix.length),
        set_sampling(state.sampling, prefix.sampling, slot),
        state.count_BV.at[slot].set(prefix.count_V),
    )


def set_sampling(sampling: SlotSampling, one: SlotSampling, slot: jax.Array) -> SlotSampling:
    """All slots' parameters with one slot's replaced."""
    return jax.tree.map(lambda values_B, value: values_B.at[slot].set(value), sampling, one)


def _free_program(state: DecodeState, slot: jax.Array) -> DecodeState:
    """Sampling goes back to greedy, so that an empty slot asks nothing of the sampler."""
    return replace(
        state,
        length_B=state.length_B.at[slot].set(0),
        sampling=set_sampling(state.sampling, SlotSampling.of(GREEDY), slot),
    )
