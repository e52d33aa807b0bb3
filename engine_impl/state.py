"""What the engine's programs take and give: frozen pytrees of device arrays."""

from dataclasses import dataclass

import jax

from ..cache_manager import KV
from .sampling.slots import SlotSampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """A prompt after prefill, ready for any slot."""

    kv: KV
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

    cache: KV
    """k and v of all layers in pages, [L, P, K, R, C], see cache_manager/layout.py"""
    token_B: jax.Array
    """i32, last sampled token, not yet in the cache"""
    length_B: jax.Array
    """i32, tokens in the cache; 0 = empty slot, the cache length = full slot"""
    sampling: SlotSampling
    """[B] each"""
    count_BV: jax.Array
    """u16, what the cached tokens are, see penalties.py; up to date for slots with a penalty"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepResult:
    """What a decode step tells the host: up to W tokens per slot; W is 1. A prefill's result has one slot."""

    token_BW: jax.Array
    """i32, the slot's tokens in order; -1 from `count` on"""
    count_B: jax.Array
    """i32, how many of them are valid; 0 for a slot that is empty or full"""
    logprob_BW: jax.Array
    """f32, each token's log-probability under the model itself; valid where the slot's sampling asks for it"""
    top_token_BWP: jax.Array
    """i32, the P = MAX_LOGPROBS likeliest tokens, likeliest first; valid where the slot asks for more than 0 of them"""
    top_logprob_BWP: jax.Array
    """f32, their log-probabilities"""
