"""The baseline that everybody has: Hugging Face transformers on the same weights, its forward called in a bare loop.

Eager PyTorch with scaled_dot_product_attention, greedy argmax, none of `generate`'s overhead. Two caches: "static",
allocated once and attended over its whole length; "dynamic", which grows by concatenation and is as long as what it
holds.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ...engine_impl.checkpoints.contract import Checkpoint
from ...engine_impl.errors import RefusedError
from ...engine_impl.models.llama import LlamaConfig
from .steppers import Block


def transformers_model(checkpoint: Checkpoint, dtype: str) -> Any:
    """A LlamaForCausalLM with the checkpoint's weights, on the CPU.

    Raises RefusedError for other families, for quantised checkpoints, and without transformers.
    """
    config = checkpoint.config
    if type(config) is not LlamaConfig:
        family = type(config).__name__.removesuffix("Config")
        raise RefusedError(
            f"{checkpoint.name} is a {family}, and --versus transformers builds Llamas only; use --versus eager"
        )
    if checkpoint.quantization is not None:
        raise RefusedError(
            f"{checkpoint.name} is stored as {checkpoint.quantization.weights}, which transformers is not given here; "
            "take a checkpoint of floats, or --versus eager"
        )
    try:
        import transformers
    except ImportError as error:
        raise RefusedError("--versus transformers needs it: pip install 'slipstream-llm[bench]'") from error
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.model_dim,
                intermediate_size=config.ffn_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.context_length,
                rms_norm_eps=config.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=config.tied_embeddings,
                attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
            )
        )
    # Buffers (rope's frequencies) are computed when they are built, so not on the meta device.
    rope: Any = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rope
    if config.rope_factors is not None:
        rope.inv_freq /= torch.tensor(config.rope_factors)
    rope.attention_scaling = config.rope_scale
    for name, _ in list(model.named_parameters()):
        value = torch.tensor(checkpoint.tensor(name.removeprefix("model."))).to(getattr(torch, dtype))
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.weight = torch.nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    return model.eval()


class TransformersStepper:
    """Sequences of transformers, all of one length."""

    def __init__(self, model: Any, *, cache_length: int, cache: Literal["static", "dynamic"]) -> None:
        self._model, self._cache_length, self._kind = model, cache_length, cache
        self._cache: Any = None
        self._token_B1 = torch.zeros((0, 1), dtype=torch.long)

    @torch.inference_mode()
    def fill(self, prompts: Sequence[list[int]]) -> None:
        from transformers import DynamicCache, StaticCache

        config = self._model.config
        if self._kind == "static":
            self._cache = StaticCache(config=config, max_cache_len=self._cache_length)
        else:
            self._cache = DynamicCache(config=config)
        self._forward(torch.tensor(prompts))

    @torch.inference_mode()
    def set_length(self, length: int) -> None:
        for layer in self._cache.layers:
            if self._kind == "static":
                layer.cumulative_length.fill_(length)
            else:
                layer.keys, layer.values = _of_length(layer.keys, length), _of_length(layer.values, length)

    @torch.inference_mode()
    def block(self, steps: int) -> Block:
        ms, tokens = [], []
        for _ in range(steps):
            start = time.perf_counter()
            self._forward(self._token_B1)
            tokens.append(self._token_B1[:, 0].tolist())
            ms.append((time.perf_counter() - start) * 1000)
        return Block(ms, tokens)

    def _forward(self, token_BT: torch.Tensor) -> None:
        logits = self._model(token_BT, cache=self._cache, use_cache=True, logits_to_keep=1).logits
        self._token_B1 = logits[:, -1].argmax(-1, keepdim=True)


def _of_length(x_BKTH: torch.Tensor, length: int) -> torch.Tensor:
    """Cut or filled up with zeros."""
    B, K, T, H = x_BKTH.shape
    if length <= T:
        return x_BKTH[:, :, :length].clone()
    return torch.cat([x_BKTH, x_BKTH.new_zeros(B, K, length - T, H)], dim=2)
