"""The Llama family in plain torch: Llama 2, Llama 3 and what shares their shape (SmolLM2, TinyLlama, ...).

Knows nothing of caches, sharding or batching: a layer sees R rows, each one token at its own position, and calls the
`attend` that it is given. In decode the rows are the slots, in prefill they are the tokens of one prompt.

R rows; other axes as in cache_manager/layout.py.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .decoder import Attend, Decoder, ModelConfig
from .fields import Fields


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A Llama's shape."""

    model_dim: int
    ffn_dim: int
    rope_theta: float
    rms_norm_eps: float
    rope_factors: tuple[float, ...] | None = None
    """What each of the rope's H/2 frequencies is divided by, to reach beyond the trained length; None is no scaling."""


class Linear(nn.Linear):
    """No initial values: they come from a checkpoint, and drawing them would take longer than all the rest."""

    def reset_parameters(self) -> None: ...


class Embedding(nn.Embedding):
    """Likewise."""

    def reset_parameters(self) -> None: ...


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich, arXiv 1910.07467), computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x_RD: Tensor) -> Tensor:
        wide_RD = x_RD.float()
        scale_R1 = torch.rsqrt(wide_RD.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide_RD * scale_R1).to(x_RD.dtype)


class Rope(nn.Module):
    """Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated against each other."""

    def __init__(self, head_dim: int, theta: float, factors: tuple[float, ...] | None) -> None:
        super().__init__()
        factors = factors or (1.0,) * (head_dim // 2)
        self.frequencies = [f / factor for f, factor in zip(frequencies(head_dim, theta), factors, strict=True)]

    def forward(self, position_R: Tensor) -> tuple[Tensor, Tensor]:
        """i32 positions -> (cos_R1H, sin_R1H), float32, to be broadcast over heads."""
        frequency = torch.tensor(self.frequencies, device=position_R.device, dtype=torch.float32)
        angle = position_R.float()[:, None, None] * frequency
        angle_R1H = torch.cat([angle, angle], dim=-1)
        return angle_R1H.cos(), angle_R1H.sin()


def frequencies(head_dim: int, theta: float) -> list[float]:
    """The rope's H/2 frequencies, fastest first (radians a token)."""
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def llama3_rope_factors(
    head_dim: int, theta: float, *, factor: float, low: float = 1.0, high: float = 4.0, trained_length: int = 8192
) -> tuple[float, ...]:
    """How Llama 3.1 and later stretch their rope (`rope_type: llama3`); defaults as in the published configs.

    A frequency that turns fewer than `low` times over the trained length (tokens) is divided by `factor`, one that
    turns more than `high` times is kept, those between are blended.
    """

    def divisor(frequency: float) -> float:
        turns = trained_length * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        return 1 / (kept + (1 - kept) / factor)

    return tuple(divisor(frequency) for frequency in frequencies(head_dim, theta))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn heads [R, heads, H] by their row's angle; computed in float32."""
    cos_R1H, sin_R1H = rope
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos_R1H + turned * sin_R1H).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; hands q, k, v to `attend`, keeps nothing."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.model_dim, config.num_heads * config.head_dim, bias=False)
        self.k_proj = Linear(config.model_dim, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = Linear(config.model_dim, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.model_dim, bias=False)

    def forward(self, x_RD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        q_RNH = rotate(self.q_proj(x_RD).unflatten(-1, (-1, self.head_dim)), rope)
        k_RKH = rotate(self.k_proj(x_RD).unflatten(-1, (-1, self.head_dim)), rope)
        v_RKH = self.v_proj(x_RD).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(attend(q_RNH, k_RKH, v_RKH).flatten(-2)), k_RKH, v_RKH


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.model_dim, config.ffn_dim, bias=False)
        self.up_proj = Linear(config.model_dim, config.ffn_dim, bias=False)
        self.down_proj = Linear(config.ffn_dim, config.model_dim, bias=False)

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x_RD)) * self.up_proj(x_RD))


class LlamaLayer(nn.Module):
    """One transformer layer: the rows' new residual stream and the k, v that somebody else will store."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_RD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        out_RD, k_RKH, v_RKH = self.self_attn(self.input_layernorm(x_RD), rope, attend)
        x_RD = x_RD + out_RD
        return x_RD + self.mlp(self.post_attention_layernorm(x_RD)), k_RKH, v_RKH


class Llama(Decoder):
    """Heads, ffn and vocabulary are shared among the chips."""

    config_type: ClassVar = LlamaConfig
    shard_axis: ClassVar = {
        **dict.fromkeys(["embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], 0),
        **dict.fromkeys(["o_proj", "down_proj"], 1),
    }

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.model_dim)
        self.rope = Rope(config.head_dim, config.rope_theta, config.rope_factors)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.lm_head = Linear(config.model_dim, config.vocab_size, bias=False)

    @classmethod
    def read_config(cls, fields: Fields) -> LlamaConfig:
        if fields.get("attention_bias") or fields.get("mlp_bias"):
            raise fields.refused("has biases, which the llama family here has not")
        fields.only("hidden_act", "silu")
        rope = fields.rope(("default", "llama3"))
        heads, model_dim = fields["num_attention_heads"], fields["hidden_size"]
        head_dim = fields.get("head_dim", model_dim // heads)
        return LlamaConfig(
            num_layers=fields["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads", heads),
            head_dim=head_dim,
            vocab_size=fields["vocab_size"],
            context_length=fields["max_position_embeddings"],
            tied_embeddings=fields.get("tie_word_embeddings", False),
            model_dim=model_dim,
            ffn_dim=fields["intermediate_size"],
            rope_theta=rope["rope_theta"],
            rms_norm_eps=fields["rms_norm_eps"],
            rope_factors=rope_factors(rope, head_dim),
        )


def rope_factors(rope: dict[str, Any], head_dim: int) -> tuple[float, ...] | None:
    """What `rope_type` default or llama3 divides the frequencies by."""
    if rope["rope_type"] == "default":
        return None
    return llama3_rope_factors(
        head_dim,
        rope["rope_theta"],
        factor=rope["factor"],
        low=rope["low_freq_factor"],
        high=rope["high_freq_factor"],
        trained_length=rope["original_max_position_embeddings"],
    )
