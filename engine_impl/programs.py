"""The device programs: plain functions from arrays to arrays, compiled by `Programs.jitted`."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from .decode_step import DecodeStep
from .sampling.params import GREEDY
from .sampling.slots import SlotSampling
from .speculation.texts import Texts
from .state import DecodeState, Prefix
from .weights.sharding import parameter_spec


@dataclass(frozen=True, eq=False)
class Programs(DecodeStep):
    """All of them.

    A step takes N slots by their numbers; a number that no slot has is nobody's, and nothing is stored for it. All
    programs that store donate the state. Those that touch the cache take the texts' rows of the page table: whose pages
    are whose is the host's knowledge.
    """

    def empty_state(self) -> DecodeState:
        """All slots empty."""
        slots = self.layout.slots
        nothing_B = jnp.zeros((slots,), jnp.int32)
        count_BV = jnp.zeros((slots, self.model.config.vocab_size), jnp.uint16)
        return DecodeState(
            self.empty_cache(), nothing_B, nothing_B, SlotSampling.greedy(slots), count_BV,
            adapter_B=nothing_B if self.has_adapters else None,
            reach_B=nothing_B if self.has_reaches else None,
            texts=None if self.drafting is None else Texts.empty(slots, self.layout.length),
            draft_cache=None if self._small is None else self._small.empty_cache(),
        )  # fmt: skip

    def state_sharding(self) -> DecodeState:
        """A sharding for each array of a state."""
        everywhere, v = self.everywhere, self._at(None, *self._vocabulary)
        return DecodeState(
            self.cache_sharding(), everywhere, everywhere, self._sampling, v,
            adapter_B=everywhere if self.has_adapters else None,
            reach_B=everywhere if self.has_reaches else None,
            texts=None if self.drafting is None else Texts(everywhere, everywhere),
            draft_cache=None if self._small is None else self._small.cache_sharding(),
        )  # fmt: skip

    def prefix_sharding(self) -> Prefix:
        """A sharding for each array of a prefix: where `insert` takes it."""
        everywhere, v = self.everywhere, self._at(None, *self._vocabulary)
        told = everywhere, everywhere, everywhere
        return Prefix(
            self._text_sharding, everywhere, everywhere, v, *told, everywhere, self._sampling, v,
            adapter_N=everywhere if self.has_adapters else None,
            reach_N=everywhere if self.has_reaches else None,
            texts=None if self.drafting is None else Texts(everywhere, everywhere),
            draft_kv=None if self._small is None else self._small._text_sharding,
        )  # fmt: skip

    @property
    def everywhere(self) -> Any:
        """The sharding of what every device holds."""
        return self._at()

    def jitted(self) -> "Jitted":
        """The programs, ready to be called or lowered; each is compiled when it is first called."""
        state, prefix, everywhere = self.state_sharding(), self.prefix_sharding(), self.everywhere
        return Jitted(
            prefill=jax.jit(self.prefill, out_shardings=prefix),
            first_tokens=jax.jit(
                self.first_tokens,
                out_shardings=(prefix.token_N, prefix.sampling, prefix.count_NV, prefix.texts, everywhere),
            ),
            empty_state=jax.jit(self.empty_state, out_shardings=state),
            insert=jax.jit(self.insert, donate_argnums=1, out_shardings=state),
            generate=jax.jit(
                self.generate, donate_argnums=1, static_argnames="width", out_shardings=(state, everywhere)
            ),
            carry=jax.jit(self.carry, donate_argnums=1, out_shardings=(state, everywhere, prefix)),
            score_step=jax.jit(self.score_step, donate_argnums=1, out_shardings=(state, everywhere)),
        )

    @property
    def _vocabulary(self) -> PartitionSpec:
        """V lies as the logits come: as lm_head's rows, [V, D]."""
        return parameter_spec(self.model, "lm_head.weight", (self.model.config.vocab_size, 1), self.mesh)[:1]

    @property
    def _sampling(self) -> SlotSampling:
        return jax.tree.map(lambda _: self.everywhere, SlotSampling.of(GREEDY))

    def _at(self, *axes: Any) -> Any:
        return NamedSharding(self.mesh, PartitionSpec(*axes))


class Jitted(NamedTuple):
    """The methods of `Programs` of the same names, as JAX calls, compiles and lowers them."""

    prefill: jax.stages.Wrapped
    first_tokens: jax.stages.Wrapped
    empty_state: jax.stages.Wrapped
    insert: jax.stages.Wrapped
    generate: jax.stages.Wrapped
    carry: jax.stages.Wrapped
    score_step: jax.stages.Wrapped
