"""The family of all models that transformers computes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from ...errors import RefusedError
from ..decoder import Decoder, ModelConfig, Transposed
from ..parts import Embedding, Linear
from ..transformer import shortest_turn
from . import outside
from .cut import BeforeLayers, BehindHead, BehindLayers, Frame, OuterLayer, Places
from .facts import Facts
from .probe import probed


@dataclass(frozen=True, kw_only=True)
class HFConfig(ModelConfig):
    """A `config.json`, and what was found of the model that it describes."""

    fields: Mapping[str, Any] = field(hash=False)
    facts: Facts = field(hash=False, compare=False)

    @property
    def rope_of_layer(self) -> tuple[int, ...]:
        return self.facts.rope_of_layer


# Names of linear modules whose outputs the chips share, and of those whose inputs they do.
COLUMNS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv", "c_attn", "query", "key", "value",
    "gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w1", "w3",
)  # fmt: skip
ROWS = ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2")


class HFDecoder(Decoder):
    """Linear modules are shared among the chips by their names, where these are known; all else is replicated."""

    config_type: ClassVar = HFConfig
    config: HFConfig
    shard_axis: ClassVar = {
        **dict.fromkeys(("embed_tokens", "lm_head", *COLUMNS), 0),
        **dict.fromkeys(ROWS, 1),
    }
    of_kv_heads: ClassVar = ()
    prefixes: ClassVar = ("model.", "transformer.", "gpt_neox.")

    def __init__(self, config: HFConfig) -> None:
        super().__init__(config)
        facts = config.facts
        model, self._transposed = outside.built(config.fields, "config.json")
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        layers = list(model.get_submodule(facts.layers))
        self._names = {
            "embed_tokens.weight": _name_of(model, embedding.weight),
            **{f"lm_head.{name}": _name_of(model, parameter) for name, parameter in head.named_parameters()},
        }
        frame = Frame(model, facts.layers, facts.returns_tuple)
        self.embed_tokens = Embedding(*embedding.weight.shape)
        self.after_embedding = BeforeLayers(frame, facts.before)
        self.rope = Places(frame, dict(facts.leaves_of_rope))
        self.layers = nn.ModuleList(
            OuterLayer(layer, call, config.num_kv_heads) for layer, call in zip(layers, facts.calls, strict=True)
        )
        self.norm = BehindLayers(frame, facts.behind)
        self.lm_head = head
        self.after_logits = BehindHead(frame)

    @property
    def module_of_layer(self) -> tuple[int, ...]:
        return self.config.facts.module_of_layer

    @classmethod
    def own_name(cls, config: HFConfig, name: str) -> str:
        """As the module of transformers calls it, but for what stands before `layers`."""
        return config.facts.names(name)

    def ignores(self, name: str) -> bool:
        return self.config.facts.names.ignores(name)

    def sources(self, name: str) -> tuple[str, ...]:
        section, _, rest = name.partition(".")
        if section != "layers":
            return (self._names.get(name) or rest.replace("/", "."),)
        return (Transposed(name) if f"{self.config.facts.layers}.{rest}" in self._transposed else name,)


def read_config(fields: dict[str, Any], where: str) -> HFConfig:
    """The config of a model that transformers has a decoder for.

    Raises RefusedError for what could not be right here.
    """
    model, _ = outside.built(fields, where)
    config, embedding, head = model.config, model.get_input_embeddings(), model.get_output_embeddings()
    count = config.num_hidden_layers
    if type(head) is not Linear:
        raise RefusedError(f"{where!r} is of a model whose head is a {type(head).__name__}; it needs a module of ours")
    tied = head.weight is embedding.weight
    if tied and head.bias is not None:
        raise RefusedError(f"{where!r} is of a model whose tied head has a bias; it needs a module of ours")
    if not isinstance(longest := getattr(config, "max_position_embeddings", None), int):
        raise RefusedError(f"{where!r} does not tell how long a text may be (max_position_embeddings); add it")
    facts = probed(model, count, where)
    num_heads, num_kv_heads, head_dim = facts.heads
    return HFConfig(
        num_layers=count,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.weight.shape[0],
        context_length=longest,
        tied_embeddings=tied,
        windows=shortest_turn(facts.windows),
        attn_soft_cap=facts.soft_cap,
        fields=fields,
        facts=facts,
    )


def _name_of(model: nn.Module, parameter: Any) -> str:
    return next(name for name, one in model.named_parameters() if one is parameter)
