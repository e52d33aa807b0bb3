"""Where a step's drafts come from: the slots' own texts, and a draft model where there is one.

A draft model is a small model of the same tokens. Its k and v lie in a cache of its own, in the same pages as the
model's: whoever has a page has both. It computes what the model computes, prompts and last tokens, and so has a row
wherever the model has one. It draws by the slot's own parameters and key: as the noise is the same, so is the token,
mostly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ..cache_manager import KV
from .forward import Decoded, Params
from .sampling.choose import sample
from .sampling.mask import Mask
from .sampling.penalties import counts_behind
from .speculation.drafts import Drafts
from .speculation.look_up import look_up
from .speculation.texts import LONGEST, Texts
from .state import Rows

Propose = Callable[[Texts, Rows, int], Drafts]
"""(the texts of a step's slots, the slots, W) -> up to W drafts for each"""


def of_text(texts: Texts, rows: Rows, width: int) -> Drafts:
    """What followed the text's last tokens where they stood before."""
    return look_up(texts, rows.length_N, width)


def of_long_repeats(texts: Texts, rows: Rows, width: int) -> Drafts:
    """Likewise, of LONGEST tokens alone: what a draft model says is better than what followed two."""
    return look_up(texts, rows.length_N, width, shortest=LONGEST)


def forced_first(drafts: Drafts, mask: Mask) -> Drafts:
    """With the tokens that must come instead, where a slot has a mask: what it says behind any other is not known."""
    count_N = jnp.where(mask.is_asked_B, 0, drafts.count_N)
    if mask.forced_BF is None:
        return drafts._replace(count_N=count_N)
    forced_NW = jnp.pad(mask.forced_BF, ((0, 0), (0, 1)))
    token_NW = jnp.where(mask.is_asked_B[:, None], forced_NW, drafts.token_NW)
    return Drafts(token_NW, count_N + (mask.forced_BF >= 0).sum(axis=1))


class SmallModel(Protocol):
    """The programs of a draft model; see `Programs`."""

    def decode(self, params: Params, cache: KV, rows: Rows, page_NJ: jax.Array) -> Decoded: ...

    def store(self, cache: KV, new: Any, length_N: jax.Array, count_N: jax.Array, page_NJ: jax.Array) -> KV: ...


class Slots(NamedTuple):
    """A step's slots as the draft model sees them."""

    rows: Rows
    """of width 1"""
    page_NJ: jax.Array
    count_NV: Callable[[], jax.Array]
    """u16, what their cached tokens are; of use when one asks for a penalty"""
    cache_length: int
    """tokens of a full slot"""


def drafted(
    model: SmallModel, params: Params, cache: KV, slots: Slots, found: Drafts, vocab_size: int
) -> tuple[Drafts, KV]:
    """W drafts for each slot: those found already, and behind them, or without them, the draft model's; and its cache
    with the rows of each slot's last token and of the drafts but the last. Rows of drafts that are rejected are written
    again, when the text gets there.

    One step of the draft model for each of W.
    """
    W = found.token_NW.shape[1]
    rows, nobody = slots.rows, Mask.nothing(slots.rows.slot_N.shape[0], vocab_size)

    def sub_step(carry: tuple[KV, jax.Array, jax.Array], w: jax.Array) -> tuple[Any, None]:
        cache, token_N, draft_NW = carry
        length_N = rows.length_N + w
        one = Rows(rows.slot_N, rows.is_live_N, token_N[:, None], length_N, rows.sampling, reach_N=rows.reach_N)
        logits_NV, new = model.decode(params, cache, one, slots.page_NJ)
        chosen_N = sample(
            _of_vocabulary(logits_NV, vocab_size),
            lambda: counts_behind(slots.count_NV(), jnp.concatenate([rows.token_NW, draft_NW], axis=1))[-1],
            rows.sampling, length_N + 1, nobody,
        )  # fmt: skip
        draft_N = jnp.where(w < found.count_N, found.token_NW[:, w], chosen_N)
        # As in `DecodeStep.step`: the rows wait for what was read.
        is_stored_N = rows.is_live_N & (length_N < slots.cache_length) & (chosen_N >= 0)
        cache = model.store(cache, new, length_N, is_stored_N.astype(jnp.int32), slots.page_NJ)
        return (cache, draft_N, draft_NW.at[:, w].set(draft_N)), None

    begun = cache, rows.token_NW[:, 0], jnp.full_like(found.token_NW, -1)
    if W == 1:
        (cache, _, draft_NW), _ = sub_step(begun, jnp.int32(0))
    else:
        (cache, _, draft_NW), _ = jax.lax.scan(sub_step, begun, jnp.arange(W, dtype=jnp.int32))
    return Drafts(draft_NW, jnp.where(rows.is_live_N, W, 0)), cache


def _of_vocabulary(logits_NV: jax.Array, vocab_size: int) -> jax.Array:
    """Some models of a family pad their vocabularies to another size; ids beyond the tokenizer's are never chosen."""
    missing = vocab_size - logits_NV.shape[1]
    if missing > 0:
        return jnp.pad(logits_NV, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    return logits_NV[:, :vocab_size]
