"""GGUF: a Llama's shape, weights and tokenizer in one file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..chat_template import ChatTemplate
from ..errors import RefusedError
from ..models.llama import LlamaConfig
from ..tokenizer import Tokenizer, byte_level_bpe

_ROPE_FACTORS = "rope_freqs.weight"
_MODULES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _USER_DEFINED = int(gguf.TokenType.CONTROL), int(gguf.TokenType.USER_DEFINED)


class GGUFCheckpoint:
    """One open GGUF file. Tensors are memory-mapped and dequantised one by one, as they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises RefusedError when the file is missing, is no GGUF file or holds a family we do not have."""
        if not path.is_file():
            raise RefusedError(f"model file {str(path)!r} does not exist; give `embedded` or the path of a GGUF file")
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise RefusedError(f"model file {str(path)!r} is no readable GGUF file ({error}); fetch it anew") from error
        self.path = path
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._rope_divisors = tensors.pop(_ROPE_FACTORS, None)
        self._tensors = {_parameter(name): tensor for name, tensor in tensors.items()}
        family = self._field("general.architecture")
        if family != "llama":
            raise RefusedError(f"model file {str(path)!r} is of the family {family!r}; the families there are: llama")
        self.name = self._field("general.name", path.stem)
        self.config = self._llama_config()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor there is, by its parameter's name; one that we do not know keeps the file's."""
        return {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> np.ndarray:
        """One tensor by its parameter's name, float32, dequantised."""
        config, stored = self.config, self._tensors[name]
        value = gguf.quants.dequantize(stored.data, stored.tensor_type).astype(np.float32, copy=False)
        if name.endswith("q_proj.weight"):
            return _halves_from_pairs(value, config.num_heads)
        if name.endswith("k_proj.weight"):
            return _halves_from_pairs(value, config.num_kv_heads)
        return value

    def tokenizer(self) -> Tokenizer:
        """The tokenizer and chat template that the file carries."""
        model = self._field("tokenizer.ggml.model")
        if model != "gpt2":
            raise RefusedError(f"{str(self.path)!r} has a tokenizer {model!r}; those there are: gpt2 (byte-level BPE)")
        tokens = self._field("tokenizer.ggml.tokens")
        types = self._field("tokenizer.ggml.token_type")
        split = self._field("tokenizer.ggml.pre")
        backend = byte_level_bpe(
            tokens,
            self._field("tokenizer.ggml.merges"),
            pre_tokenizer=split,
            control_ids=[i for i, kind in enumerate(types) if kind == _CONTROL],
            added_ids=[i for i, kind in enumerate(types) if kind == _USER_DEFINED],
        )
        eos_id = self._field("tokenizer.ggml.eos_token_id")
        bos_id = self._field("tokenizer.ggml.bos_token_id", None)
        adds_bos = self._field("tokenizer.ggml.add_bos_token", split == "llama-bpe")  # as llama.cpp, where unsaid
        special = {name: tokens[i] for name, i in (("bos_token", bos_id), ("eos_token", eos_id)) if i is not None}
        template = self._field("tokenizer.chat_template", None)
        ends = {eos_id, self._field("tokenizer.ggml.eot_token_id", eos_id)}
        return Tokenizer(
            backend,
            vocab_size=len(tokens),
            bos_id=bos_id,
            eos_id=eos_id,
            stop_ids=frozenset(ends),
            first_ids=[bos_id] if adds_bos and bos_id is not None else [],
            chat_template=ChatTemplate(template, special) if template else None,
        )

    def _field(self, key: str, *default: Any) -> Any:
        field = self._reader.fields.get(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise RefusedError(f"{str(self.path)!r} lacks the field {key!r}; convert the model anew")

    def _llama_config(self) -> LlamaConfig:
        heads, model_dim = self._field("llama.attention.head_count"), self._field("llama.embedding_length")
        head_dim = self._field("llama.attention.key_length", model_dim // heads)
        scaling = self._field("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise RefusedError(f"{str(self.path)!r} scales its rope by {scaling!r}; those there are: none, llama3")
        if self._field("llama.rope.dimension_count", head_dim) != head_dim:
            raise RefusedError(f"{str(self.path)!r} turns only a part of each head, which is not there yet")
        return LlamaConfig(
            num_layers=self._field("llama.block_count"),
            num_heads=heads,
            num_kv_heads=self._field("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            model_dim=model_dim,
            ffn_dim=self._field("llama.feed_forward_length"),
            vocab_size=self._vocab_size(),
            rope_theta=self._field("llama.rope.freq_base", 10000.0),  # GGUF: absent means the first Llama's
            rms_norm_eps=self._field("llama.attention.layer_norm_rms_epsilon"),
            tied_embeddings="lm_head.weight" not in self._tensors,
            context_length=self._field("llama.context_length"),
            rope_factors=self._rope_factors(),
        )

    def _vocab_size(self) -> int:
        if "embed_tokens.weight" not in self._tensors:
            raise RefusedError(f"{str(self.path)!r} has no token embedding; convert the model anew")
        return int(self._tensors["embed_tokens.weight"].shape[1])

    def _rope_factors(self) -> tuple[float, ...] | None:
        """Llama 3.1 and later: the scaling comes as a tensor of divisors."""
        return None if self._rope_divisors is None else tuple(self._rope_divisors.data.tolist())


def _parameter(stored_name: str) -> str:
    """`blk.3.attn_q.weight` is our `layers.3.self_attn.q_proj.weight`; what is not in the table keeps its name."""
    if (of_layer := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", stored_name)) and of_layer[2] in _LAYER_MODULES:
        return f"layers.{of_layer[1]}.{_LAYER_MODULES[of_layer[2]]}.{of_layer[3]}"
    module, _, kind = stored_name.rpartition(".")
    return f"{_MODULES[module]}.{kind}" if module in _MODULES else stored_name


def _halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores llama's q and k rows for a rope that turns neighbours (2i, 2i+1); ours turns halves (i, i + H/2)."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
