"""The layer loop, the same for prefill, decode and both together: embed, walk the layers, normalise, project onto the
vocabulary.

Whether the layers run under one `lax.scan` over stacked weights or unrolled over a weight array per layer is decided
here, once, per platform (`layer_loop_for`).
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from torch import nn

from ..cache_manager import KV
from . import bridge
from .adapters import sites
from .attention import Attend
from .models.decoder import Decoder
from .sampling.logprobs import Logprobs, prompt_logprobs
from .state import PieceBatch, Rows, of_tokens

LayerLoop = Literal["scan", "unrolled"]

Params = dict[str, Any]
"""`embed_tokens`, `after_embedding`, `norm`, `lm_head`: {parameter name: array}; `layers`: the same with all layers
stacked ("scan"), or a tuple with one such dict a layer ("unrolled"). `adapters`, where there may be some: likewise, see
adapters/stacks.py. `stacks`: of unrolled layers what is stacked nevertheless, see `stacked_parts`. `alike`: of stacked
layers the vectors that are not in `layers` but in one array with others, {their names: array}, see weights/alike.py.

A scan hands each layer its slice of the stacks. Modules that read the stack themselves (`reads_stack`) get all of it
and, as `layer`, the layer's number; where theirs is not stacked, that is 0."""


def layer_loop_for(platform: str, *models: Decoder) -> LayerLoop:
    """How the layers of an engine's models are walked on a platform, in all models alike. Layers that differ in more
    than their weights are never stacked.

    TPU: a scan. What the compiler says of 96 slots of 2048 tokens (libtpu 0.0.42; `slipstream plan` shows the scan's
    today), compile seconds, code and temp MiB, static cycles in millions:

        generate       llama-3.1-8b, v5e:2x4     llama-3.1-70b, v5p:2x2x2
        scan             5.0    6.1   14     8.4        6.0    7.9    41   31.1
        unrolled        13.6   59     77     4.2       57.7  155      67   27.3
        prefill of 2048 tokens
        scan            13.6    6.8    2.1  53.0       10.5   11     175  210
        unrolled        27.3  136     56    45.0      119    500     164  203

    The unrolled step's cycles leave its weights' transfers out (they are asynchronous; 3.4 M at full bandwidth for the
    8B), the scan's count them, some 1.6 times too high. So decoding has little to gain, and prefill shares the weights'
    form: there unrolling costs 0.14 to 0.5 GB of code for each padded length. Unrolling over stacked weights is the
    worst of both: 44 s, 7.9 M cycles.

    Elsewhere unrolled, over a separate array a layer: XLA:CPU copies every slice of a stack, at every step, and so does
    XLA's GPU compiler, all seven matrices of a layer (docs/gpu-evidence.md).
    """
    return "scan" if platform == "tpu" and all(len(set(one.module_of_layer)) == 1 for one in models) else "unrolled"


class Decoded(NamedTuple):
    """What a step's rows give, W of each slot side by side."""

    logits_RV: jax.Array
    new: Any
    """new_LRKC, the rows to be stored"""


class Prefilled(NamedTuple):
    """What pieces of texts give."""

    logits_NV: jax.Array
    """behind each piece's last token"""
    kv: KV
    """all their rows, [L, K, N T, C]"""
    told: Logprobs
    """of the tokens behind theirs, [N T] each; 0 where nobody asks"""


def decode(model: Decoder, params: Params, rows: Rows, attend: Attend) -> Decoded:
    """A step's tokens, from position `length` on."""
    tokens = _rows(rows)
    x_RD, new_LRKC = _layers(model, params, tokens, attend)
    return Decoded(logits(model, params, x_RD, tokens.is_live_R), new_LRKC)


def prefill(model: Decoder, params: Params, pieces: PieceBatch, attend: Attend, mesh: Mesh) -> Prefilled:
    """Padded pieces of texts, at the positions from `start` on."""
    x_RD, kv = _layers(model, params, _pieces(pieces), attend)
    logits_NV = logits(model, params, _last(x_RD, pieces), pieces.count_N > 0)
    return Prefilled(logits_NV, kv, _next_logprobs(model, params, x_RD, pieces, mesh))


def carry(
    model: Decoder, params: Params, rows: Rows, pieces: PieceBatch, attend: Attend, mesh: Mesh
) -> tuple[Decoded, Prefilled]:
    """`decode` and `prefill` in one pass over the weights; `attend` is that of both."""
    M = rows.token_NW.size
    both = jax.tree.map(lambda *values: jnp.concatenate(values), _rows(rows), _pieces(pieces))
    x_RD, (new_LMKC, kv) = _layers(model, params, both, attend)
    x_MD, x_RD = x_RD[:M], x_RD[M:]
    is_live_R = jnp.concatenate([both.is_live_R[:M], pieces.count_N > 0])
    logits_RV = logits(model, params, jnp.concatenate([x_MD, _last(x_RD, pieces)]), is_live_R)
    told = _next_logprobs(model, params, x_RD, pieces, mesh)
    return Decoded(logits_RV[:M], new_LMKC), Prefilled(logits_RV[M:], kv, told)


class _Tokens(NamedTuple):
    """What is computed together, i32."""

    token_R: jax.Array
    position_R: jax.Array
    is_live_R: jax.Array
    """bool; the others are padding"""
    adapter_R: jax.Array | None
    """as in DecodeState, and so below"""
    reach_R: jax.Array | None


def _rows(rows: Rows) -> _Tokens:
    """A slot's side by side."""
    each = of_tokens(rows.adapter_N, rows.width), of_tokens(rows.reach_N, rows.width)
    return _Tokens(rows.token_NW.reshape(-1), rows.position_NW.reshape(-1), rows.is_live_NW.reshape(-1), *each)


def _pieces(pieces: PieceBatch) -> _Tokens:
    """One piece behind another."""
    tokens = pieces.token_NT.shape[1]
    each = of_tokens(pieces.adapter_N, tokens), of_tokens(pieces.reach_N, tokens)
    token_R, position_R = pieces.token_NT.reshape(-1), pieces.position_NT.reshape(-1)
    return _Tokens(token_R, position_R, pieces.is_live_NT.reshape(-1), *each)


def _last(x_RD: jax.Array, pieces: PieceBatch) -> jax.Array:
    """The pieces' last tokens, of their rows."""
    N, T = pieces.token_NT.shape
    last_N = jnp.arange(N, dtype=jnp.int32) * T + jnp.maximum(pieces.count_N - 1, 0)
    return jax.lax.dynamic_slice_in_dim(x_RD, last_N[0], 1) if N == 1 else x_RD[last_N]


def _next_logprobs(model: Decoder, params: Params, x_RD: jax.Array, pieces: PieceBatch, mesh: Mesh) -> Logprobs:
    """[N T] each; no logits are computed where nobody asks."""
    next_R = pieces.next_NT.reshape(-1)
    return prompt_logprobs(x_RD, next_R, pieces.asked, functools.partial(logits, model, params), mesh)


def _layers(model: Decoder, params: Params, tokens: _Tokens, attend: Attend) -> tuple[jax.Array, Any]:
    """The residual stream behind the last layer, and each layer's k, v in the form to be stored.

    Where there are adapters the loop is there twice: rows of which none has one do not pay for those that there are.
    """
    token_R, position_R, is_live_R, adapter_R, reach_R = tokens
    x_RD = bridge.run(model.embed_tokens, params["embed_tokens"], token_R)
    x_RD = bridge.run(model.after_embedding, params["after_embedding"], x_RD, position_R)
    ropes = _ropes(model, position_R, reach_R)
    layers, alike, stacks = params["layers"], params["alike"], params["stacks"]
    walk = functools.partial(_walk, model, alike=alike, x_RD=x_RD, is_live_R=is_live_R, ropes=ropes, attend=attend)
    if adapter_R is None:
        return walk(layers, of_all=stacks)
    adapters = params["adapters"]
    both = layers | adapters if isinstance(layers, dict) else tuple(map(dict.__or__, layers, adapters))
    return jax.lax.cond(
        (adapter_R > 0).any(),
        lambda: walk(both, of_all=stacks | sites.of_rows(model.layers[0], adapter_R)),
        lambda: walk(layers, of_all=stacks | sites.of_nobody(model.layers[0])),
    )


def _ropes(model: Decoder, position_R: jax.Array, reach_R: jax.Array | None) -> Any:
    """What `model.rope` gives, computed once. XLA:CPU would fuse sines and cosines into every layer, 1.5 ms of a step
    of 32 slots of SmolLM2-135M; what a conditional gives it leaves alone. No position is negative, but XLA does not
    know.
    """

    def made() -> Any:
        return bridge.run(model.rope, {}, position_R, reach_R)

    def never() -> Any:
        return jax.tree.map(lambda turn: jnp.zeros(turn.shape, turn.dtype), jax.eval_shape(made))

    return jax.lax.platform_dependent(cpu=lambda: jax.lax.cond((position_R >= 0).any(), made, never), default=made)


def _walk(
    model: Decoder,
    layers: Any,
    alike: dict[tuple[str, ...], jax.Array],
    x_RD: jax.Array,
    is_live_R: jax.Array,
    ropes: Any,
    attend: Attend,
    of_all: dict[str, jax.Array],
) -> tuple[jax.Array, Any]:
    """The layer loop itself. `alike`: as in `Params`. `of_all`: arrays that all layers take.

    Layers differ in their weights, in how far back they see and in their rope. Under a scan all three are selected by
    the layer's number; unrolled, a layer is traced once for each way of seeing, and for each of `modules_of_layers`.

    A layer's last sum is left to the next one's turn, where XLA:TPU makes one operation of it and of the norm that
    reads it (docs/tpu-evidence.md).
    """
    kind_of_layer, rope_of_layer = attend.kind_of_layer, model.config.rope_of_layer

    def layer(stream, weights, index, kind, rope, module=0):
        def attend_layer(q_RNH, k_RKH, v_RKH, sink_N=None):
            tensors = (q_RNH, k_RKH, v_RKH) if sink_N is None else (q_RNH, k_RKH, v_RKH, sink_N)
            return bridge.call_kernel(functools.partial(attend.call, index, kind), *tensors)

        x_RD, out_RD = stream
        x_RD, out_RD, k_RKH, v_RKH = bridge.run(model.layers[module], weights, x_RD + out_RD, rope, attend_layer)
        return (x_RD, out_RD), attend.stored(k_RKH, v_RKH)

    stream = (x_RD, jnp.zeros_like(x_RD))

    if isinstance(layers, dict):
        read_whole = names_read_whole(model.layers[0])
        whole = {name: stack for name, stack in layers.items() if name in read_whole}
        sliced = {name: stack for name, stack in layers.items() if name not in whole}
        ropes_stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ropes) if len(ropes) > 1 else None

        def step(stream, of_layer):
            weights, index, kind, which = of_layer
            weights = {**weights, **vectors_of(alike, index), **whole, **of_all, **numbered(model.layers[0], index)}
            weights |= told_padding(model.layers[0], is_live_R)
            rope = ropes[0] if ropes_stacked is None else jax.tree.map(lambda leaves: leaves[which], ropes_stacked)
            return layer(stream, weights, index, kind, rope)

        numbers = (range(len(model.layers)), kind_of_layer, rope_of_layer)
        layers = (sliced, *(jnp.asarray(list(n), jnp.int32) for n in numbers))
        (x_RD, out_RD), kv = jax.lax.scan(step, stream, layers)
        return x_RD + out_RD, kv

    layer = jax.jit(layer, static_argnums=(3, 5))  # XLA inlines the calls, so a layer's index is a constant again
    per_layer = []
    modules, numbers = modules_of_layers(model), numbers_of_unrolled(model)
    for index, (weights, module) in enumerate(zip(layers, modules, strict=True)):
        weights = {**weights, **of_all, **numbers[index], **told_padding(model.layers[module], is_live_R)}
        stream, kv = layer(stream, weights, jnp.int32(index), kind_of_layer[index], ropes[rope_of_layer[index]], module)
        per_layer.append(kv)
    x_RD, out_RD = stream
    return x_RD + out_RD, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *per_layer)


def vectors_of(alike: dict[tuple[str, ...], jax.Array], index: jax.Array | int) -> dict[str, jax.Array]:
    """Those of one layer, by name. Each is one slice: were its array taken first, XLA:TPU would copy that in every
    layer."""

    def one(stacks_GLD: jax.Array, which: int) -> jax.Array:
        start, size = (which, index, 0), (1, 1, stacks_GLD.shape[-1])
        return jax.lax.dynamic_slice(stacks_GLD, start, size, allow_negative_indices=False)[0, 0]

    return {name: one(stacks_GLD, i) for names, stacks_GLD in alike.items() for i, name in enumerate(names)}


def modules_of_layers(model: Decoder) -> list[int]:
    """For each layer the first whose module computes it: another one's where it computes something else, or where its
    weights are stored in other types and shapes."""
    first: dict[Any, int] = {}
    arrays = (tuple((name, of.shape, of.dtype) for name, of in layer.named_parameters()) for layer in model.layers)
    return [first.setdefault(kind, i) for i, kind in enumerate(zip(model.module_of_layer, arrays, strict=True))]


def stacked_parts(model: Decoder) -> tuple[str, ...]:
    """The modules of unrolled layers whose weights are stacked, by their paths within a layer. A program takes a few
    arrays then instead of hundreds, each of which costs a step's start 3 to 5 us."""
    if len(set(modules_of_layers(model))) > 1:
        return ()
    parts = model.layers[0].named_modules()
    return tuple(path for path, part in parts if getattr(part, "lies_in_stack", False))


def logits(model: Decoder, params: Params, x_RD: jax.Array, is_live_R: jax.Array) -> jax.Array:
    """logits_RV; of rows that are not live (bool) they mean nothing, and are finite."""
    head = {**params["lm_head"], **numbered(model.lm_head, jnp.int32(0)), **told_padding(model.lm_head, is_live_R)}
    logits_RV = bridge.run(model.lm_head, head, bridge.run(model.norm, params["norm"], x_RD))
    return bridge.run(model.after_logits, {}, logits_RV)


def names_read_whole(module: nn.Module) -> set[str]:
    """The arrays that their modules read from the stack."""
    return {f"{prefix}{name}" for prefix, part in _prefixes(module, "reads_stack").items() for name in part.stored}


def numbered(module: nn.Module, layer: jax.Array) -> dict[str, jax.Array]:
    """The number that these modules take beside their weights."""
    return {f"{prefix}layer": layer for prefix in _prefixes(module, "reads_stack")}


def told_padding(module: nn.Module, is_live_R: jax.Array) -> dict[str, jax.Array]:
    """What these modules take, likewise, to leave out rows that are padding."""
    return {f"{prefix}is_live": is_live_R for prefix in _prefixes(module, "skips_padding")}


def numbers_of_unrolled(model: Decoder) -> list[dict[str, jax.Array]]:
    """`numbered` of each unrolled layer."""
    in_stack = stacked_parts(model)
    return [
        numbered(model.layers[module], jnp.int32(0)) | {f"{path}.layer": jnp.int32(index) for path in in_stack}
        for index, module in enumerate(modules_of_layers(model))
    ]


def _prefixes(module: nn.Module, trait: Literal["reads_stack", "skips_padding"]) -> dict[str, Any]:
    """The modules of a trait, see `EncodedModule`, by how the names of their arrays begin."""
    parts = module.named_modules()
    return {f"{path}." if path else "": part for path, part in parts if getattr(part, trait, False)}
