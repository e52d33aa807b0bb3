"""The engine's programs on abstract arguments: nothing is allocated, and the devices may be a mere topology."""

from typing import Any

import jax
import jax.numpy as jnp

from ..engine import Engine
from ..forward import Params
from ..programs import GREEDY
from ..sampling.slots import SlotSampling
from ..state import DecodeState, Prefix
from ..weights import load


def lower_prefill(engine: Engine, bucket: int) -> jax.stages.Lowered:
    """The prefill of prompts padded to `bucket` tokens."""
    return engine.jitted.prefill.lower(*_prefill_arguments(engine, bucket))


def lower_resample(engine: Engine) -> jax.stages.Lowered:
    """Another first token."""
    prefix = abstract_prefix(engine, engine.buckets[0])
    return engine.jitted.resample.lower(prefix.logits_V, prefix.count_V, prefix.length, prefix.sampling)


def lower_insert(engine: Engine, bucket: int) -> jax.stages.Lowered:
    """The insert of a bucket's prefix."""
    slot, page_J = _array(engine, (), jnp.int32), _array(engine, engine.page_BJ.shape[1:], jnp.int32)
    return engine.jitted.insert.lower(abstract_prefix(engine, bucket), abstract_state(engine), slot, page_J)


def lower_generate(engine: Engine) -> jax.stages.Lowered:
    """The decode step."""
    return engine.jitted.generate.lower(*_step_arguments(engine))


def lower_score_step(engine: Engine) -> jax.stages.Lowered:
    """The decode step with given tokens."""
    given_B = _array(engine, (engine.max_concurrent_decodes,), jnp.int32)
    return engine.jitted.score_step.lower(*_step_arguments(engine), given_B)


def abstract_params(engine: Engine) -> Params:
    """Shapes, types and shardings of the parameters."""
    return load.abstract_params(engine.model, engine.mesh, engine.layout.dtype, engine.layer_loop)


def abstract_state(engine: Engine) -> DecodeState:
    """Those of a state."""
    return _placed(jax.eval_shape(engine.programs.empty_state), engine.programs.state_sharding())


def abstract_prefix(engine: Engine, bucket: int) -> Prefix:
    """Those of a bucket's prefix."""
    prefix, _ = jax.eval_shape(engine.programs.prefill, *_prefill_arguments(engine, bucket))
    return _placed(prefix, engine.programs.prefix_sharding())


def _step_arguments(engine: Engine) -> tuple[Params, DecodeState, jax.ShapeDtypeStruct]:
    return abstract_params(engine), abstract_state(engine), _array(engine, engine.page_BJ.shape, jnp.int32)


def _prefill_arguments(engine: Engine, bucket: int) -> tuple[Params, Any, Any, SlotSampling, Any]:
    sampling = jax.tree.map(lambda value: _array(engine, value.shape, value.dtype), SlotSampling.of(GREEDY))
    token_T, length = _array(engine, (bucket,), jnp.int32), _array(engine, (), jnp.int32)
    return abstract_params(engine), token_T, length, sampling, _array(engine, (), jnp.bool)


def _array(engine: Engine, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """One that every device holds."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=engine.programs.everywhere)


def _placed(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with a sharding for each."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)
