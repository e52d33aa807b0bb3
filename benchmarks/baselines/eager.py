"""The baseline to beat: the eager cache, where every layer inserts its new k and v before it attends.

Written as it would be without our idea, and as well as we can: in place, by one XLA scatter a layer, under shard_map so
that no chip talks to another. All else is ours: model, weights, bridge, prefill, attention op, sampling, verbs. So what
differs between the two engines' times is the idea alone.

Two forms of the cache, since neither is faster everywhere: "stacked", one array over all layers, carried through the
layer loop; "per_layer", an array for each.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ...cache_manager import KV, Plain, insert, rows
from ...engine_impl import bridge, forward
from ...engine_impl.assembly import twin
from ...engine_impl.engine import Engine
from ...engine_impl.errors import RefusedError
from ...engine_impl.forward import Decoded, Params
from ...engine_impl.models.decoder import Decoder
from ...engine_impl.programs import Programs
from ...engine_impl.state import PieceBatch, Prefix, Rows
from ...kernels import Backend, attention_steps, ragged_attention
from ...kernels.backend import AXIS

CacheForm = Literal["stacked", "per_layer"]

Scatter = Literal["indexed", "sliced"]
"""How a layer's rows are written: every leading index given, which the TPU compiler does in place; or heads as a slice,
the form one writes first, around which it copies the cache when a chip has several kv heads."""


def eager_twin(engine: Engine, form: CacheForm, scatter: Scatter = "indexed") -> Engine:
    """`engine` with an eager decode step: on its mesh, with its sizes and its verbs.

    Takes the engine's own params; except "per_layer" on a TPU, whose layers are unrolled: load them anew.

    Raises RefusedError for a model whose layers see differently far or cap their scores, or with padded heads, and
    for a quantised cache.
    """
    shape = engine.model.config
    plain = (*shape.windows, shape.attn_soft_cap, engine.layout.head_dim) == (None, None, shape.head_dim)
    if not plain or any(shape.rope_of_layer):
        raise RefusedError(f"the eager baseline has no windows or soft caps as {engine.model_name} needs them")
    if engine.programs.drafting is not None:
        raise RefusedError("the eager baseline stores one token a step; leave --speculate out")
    if engine.layout.codec != Plain():
        raise RefusedError(f"the eager baseline stores rows as they are, not by {engine.layout.codec=}")
    programs = EagerPrograms(
        engine.model, engine.mesh, engine.layout, engine.programs.backend, engine.programs.has_adapters, form, scatter
    )
    return twin(engine, programs, "unrolled" if form == "per_layer" else engine.parameters.layer_loop)


@dataclass(frozen=True, eq=False)
class EagerPrograms(Programs):
    """`Programs` whose decode step stores rows layer by layer, while it goes. It carries no pieces along.

    Its state's cache.rows are a cache_LPKRC ("stacked") or a tuple with one cache_1PKRC per layer ("per_layer").
    """

    form: CacheForm
    scatter: Scatter

    def empty_cache(self) -> KV:
        if self.form == "stacked":
            return super().empty_cache()
        layers, *one_layer = self.layout.shape
        return _kv(tuple(jnp.zeros((1, *one_layer), self.layout.dtype) for _ in range(layers)))

    def cache_sharding(self) -> KV:
        stacked = super().cache_sharding()
        return stacked if self.form == "stacked" else _kv((stacked.rows,) * self.layout.layers)

    def prefill(self, params: Params, cache: KV, pieces: PieceBatch, draft_cache: KV | None = None) -> Prefix:
        """As ours; with a cache per layer of first pieces alone, which read nothing of it."""
        if self.form == "per_layer":
            cache = replace(self.layout, pages=1).empty()
        return super().prefill(params, cache, pieces, draft_cache)

    def decode(self, params: Params, cache: KV, rows: Rows, page_NJ: jax.Array) -> Decoded:
        layers = EagerLayers(self.model, rows.length_N, page_NJ, rows.is_live_N, self.mesh, self.backend, self.scatter)
        logits_NV, new = layers.decode(params, rows.token_NW[:, 0], cache.rows, rows.reach_N)
        return Decoded(logits_NV, KV(new))

    def store(self, cache: KV, new: KV, length_N: jax.Array, count_N: jax.Array, page_NJ: jax.Array) -> KV:
        return new  # the cache as the last layer left it

    def store_texts(self, cache: KV, kv: KV, page_NJ: jax.Array, start_N: jax.Array, count_N: jax.Array) -> KV:
        if self.form == "stacked":
            return super().store_texts(cache, kv, page_NJ, start_N, count_N)

        def store_layer(layer: int, rows: jax.Array) -> jax.Array:
            return insert(KV(rows), KV(kv.rows[layer : layer + 1]), page_NJ, start_N, count_N).rows

        return _kv(tuple(store_layer(layer, rows) for layer, rows in enumerate(cache.rows)))


def _kv(of_layers: Any) -> KV:
    """A cache whose rows are a tuple."""
    return KV(of_layers)


class EagerLayers:
    """The eager counterpart of `forward.decode`: the layer loop with the cache passed from layer to layer."""

    def __init__(
        self,
        model: Decoder,
        length_B: jax.Array,
        page_BJ: jax.Array,
        live_B: jax.Array,
        mesh: Mesh,
        backend: Backend,
        scatter: Scatter,
    ) -> None:
        """Dead and full slots are not written: their row is outside their page."""
        self._model, self._length_B, self._page_BJ, self._live_B = model, length_B, page_BJ, live_B
        self._mesh = mesh
        self._backend: Backend = backend
        self._scatter: Scatter = scatter

    def decode(
        self, params: Params, token_B: jax.Array, cache: Any, reach_B: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """One token a slot: (logits_BV, the cache in the form it came, with the new rows)."""
        x_BD = bridge.run(self._model.embed_tokens, params["embed_tokens"], token_B)
        x_BD = bridge.run(self._model.after_embedding, params["after_embedding"], x_BD, self._length_B)
        out_BD = jnp.zeros_like(x_BD)
        (rope,) = bridge.run(self._model.rope, {}, self._length_B, reach_B)
        one_cache = cache[0] if isinstance(cache, tuple) else cache
        steps = attention_steps(one_cache, self._length_B, self._page_BJ, mesh=self._mesh, backend=self._backend)

        @functools.partial(jax.jit, static_argnames="module")  # traced once; XLA inlines the calls
        def layer(*args, module=0):
            return self._layer(steps, self._model.layers[module], *args)

        layers, one = params["layers"], self._model.layers[0]
        if isinstance(layers, dict):
            index_L = jnp.arange(len(self._model.layers), dtype=jnp.int32)
            read_whole = forward.names_read_whole(one)
            whole = {name: stack for name, stack in layers.items() if name in read_whole}
            sliced = {name: stack for name, stack in layers.items() if name not in whole}

            def step(carry, of_layer):
                weights, index = of_layer
                weights = {**weights, **forward.vectors_of(params["alike"], index), **whole}
                weights |= forward.numbered(one, index) | forward.told_padding(one, self._live_B)
                return layer(*carry, rope, weights, index), None

            (x_BD, out_BD, cache), _ = jax.lax.scan(step, (x_BD, out_BD, cache), (sliced, index_L))
            return forward.logits(self._model, params, x_BD + out_BD, self._live_B), cache
        modules = forward.modules_of_layers(self._model)
        layers = [
            {**weights, **params["stacks"], **numbers, **forward.told_padding(self._model.layers[module], self._live_B)}
            for weights, numbers, module in zip(layers, forward.numbers_of_unrolled(self._model), modules, strict=True)
        ]
        if isinstance(cache, tuple):
            per_layer = []
            for weights, cache_1PKRC, module in zip(layers, cache, modules, strict=True):
                x_BD, out_BD, cache_1PKRC = layer(x_BD, out_BD, cache_1PKRC, rope, weights, jnp.int32(0), module=module)
                per_layer.append(cache_1PKRC)
            cache = tuple(per_layer)
        else:
            for index, (weights, module) in enumerate(zip(layers, modules, strict=True)):
                x_BD, out_BD, cache = layer(x_BD, out_BD, cache, rope, weights, jnp.int32(index), module=module)
        return forward.logits(self._model, params, x_BD + out_BD, self._live_B), cache

    def _layer(
        self, steps, module, x_BD, out_BD, cache_LPKRC, rope, weights, index
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One layer: its new rows go into the cache first, and attention reads the cache that holds them. The stream is
        in two parts, as ours."""

        def attend(q_BNH, k_BKH, v_BKH):
            nonlocal cache_LPKRC
            new_BKC = rows(k_BKH, v_BKH)
            cache_LPKRC = self._insert(cache_LPKRC, new_BKC, index)
            # The op takes the step's own row apart, so of the updated cache it reads the rows before it: the same
            # arithmetic as ours, hence equal tokens, and one row less to read.
            args = (q_BNH[:, None], new_BKC[:, None], cache_LPKRC, index, self._length_B, self._page_BJ, steps)
            return ragged_attention(*args, mesh=self._mesh, backend=self._backend)[:, 0]

        x_BD, out_BD, _, _ = bridge.run(
            module, weights, x_BD + out_BD, rope, lambda q, k, v, _: bridge.call_kernel(attend, q, k, v)
        )
        return x_BD, out_BD, cache_LPKRC

    def _insert(self, cache_LPKRC: jax.Array, new_BKC: jax.Array, layer: jax.Array) -> jax.Array:
        """The cache with every live slot's new row in one layer, in place when XLA sees that nobody needs the old."""
        R = cache_LPKRC.shape[3]
        block_B1 = jnp.minimum(self._length_B // R, self._page_BJ.shape[1] - 1)[:, None]
        page_B = jnp.take_along_axis(self._page_BJ, block_B1, axis=1)[:, 0]
        row_B = jnp.where(self._live_B, self._length_B % R, R)
        heads = P(None, None, AXIS)
        scatter = functools.partial(scatter_rows, scatter=self._scatter)
        sharded = jax.shard_map(
            scatter, mesh=self._mesh, in_specs=(heads, P(None, AXIS), P(), P(), P()), out_specs=heads
        )
        return sharded(cache_LPKRC, new_BKC, layer, page_B, row_B)


def scatter_rows(cache_LPKRC, new_BKC, layer, page_B, row_B, scatter: Scatter = "indexed") -> jax.Array:
    """One layer's rows at each slot's page and row, by one XLA scatter; a row outside [0, R) writes nothing."""
    if scatter == "sliced":
        cells = cache_LPKRC.at[layer, page_B, :, row_B]
    else:
        cells = cache_LPKRC.at[layer, page_B[:, None], jnp.arange(new_BKC.shape[1])[None], row_B[:, None]]
    return cells.set(new_BKC, mode="drop", unique_indices=True)
