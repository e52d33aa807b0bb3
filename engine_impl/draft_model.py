"""A draft model: which models can be one, and how its cache lies beside the model's."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from jax.sharding import Mesh

from ..cache_manager import CacheLayout
from ..kernels import Backend
from .attention import stored_head_dim
from .checkpoints.contract import Compact, Quantization
from .config import EngineConfig
from .errors import RefusedError
from .models import registry
from .models.decoder import Decoder, ModelConfig
from .quantization.swap import NOTHING_COMPACT, resolved
from .weights.sharding import tensor_parallel_sizes

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class DraftModel:
    """What an engine needs of it."""

    model: Decoder
    """may be on the meta device; kv heads as the mesh has them"""
    config: EngineConfig
    """how its weights are stored"""
    compact: Mapping[str, Compact]
    """see `Checkpoint.compact`"""


def draft_model(
    config: EngineConfig,
    shape: ModelConfig,
    stored: Quantization | None,
    mesh: Mesh,
    length: int,
    compact: Mapping[str, Compact] = NOTHING_COMPACT,
) -> DraftModel:
    """The model of a checkpoint's shape, for texts of up to `length` tokens; `stored` and `compact` are how the
    checkpoint keeps its weights, which are quantised as the config says for the model.

    Raises RefusedError for one whose heads the mesh does not divide.
    """
    if mesh.size not in tensor_parallel_sizes(shape.num_heads, shape.num_kv_heads, mesh.size):
        sizes = tensor_parallel_sizes(shape.num_heads, shape.num_kv_heads, mesh.size)
        raise RefusedError(
            f"draft_model={config.draft_model!r} has {shape.num_heads} query heads and {shape.num_kv_heads} kv heads, "
            f"which {mesh.size} devices do not share; use --tensor-parallel {' or '.join(map(str, sizes))}"
        )
    if length > shape.context_length:
        log.warning(
            "the draft model was trained for %d tokens and requests have up to %d: then its drafts are worth little",
            shape.context_length,
            length,
        )
        shape = replace(shape, context_length=length)
    shape = replace(shape, num_kv_heads=max(shape.num_kv_heads, mesh.size)).for_length(length)
    model = registry.build(shape)
    return DraftModel(model, resolved(config, stored, model, mesh), compact)


def beside(layout: CacheLayout, shape: ModelConfig, backend: Backend) -> CacheLayout:
    """The layout of a draft model's cache: the same pages of as many rows."""
    return replace(
        layout,
        layers=shape.num_layers,
        kv_heads=shape.num_kv_heads,
        head_dim=stored_head_dim(shape.head_dim, backend),
    )


class Vocabulary(Protocol):
    """A tokenizer, as far as two are compared."""

    vocab_size: int

    def token(self, token_id: int) -> str: ...


def check_same_tokens(tokenizer: Vocabulary, other: Vocabulary, draft_model: str) -> None:
    """Raises RefusedError for a draft model whose token ids mean something else than the model's."""
    size = max(tokenizer.vocab_size, other.vocab_size)
    differing = next((i for i in range(size) if tokenizer.token(i) != other.token(i)), None)
    if differing is not None:
        ours, theirs = tokenizer.token(differing), other.token(differing)
        raise RefusedError(
            f"draft_model={draft_model!r} has another tokenizer: token {differing} is {theirs!r} there and {ours!r} in "
            "the model; give a model of the same family, with the same tokenizer"
        )
