"""The engine's programs on abstract arguments: nothing is allocated, and the devices may be a mere topology."""

from typing import Any

import jax
import jax.numpy as jnp

from ..engine import Engine
from ..sampling.mask import Mask
from ..state import DecodeState, PieceBatch, Prefix


def lower_prefill(engine: Engine, pieces: int, tokens: int) -> jax.stages.Lowered:
    """The prefill of so many pieces, each padded to `tokens`."""
    return engine.jitted.prefill.lower(*_prefill_arguments(engine, pieces, tokens))


def lower_first_tokens(engine: Engine, pieces: int) -> jax.stages.Lowered:
    """The tokens behind so many pieces."""
    prefix = abstract_prefix(engine, pieces, engine.shapes.prefills[0][1])
    is_complete_N = _array(engine, (pieces,), jnp.bool)
    return engine.jitted.first_tokens.lower(
        prefix.logits_NV, prefix.start_N, prefix.count_N, is_complete_N, prefix.sampling, prefix.count_NV,
        _mask(engine, pieces), prefix.texts,
    )  # fmt: skip


def lower_insert(engine: Engine, pieces: int, tokens: int) -> jax.stages.Lowered:
    """The insert of what such a prefill gives."""
    prefix = abstract_prefix(engine, pieces, tokens)
    return engine.jitted.insert.lower(prefix, abstract_state(engine), *_texts(engine, pieces))


def lower_generate(engine: Engine, slots: int | None = None, width: int = 1) -> jax.stages.Lowered:
    """The decode step of so many slots, of so many tokens each; None: of all."""
    mask = _mask(engine, slots or engine.sizes.slots, width)
    return engine.jitted.generate.lower(*_step_arguments(engine, slots), mask, width=width)


def lower_carry(engine: Engine, slots: int, tokens: int) -> jax.stages.Lowered:
    """The decode step of so many slots that carries a piece along, padded to `tokens`."""
    pieces, mask = _pieces(engine, 1, tokens), _mask(engine, slots)
    return engine.jitted.carry.lower(*_step_arguments(engine, slots), pieces, mask)


def lower_score_step(engine: Engine, slots: int | None = None) -> jax.stages.Lowered:
    """The decode step with given tokens."""
    given_N = _array(engine, (slots or engine.sizes.slots,), jnp.int32)
    return engine.jitted.score_step.lower(*_step_arguments(engine, slots), given_N)


def abstract_state(engine: Engine) -> DecodeState:
    """Those of a state."""
    return _placed(jax.eval_shape(engine.programs.empty_state), engine.programs.state_sharding())


def abstract_prefix(engine: Engine, pieces: int, tokens: int) -> Prefix:
    """Those of a prefix of so many pieces, each padded to `tokens`."""
    prefix = jax.eval_shape(engine.programs.prefill, *_prefill_arguments(engine, pieces, tokens))
    return _placed(prefix, engine.programs.prefix_sharding())


def _step_arguments(engine: Engine, slots: int | None) -> tuple[Any, ...]:
    slots = slots or engine.sizes.slots
    return engine.parameters.abstract(), abstract_state(engine), *_texts(engine, slots)


def _prefill_arguments(engine: Engine, pieces: int, tokens: int) -> tuple[Any, ...]:
    caches = [layout.abstract(engine.mesh) for layout in engine.programs.cache_layouts]
    return engine.parameters.abstract(), caches[0], _pieces(engine, pieces, tokens), *caches[1:]


def _pieces(engine: Engine, pieces: int, tokens: int) -> PieceBatch:
    token_NT: Any = _array(engine, (pieces, tokens), jnp.int32)
    start_N: Any = _array(engine, (pieces,), jnp.int32)
    asked: Any = _array(engine, (), jnp.int32)
    _, page_NJ = _texts(engine, pieces)
    adapter_N = start_N if engine.programs.has_adapters else None
    reach_N = start_N if engine.programs.has_reaches else None
    return PieceBatch(token_NT, start_N, start_N, token_NT, asked, page_NJ, adapter_N, reach_N)


def _texts(engine: Engine, count: int) -> tuple[Any, Any]:
    """(slot_N, page_NJ) of so many texts."""
    return _array(engine, (count,), jnp.int32), _array(engine, (count, engine.sizes.pages_per_slot), jnp.int32)


def _mask(engine: Engine, rows: int, width: int = 1) -> Mask:
    shapes = Mask.nothing(rows, engine.sizes.vocab_size, width)
    return jax.tree.map(lambda values: _array(engine, values.shape, values.dtype), shapes)


def _array(engine: Engine, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """One that every device holds."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=engine.programs.everywhere)


def _placed(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with a sharding for each."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)
