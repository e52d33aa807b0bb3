"""What most families have in common: grouped-query attention with a rope, a gated feed-forward, two norms a layer.

Knows nothing of caches, sharding or batching: a layer sees R rows, each one token at its own position, and calls the
`attend` that it is given. In decode the rows are the slots, in prefill they are the tokens of one prompt.

R rows; other axes as in cache_manager/layout.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from .decoder import Attend, Decoder, LayerOutput, ModelConfig, Pairs
from .fields import Fields
from .parts import Embedding, Linear, RMSNorm
from .rope import Angles, Factors, Rope, frequencies, rotate
from .rope_scaling import SCALINGS, Beyond, context_length, read_scaling

Of = TypeVar("Of")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """A transformer's shape."""

    model_dim: int
    ffn_dim: int
    rope_theta: float
    rms_norm_eps: float
    """Of all norms, in families with layer norms of those."""
    attention_bias: bool = False
    """Whether all four matrices of attention have biases."""
    rope_factors: Factors | None = None
    """What each of the rope's frequencies is divided by, to reach beyond the trained length; None is no scaling."""
    rope_scale: float = 1.0
    """The rope's cos and sin are multiplied by it."""
    rope_beyond: Beyond | None = None
    """What becomes of the rope in texts that come to more than its trained length."""
    rope_width: int | None = None
    """How many of a head's dimensions turn, the first ones; None is all."""
    without_rope: tuple[bool, ...] = (False,)
    """Which layers do not turn their heads. Layers take turns, as with `windows`."""

    @property
    def angles(self) -> Angles:
        """The rope of all layers, or of those that see all."""
        width = self.rope_width or self.head_dim
        return Angles(frequencies(width, self.rope_theta, self.rope_factors), self.rope_scale, self.rope_beyond)

    @property
    def ropes(self) -> tuple[Angles, ...]:
        """The ropes that there are; `rope_of_layer` picks. A rope that stands still is none."""
        still = Angles((0.0,) * len(self.angles.frequencies))
        return (self.angles, still) if any(self.without_rope) else (self.angles,)

    @property
    def rope_of_layer(self) -> tuple[int, ...]:
        return tuple(int(self.without_rope[i % len(self.without_rope)]) for i in range(self.num_layers))

    def for_length(self, length: int) -> Self:
        return self if self.reach_of(length) else replace(self, rope_beyond=None)

    def reach_of(self, length: int) -> int:
        return 0 if self.rope_beyond is None else self.rope_beyond.reach_of(length)


def both(one: nn.Module, other: nn.Module, joined: nn.Module | None, x_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The answers of two linear modules to one x. `joined`: their one product, where there is one; each of them only
    hands its half on then."""
    if joined is None:
        return one(x_RI), other(x_RI)
    out_GRO = joined(x_RI)
    return one(x_RI, out_GRO[0]), other(x_RI, out_GRO[1])


class Attention(nn.Module):
    """Grouped-query attention; hands q, k, v to `attend`, keeps nothing."""

    def __init__(self, config: TransformerConfig, *, qkv_bias: bool = False, query_scale: float = 1.0) -> None:
        """`query_scale` is for families that do not scale scores by H**-0.5, as `attend` does. A family that
        normalises its heads sets `q_norm` and `k_norm`, one whose softmax has sinks `sinks`."""
        super().__init__()
        self.head_dim, self.query_scale = config.head_dim, query_scale
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv_bias = qkv_bias or config.attention_bias
        self.q_proj = Linear(config.model_dim, q_dim, bias=qkv_bias)
        self.k_proj = Linear(config.model_dim, kv_dim, bias=qkv_bias)
        self.v_proj = Linear(config.model_dim, kv_dim, bias=qkv_bias)
        self.o_proj = Linear(q_dim, config.model_dim, bias=config.attention_bias)
        self.k_and_v: nn.Module | None = None  # as of GatedMLP
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.sinks: nn.Parameter | None = None

    def forward(self, x_RD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        q_RNH = rotate(self.q_norm(self._heads(self.q_proj(x_RD))), rope) * self.query_scale
        k_RO, v_RO = both(self.k_proj, self.v_proj, self.k_and_v, x_RD)
        k_RKH = rotate(self.k_norm(self._heads(k_RO)), rope)
        v_RKH = self._heads(v_RO)
        return self.o_proj(attend(q_RNH, k_RKH, v_RKH, self.sinks).flatten(-2)), k_RKH, v_RKH

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class GatedMLP(nn.Module):
    """Gated feed-forward (Shazeer, arXiv 2002.05202): SwiGLU, or GeGLU with another activation."""

    def __init__(self, config: TransformerConfig, activation: Callable[[Tensor], Tensor] = functional.silu) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(config.model_dim, config.ffn_dim, bias=False)
        self.up_proj = Linear(config.model_dim, config.ffn_dim, bias=False)
        self.down_proj = Linear(config.ffn_dim, config.model_dim, bias=False)
        self.gate_and_up: nn.Module | None = None
        """The product of both, where they are one: see engine_impl/joined.py."""

    def forward(self, x_RD: Tensor) -> Tensor:
        gate_RF, up_RF = both(self.gate_proj, self.up_proj, self.gate_and_up, x_RD)
        return self.down_proj(self.activation(gate_RF) * up_RF)


class Layer(nn.Module):
    """One transformer layer. What it leaves to be added is the feed-forward's answer; the k, v somebody else will
    store."""

    def __init__(
        self,
        config: TransformerConfig,
        self_attn: nn.Module,
        mlp: nn.Module,
        norm: Callable[[int, float], nn.Module] = RMSNorm,
    ) -> None:
        super().__init__()
        self.input_layernorm = norm(config.model_dim, config.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = norm(config.model_dim, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x_RD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> LayerOutput:
        out_RD, k_RKH, v_RKH = self.self_attn(self.input_layernorm(x_RD), rope, attend)
        x_RD = x_RD + out_RD
        return LayerOutput(x_RD, self.mlp(self.post_attention_layernorm(x_RD)), k_RKH, v_RKH)


class ParallelLayer(nn.Module):
    """A layer whose attention and feed-forward read the same norm, and are added up."""

    def __init__(self, input_layernorm: nn.Module, self_attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn, self.mlp = input_layernorm, self_attn, mlp

    def forward(self, x_RD: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> LayerOutput:
        normed_RD = self.input_layernorm(x_RD)
        out_RD, k_RKH, v_RKH = self.self_attn(normed_RD, rope, attend)
        return LayerOutput(x_RD + out_RD, self.mlp(normed_RD), k_RKH, v_RKH)


class Transformer(Decoder):
    """Heads, ffn and vocabulary are shared among the chips. A family says what its layers are."""

    shard_axis: ClassVar = {
        **dict.fromkeys(["embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], 0),
        **dict.fromkeys(["o_proj", "down_proj"], 1),
    }
    turns_neighbours: ClassVar[bool] = False
    """Whether checkpoints have q and k for a rope that turns neighbours (see `Pairs`)."""
    config: TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.model_dim)
        self.rope = Rope(*config.ropes)
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.lm_head = Linear(config.model_dim, config.vocab_size, bias=False)

    def layer(self, config: Any) -> nn.Module:
        """A layer, by default Llama's."""
        return Layer(config, Attention(config), GatedMLP(config))

    def sources(self, name: str) -> tuple[str, ...]:
        if self.turns_neighbours and name.split(".")[-2] in ("q_proj", "k_proj"):
            return (Pairs(name, self.config.head_dim, self.config.rope_width or self.config.head_dim),)
        return (name,)


def read_shape(fields: Fields, *, tied_embeddings: bool = False, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """The fields of `TransformerConfig` but for its rope.

    Args:
        tied_embeddings: the family's, where it is left unsaid.
        eps: what the family calls that of its norms.

    Raises RefusedError for biases of the feed-forward.
    """
    fields.only("mlp_bias", False)
    heads, model_dim = fields["num_attention_heads"], fields["hidden_size"]
    return {
        "num_layers": fields["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": fields.get("head_dim", model_dim // heads),
        "vocab_size": fields["vocab_size"],
        "context_length": context_length(fields),
        "tied_embeddings": fields.get("tie_word_embeddings", tied_embeddings),
        "model_dim": model_dim,
        "ffn_dim": fields["intermediate_size"],
        "rms_norm_eps": fields[eps],
        "attention_bias": fields.get("attention_bias", False),
    }


def read_rope(
    fields: Fields,
    head_dim: int,
    scalings: Sequence[str] = tuple(SCALINGS),
    *,
    layer_type: str | None = None,
    also_called: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The fields of `TransformerConfig` that one rope needs; arguments as of `Fields.rope`.

    Raises RefusedError for a scaling that is not among these, or one whose parameters are not whole.
    """
    rope = fields.rope(scalings, layer_type, also_called)
    width = int(head_dim * rope["partial_rotary_factor"])
    if not 2 <= width <= head_dim or width % 2:
        raise fields.refused(f"turns {width} of a head's {head_dim} dimensions; it has to be an even part of them")
    scaling = read_scaling(fields, rope, width)
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rope_factors": scaling.factors,
        "rope_scale": scaling.scale,
        "rope_beyond": scaling.beyond,
        "rope_width": None if width == head_dim else width,
    }


def windows_of_layers(fields: Fields, layer_types: list[str], window: int | None) -> tuple[int | None, ...]:
    """`ModelConfig.windows` from a type a layer, in as few entries as say it."""
    kinds: dict[str, int | None] = {"sliding_attention": window, "full_attention": None}
    if unknown := set(layer_types) - set(kinds):
        raise fields.refused(f"has layers of type {', '.join(sorted(unknown))}; those there are: {', '.join(kinds)}")
    return shortest_turn(tuple(kinds[kind] for kind in layer_types))


def shortest_turn(of_layers: tuple[Of, ...]) -> tuple[Of, ...]:
    """One value for each layer, in as few entries as say it when layers take turns."""
    for period in range(1, len(of_layers)):
        if all(value == of_layers[i % period] for i, value in enumerate(of_layers)):
            return of_layers[:period]
    return of_layers
