"""Small models that are built in milliseconds, and the embedded one. Import as `from .models import ...`."""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh
from slipstream.engine_impl.assembly import assembled
from slipstream.engine_impl.checkpoints.contract import Codes, Compact, Quantization
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.draft_model import draft_model
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.loading import load_engine
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.models.decoder import ModelConfig
from slipstream.engine_impl.models.llama import Llama, LlamaConfig
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.weights.load import needed_shapes
from slipstream.engine_impl.weights.sharding import make_mesh

TINY = LlamaConfig(
    num_layers=2, num_heads=8, num_kv_heads=4, head_dim=16, model_dim=32, ffn_dim=48, vocab_size=101,
    rope_theta=10000.0, rms_norm_eps=1e-5, tied_embeddings=False, context_length=512,
)  # fmt: skip


@dataclass(frozen=True)
class RandomCheckpoint:
    """Normal weights, seeded by the parameter's name and large enough that greedy tokens vary; norms are near one."""

    config: ModelConfig
    name: str = "random"
    quantization: Quantization | None = None

    def files(self) -> tuple[()]:
        """None."""
        return ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return needed_shapes(registry.build(self.config), self.config.num_kv_heads)

    def tensor(self, name: str) -> np.ndarray:
        shape = self.shapes()[name]
        values = np.random.default_rng(list(name.encode())).normal(size=shape).astype(np.float32)
        return 1 + 0.1 * values if "norm" in name else values * 2 / shape[-1] ** 0.5

    def compact(self) -> dict[str, Compact]:
        """None: float32."""
        return {}

    def codes(self, name: str) -> Codes:
        raise KeyError(name)

    def tokenizer(self) -> Any:
        return None


def tiny_engine(
    config: LlamaConfig = TINY,
    *,
    devices: int = 1,
    slots: int = 4,
    cache_length: int = 128,
    mesh: Mesh | None = None,
    quantize_kv: Literal["none", "int8"] = "none",
    cache_tokens: int | None = None,
    prefill_chunk: int | None = None,
    speculate: Literal["off", "auto"] = "off",
    draft: LlamaConfig | None = None,
    page_rows: int = 128,
) -> tuple[Engine, Any]:
    """A random Llama on virtual CPU devices, float32; with another as its draft model. Pages are the same with and
    without native kernels."""
    mesh = mesh or make_mesh(jax.devices(), config.num_heads, config.num_kv_heads, devices)
    with torch.device("meta"):
        model = Llama(replace(config, num_kv_heads=max(config.num_kv_heads, mesh.size)))
    engine_config = EngineConfig(
        slots=slots,
        cache_length=cache_length,
        cache_tokens=cache_tokens or slots * cache_length,
        prefill_chunk=prefill_chunk,
        quantize_kv=quantize_kv,
        speculate=speculate,
        draft_model=None if draft is None else "tiny",
    )
    tokenizer: Any = None
    small = None if draft is None else draft_model(engine_config, draft, None, mesh, cache_length)
    engine = assembled(
        model, mesh, engine_config, jnp.dtype("float32"), tokenizer, "tiny", draft=small, page_rows=page_rows
    )
    return engine, engine.parameters.load(RandomCheckpoint(config), draft and RandomCheckpoint(draft))


@functools.cache
def embedded_engine(tensor_parallel: int = 1) -> tuple[Engine, Any]:
    """The embedded model with 10 slots, loaded once a test run."""
    return load_engine(EngineConfig(slots=10, cache_length=256, tensor_parallel=tensor_parallel))


def logits_behind(engine: Engine, params: Any, token_ids: list[int]) -> np.ndarray:
    """logits_V of what follows a text, by prefill."""
    return np.array(Session(engine, params).prefilled(0, token_ids).logits_NV)[0]


def greedy(engine: Engine, params: Any, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Prompt i in slot i, all decoded together: `steps` tokens each."""
    session = Session(engine, params)
    answers = [[int(session.start(slot, prompt).token_BW[0, 0])] for slot, prompt in enumerate(prompts)]
    for _ in range(steps - 1):
        for answer, token in zip(answers, np.asarray(session.step().token_BW)[:, 0], strict=False):
            answer.append(int(token))
    return answers
