"""What the engine's programs take and give: frozen pytrees of device arrays."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..cache_manager import KV
from .sampling.slots import SlotSampling
from .speculation.drafts import Drafts
from .speculation.texts import Texts


class PieceBatch(NamedTuple):
    """Padded pieces of texts, i32. On the host until a program is called with them."""

    token_NT: jax.Array
    start_N: jax.Array
    count_N: jax.Array
    next_NT: jax.Array
    """tokens behind those of token_NT where their log-probability is asked for, else -1"""
    asked: jax.Array
    """how many of the likeliest tokens are asked for in their place, at most"""
    page_NJ: jax.Array
    """the texts' rows of the page table"""
    adapter_N: jax.Array | None = None
    """as in DecodeState"""
    reach_N: jax.Array | None = None
    """as in DecodeState"""

    @property
    def position_NT(self) -> jax.Array:
        """i32, each token's place in its text."""
        return self.start_N[:, None] + jnp.arange(self.token_NT.shape[1], dtype=jnp.int32)

    @property
    def is_live_NT(self) -> jax.Array:
        """bool, which tokens are no padding."""
        return jnp.arange(self.token_NT.shape[1]) < self.count_N[:, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """Pieces of N texts after prefill, of T tokens each, padding included."""

    kv: KV
    """[L, K, N * T, C], as the cache stores it, one piece behind another; rows past a piece's `count` are padding"""
    start_N: jax.Array
    """i32, tokens of the text before the piece"""
    count_N: jax.Array
    """i32, tokens of the piece; 0 = there is none"""
    logits_NV: jax.Array
    """the model's dtype, behind each piece's last token"""
    logprob_NT: jax.Array
    """f32, log p(the token behind it | the text up to it) of each token; 0 where nobody asked"""
    top_token_NTP: jax.Array
    """i32, the P = MAX_LOGPROBS likeliest tokens there, likeliest first; 0 where nobody asked"""
    top_logprob_NTP: jax.Array
    """f32, their log-probabilities"""
    token_N: jax.Array
    """i32, the token chosen behind each piece, not in kv; -1 before `first_tokens`"""
    sampling: SlotSampling
    """[N] each, what it was chosen by"""
    count_NV: jax.Array
    """u16, what the texts have, see penalties.py; made for texts with a penalty"""
    adapter_N: jax.Array | None = None
    """i32, as in DecodeState"""
    reach_N: jax.Array | None = None
    """i32, as in DecodeState"""
    texts: Texts | None = None
    """as in DecodeState; empty before `first_tokens`"""
    draft_kv: KV | None = None
    """as kv, of the draft model"""

    def is_ready(self) -> bool:
        """Whether the devices have computed all of it."""
        return all(array.is_ready() for array in jax.tree.leaves(self))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """All slots between two steps."""

    cache: KV
    """k and v of all layers in pages, [L, P, K, R, C], see cache_manager/layout.py"""
    token_B: jax.Array
    """i32, last chosen token, not yet in the cache"""
    length_B: jax.Array
    """i32, tokens in the cache; the cache length = full slot"""
    sampling: SlotSampling
    """[B] each"""
    count_BV: jax.Array
    """u16, what the cached tokens are, see penalties.py; up to date for slots with a penalty"""
    adapter_B: jax.Array | None = None
    """i32, the adapter that changes the model for the slot, 0 is none; None where there are no adapters"""
    reach_B: jax.Array | None = None
    """i32, which angles the slot's text takes, see `ModelConfig.reach_of`; None where all texts take the same"""
    texts: Texts | None = None
    """up to each slot's last chosen token; None where nothing drafts"""
    draft_cache: KV | None = None
    """the draft model's k and v of the same tokens in the same pages; None without one"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The slots of one step, taken out of the state."""

    slot_N: jax.Array
    """i32, which; the number of slots = none"""
    is_live_N: jax.Array
    """bool, it gets a token: it is a slot, neither empty nor full"""
    token_NW: jax.Array
    """i32, what the step computes of each: its last token as in DecodeState, and W - 1 drafts behind it, 0 where there
    are fewer"""
    length_N: jax.Array
    """i32, as in DecodeState; 0 where there is no slot"""
    sampling: SlotSampling
    """[N] each; greedy where no token is chosen, so that it asks nothing of the sampler"""
    adapter_N: jax.Array | None = None
    """i32, as in DecodeState; 0 where no token is chosen"""
    reach_N: jax.Array | None = None
    """i32, as in DecodeState"""
    drafts: Drafts | None = None
    """W of each; None where nothing drafts"""

    @property
    def width(self) -> int:
        """W."""
        return self.token_NW.shape[1]

    @property
    def position_NW(self) -> jax.Array:
        """i32, each token's place in its text."""
        return self.length_N[:, None] + jnp.arange(self.width, dtype=jnp.int32)

    @property
    def is_live_NW(self) -> jax.Array:
        """bool, which tokens are no padding: of live slots the last one and its drafts."""
        drafts_N = self.width if self.drafts is None else self.drafts.count_N
        return self.is_live_N[:, None] & (jnp.arange(self.width) < jnp.reshape(drafts_N + 1, (-1, 1)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepResult:
    """What a step tells the host: up to W tokens of each slot named. A prefill's has a row for each piece, W = 1."""

    token_BW: jax.Array
    """i32, the slot's tokens in order; -1 from `count` on"""
    count_B: jax.Array
    """i32, how many of them are valid; 0 for no slot and for one that is empty or full"""
    drafted_B: jax.Array
    """i32, how many drafts there were, up to W; the first W - 1 took part in the step"""
    agreed_B: jax.Array
    """i32, how many of them, the leading ones, are what the model chose"""
    logprob_BW: jax.Array
    """f32, each token's log-probability under the model itself; valid where the slot's sampling asks for it"""
    top_token_BWP: jax.Array
    """i32, the P = MAX_LOGPROBS likeliest tokens, likeliest first; valid where the slot asks for more than 0 of them"""
    top_logprob_BWP: jax.Array
    """f32, their log-probabilities"""


def of_tokens(values_N: jax.Array | None, tokens: int) -> jax.Array | None:
    """What each text has, for each of its so many tokens, side by side; None stays None."""
    return values_N if values_N is None or tokens == 1 else jnp.repeat(values_N, tokens, axis=0)
