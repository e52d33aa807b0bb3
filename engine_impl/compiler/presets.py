"""Shapes of well-known models, for planning and benchmarks without their weights.

Source of each: the `config.json` that its authors publish on the Hugging Face hub under the id given.
"""

import math
from typing import Any

from ..errors import RefusedError
from ..models.cohere import CohereConfig
from ..models.cohere2 import Cohere2Config
from ..models.decoder import ModelConfig
from ..models.gemma import GemmaConfig
from ..models.gemma2 import Gemma2Config
from ..models.gemma3 import Gemma3Config
from ..models.glm4 import Glm4Config
from ..models.gpt_oss import GptOssConfig
from ..models.granite import GraniteConfig
from ..models.llama import LlamaConfig
from ..models.mistral import MistralConfig
from ..models.mixtral import MixtralConfig
from ..models.olmo2 import Olmo2Config
from ..models.olmo3 import Olmo3Config
from ..models.phi3 import Phi3Config
from ..models.qwen2 import Qwen2Config
from ..models.qwen3 import Qwen3Config
from ..models.qwen3_moe import Qwen3MoEConfig
from ..models.rope_scaling import llama3_rope_factors, yarn_factors
from ..models.smollm3 import SmolLM3Config
from ..models.stablelm import StableLMConfig


def _shape(layers: int, heads: int, kv_heads: int, model_dim: int, ffn_dim: int, **rest: Any) -> dict[str, Any]:
    defaults = {"head_dim": model_dim // heads, "rms_norm_eps": 1e-5, "tied_embeddings": False}
    sizes = {
        "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "model_dim": model_dim, "ffn_dim": ffn_dim,
    }  # fmt: skip
    return sizes | defaults | rest


_LLAMA_2 = {"vocab_size": 32000, "context_length": 4096, "rope_theta": 10000.0}
_LLAMA_3 = {"vocab_size": 128256, "context_length": 131072, "rope_theta": 500000.0}
_LLAMA_3_1 = {**_LLAMA_3, "rope_factors": llama3_rope_factors(128, 500000.0, factor=8.0)}
_LLAMA_3_2_1B = {**_LLAMA_3, "rope_factors": llama3_rope_factors(64, 500000.0, factor=32.0), "tied_embeddings": True}
_LLAMA_3_2_3B = {**_LLAMA_3, "rope_factors": llama3_rope_factors(128, 500000.0, factor=32.0), "tied_embeddings": True}
_QWEN_2_5 = {"context_length": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
_QWEN_3 = {
    "head_dim": 128, "vocab_size": 151936, "context_length": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
}  # fmt: skip
_GEMMA = {"head_dim": 256, "rms_norm_eps": 1e-6, "tied_embeddings": True, "rope_theta": 10000.0}
_GEMMA_2 = {
    **_GEMMA, "vocab_size": 256000, "context_length": 8192, "windows": (4096, None), "attn_soft_cap": 50.0,
    "logits_soft_cap": 30.0, "query_pre_attn_scalar": 256,
}  # fmt: skip
_GEMMA_3 = {
    **_GEMMA, "vocab_size": 262208, "context_length": 131072, "windows": (*(1024,) * 5, None), "logits_soft_cap": None,
    "query_pre_attn_scalar": 256, "rope_theta": 1000000.0, "local_rope_theta": 10000.0, "rope_factors": (8.0,) * 128,
}  # fmt: skip

_GPT_OSS = {
    "head_dim": 64, "vocab_size": 201088, "context_length": 131072, "rope_theta": 150000.0, "attention_bias": True,
    "rope_factors": yarn_factors(64, 150000.0, factor=32.0, trained_length=4096, truncate=False),
    "rope_scale": 0.1 * math.log(32) + 1, "windows": (128, None), "experts_per_token": 4,
}  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    "llama-2-7b": LlamaConfig(**_shape(32, 32, 32, 4096, 11008, **_LLAMA_2)),  # meta-llama/Llama-2-7b-hf
    "llama-2-13b": LlamaConfig(**_shape(40, 40, 40, 5120, 13824, **_LLAMA_2)),  # meta-llama/Llama-2-13b-hf
    "llama-2-70b": LlamaConfig(**_shape(80, 64, 8, 8192, 28672, **_LLAMA_2)),  # meta-llama/Llama-2-70b-hf
    "llama-3.1-8b": LlamaConfig(**_shape(32, 32, 8, 4096, 14336, **_LLAMA_3_1)),  # meta-llama/Llama-3.1-8B
    "llama-3.1-70b": LlamaConfig(**_shape(80, 64, 8, 8192, 28672, **_LLAMA_3_1)),  # meta-llama/Llama-3.1-70B
    "llama-3.2-1b": LlamaConfig(**_shape(16, 32, 8, 2048, 8192, **_LLAMA_3_2_1B)),  # meta-llama/Llama-3.2-1B
    "llama-3.2-3b": LlamaConfig(**_shape(28, 24, 8, 3072, 8192, **_LLAMA_3_2_3B)),  # meta-llama/Llama-3.2-3B
    "smollm2-135m": LlamaConfig(
        **_shape(
            30, 9, 3, 576, 1536, vocab_size=49152, context_length=8192, rope_theta=100000.0, tied_embeddings=True
        )
    ),  # HuggingFaceTB/SmolLM2-135M-Instruct, the embedded model
    "mistral-7b-v0.1": MistralConfig(
        **_shape(32, 32, 8, 4096, 14336, vocab_size=32000, context_length=32768, rope_theta=10000.0, windows=(4096,))
    ),  # mistralai/Mistral-7B-v0.1
    "mistral-7b": MistralConfig(
        **_shape(32, 32, 8, 4096, 14336, vocab_size=32768, context_length=32768, rope_theta=1000000.0)
    ),  # mistralai/Mistral-7B-Instruct-v0.3
    "qwen2.5-0.5b": Qwen2Config(
        **_shape(24, 14, 2, 896, 4864, vocab_size=151936, **_QWEN_2_5, tied_embeddings=True)
    ),  # Qwen/Qwen2.5-0.5B-Instruct
    "qwen2.5-7b": Qwen2Config(
        **_shape(28, 28, 4, 3584, 18944, vocab_size=152064, **_QWEN_2_5)
    ),  # Qwen/Qwen2.5-7B-Instruct
    "qwen2.5-32b": Qwen2Config(
        **_shape(64, 40, 8, 5120, 27648, vocab_size=152064, **_QWEN_2_5)
    ),  # Qwen/Qwen2.5-32B-Instruct
    "qwen3-0.6b": Qwen3Config(**_shape(28, 16, 8, 1024, 3072, **_QWEN_3, tied_embeddings=True)),  # Qwen/Qwen3-0.6B
    "qwen3-8b": Qwen3Config(**_shape(36, 32, 8, 4096, 12288, **_QWEN_3)),  # Qwen/Qwen3-8B
    "qwen3-32b": Qwen3Config(**_shape(64, 64, 8, 5120, 25600, **_QWEN_3)),  # Qwen/Qwen3-32B
    "gemma-7b": GemmaConfig(
        **_shape(28, 16, 16, 3072, 24576, vocab_size=256000, context_length=8192, **_GEMMA)
    ),  # google/gemma-7b
    "gemma-2-2b": Gemma2Config(**_shape(26, 8, 4, 2304, 9216, **_GEMMA_2)),  # google/gemma-2-2b
    "gemma-2-9b": Gemma2Config(**_shape(42, 16, 8, 3584, 14336, **_GEMMA_2)),  # google/gemma-2-9b
    "gemma-3-1b": Gemma3Config(
        **_shape(
            26, 4, 1, 1152, 6912,
            **_GEMMA_3
            | {"vocab_size": 262144, "context_length": 32768, "windows": (*(512,) * 5, None), "rope_factors": None},
        )
    ),  # google/gemma-3-1b-it
    "gemma-3-12b": Gemma3Config(**_shape(48, 16, 8, 3840, 15360, **_GEMMA_3)),  # google/gemma-3-12b-it, its text model
    "mixtral-8x7b": MixtralConfig(
        **_shape(
            32, 32, 8, 4096, 14336, vocab_size=32000, context_length=32768, rope_theta=1000000.0, num_experts=8,
            experts_per_token=2,
        )
    ),  # mistralai/Mixtral-8x7B-Instruct-v0.1
    "phi-3-mini": Phi3Config(
        **_shape(
            32, 32, 32, 3072, 8192, vocab_size=32064, context_length=4096, rope_theta=10000.0, windows=(2047,),
            stored_kv_heads=32,
        )
    ),  # microsoft/Phi-3-mini-4k-instruct
    "phi-4": Phi3Config(
        **_shape(
            40, 40, 10, 5120, 17920, vocab_size=100352, context_length=16384, rope_theta=250000.0, stored_kv_heads=10
        )
    ),  # microsoft/phi-4
    "qwen3-30b-a3b": Qwen3MoEConfig(
        **_shape(48, 32, 4, 2048, 768, **_QWEN_3, num_experts=128, experts_per_token=8)
    ),  # Qwen/Qwen3-30B-A3B
    "gpt-oss-20b": GptOssConfig(**_shape(24, 64, 8, 2880, 2880, **_GPT_OSS, num_experts=32)),  # openai/gpt-oss-20b
    "gpt-oss-120b": GptOssConfig(**_shape(36, 64, 8, 2880, 2880, **_GPT_OSS, num_experts=128)),  # openai/gpt-oss-120b
    "smollm3-3b": SmolLM3Config(
        **_shape(
            36, 16, 4, 2048, 11008, vocab_size=128256, context_length=65536, rope_theta=5000000.0, rms_norm_eps=1e-6,
            tied_embeddings=True, without_rope=(False, False, False, True),
        )
    ),  # HuggingFaceTB/SmolLM3-3B
    "olmo-2-7b": Olmo2Config(
        **_shape(
            32, 32, 32, 4096, 11008, vocab_size=100352, context_length=4096, rope_theta=500000.0, rms_norm_eps=1e-6
        )
    ),  # allenai/OLMo-2-1124-7B
    "olmo-3-7b": Olmo3Config(
        **_shape(
            32, 32, 32, 4096, 11008, vocab_size=100278, context_length=65536, rope_theta=500000.0, rms_norm_eps=1e-6,
            windows=(4096, 4096, 4096, None), local_rope_theta=500000.0, rope_scale=1.2079441541679836,
            rope_factors=yarn_factors(128, 500000.0, factor=8.0, trained_length=8192),
        )
    ),  # allenai/Olmo-3-1025-7B
    "granite-3.3-8b": GraniteConfig(
        **_shape(
            40, 32, 8, 4096, 12800, vocab_size=49159, context_length=131072, rope_theta=10000000.0,
            tied_embeddings=True, embedding_multiplier=12.0, attention_multiplier=0.0078125, residual_multiplier=0.22,
            logits_scaling=16.0,
        )
    ),  # ibm-granite/granite-3.3-8b-instruct
    "glm-4-9b": Glm4Config(
        **_shape(
            40, 32, 2, 4096, 13696, vocab_size=151552, context_length=32768, rope_theta=10000.0, rope_width=64,
            qkv_bias=True,
        )
    ),  # zai-org/GLM-4-9B-0414
    "command-r": CohereConfig(
        **_shape(
            40, 64, 64, 8192, 22528, vocab_size=256000, context_length=8192, rope_theta=8000000.0,
            tied_embeddings=True, logit_scale=0.0625,
        )
    ),  # CohereLabs/c4ai-command-r-v01
    "command-r7b": Cohere2Config(
        **_shape(
            32, 32, 8, 4096, 14336, vocab_size=256000, context_length=132096, rope_theta=50000.0, tied_embeddings=True,
            windows=(4096, 4096, 4096, None), without_rope=(False, False, False, True), logit_scale=0.25,
        )
    ),  # CohereLabs/c4ai-command-r7b-12-2024
    "stablelm-2-12b": StableLMConfig(
        **_shape(
            40, 32, 8, 5120, 13824, vocab_size=100352, context_length=4096, rope_theta=10000.0, rope_width=40,
            qkv_bias=False, head_norms=True, parallel=True, stored_kv_heads=8,
        )
    ),  # stabilityai/stablelm-2-12b
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """Raises RefusedError for an unknown name, listing those there are."""
    if name not in PRESETS:
        raise RefusedError(f"model preset {name!r} is not there; those there are: {', '.join(PRESETS)}")
    return PRESETS[name]
