"""GGUF: a Llama's shape, weights and tokenizer in one file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from ..errors import RefusedError
from ..models.llama import LlamaConfig
from ..text.chat_template import ChatTemplate
from ..text.tokenizer import Tokenizer, byte_level_bpe
from .gguf_file import GGUFFile
from .pieces import CONTROL, USER_DEFINED, Pieces, backend_of

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
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class GGUFCheckpoint:
    """One open GGUF file. Tensors are memory-mapped and dequantised one by one, as they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises RefusedError when the file is missing, is no GGUF file or holds a family we do not have."""
        if not path.is_file():
            raise RefusedError(f"model file {str(path)!r} does not exist; give `embedded` or the path of a GGUF file")
        try:
            self._file = GGUFFile(path)
        except (ValueError, OSError) as error:
            raise RefusedError(f"model file {str(path)!r} is no readable GGUF file ({error}); fetch it anew") from error
        self.path = path
        self._stored_names = {_parameter(name): name for name in self._file.tensors if name != _ROPE_FACTORS}
        family = self._field("general.architecture")
        if family != "llama":
            raise RefusedError(f"model file {str(path)!r} is of the family {family!r}; the families there are: llama")
        self.name = self._field("general.name", path.stem)
        self.config = self._llama_config()
        self.quantization = None  # its weights count as floats: exact, and on a CPU faster than codes

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor there is, by its parameter's name; one that we do not know keeps the file's."""
        return {name: self._file.tensors[stored].shape for name, stored in self._stored_names.items()}

    def tensor(self, name: str) -> np.ndarray:
        """One tensor by its parameter's name, float32, dequantised."""
        value = self._dequantised(self._stored_names[name])
        if name.endswith("q_proj.weight"):
            return _halves_from_pairs(value, self.config.num_heads)
        if name.endswith("k_proj.weight"):
            return _halves_from_pairs(value, self.config.num_kv_heads)
        return value

    def tokenizer(self) -> Tokenizer:
        """The tokenizer and chat template that the file carries."""
        model = self._field("tokenizer.ggml.model")
        if model not in ("gpt2", "llama"):
            raise RefusedError(
                f"{str(self.path)!r} has a tokenizer {model!r}; those there are: gpt2 (byte-level BPE), llama "
                "(SentencePiece)"
            )
        tokens = self._field("tokenizer.ggml.tokens")
        backend, prefix = self._pieces(tokens) if model == "llama" else (self._byte_level_bpe(tokens), "")
        ids = {name: self._field(f"tokenizer.ggml.{key}_token_id", None) for name, key in _SPECIAL_TOKENS.items()}
        special = {name: tokens[i] for name, i in ids.items() if i is not None}
        bos_id, eos_id = ids["bos_token"], self._field("tokenizer.ggml.eos_token_id")
        unsaid = model == "llama" or self._field("tokenizer.ggml.pre") == "llama-bpe"  # as llama.cpp
        adds_bos = self._field("tokenizer.ggml.add_bos_token", unsaid)
        template = self._field("tokenizer.chat_template", None)
        return Tokenizer(
            backend,
            vocab_size=len(tokens),
            bos_id=bos_id,
            eos_id=eos_id,
            stop_ids=frozenset({eos_id, self._field("tokenizer.ggml.eot_token_id", eos_id)}),
            first_ids=[bos_id] if adds_bos and bos_id is not None else [],
            text_prefix=prefix,
            chat_template=ChatTemplate(template, special) if template else None,
        )

    def _byte_level_bpe(self, tokens: Sequence[str]) -> Backend:
        kinds = self._field("tokenizer.ggml.token_type")
        return byte_level_bpe(
            tokens,
            self._field("tokenizer.ggml.merges"),
            pre_tokenizer=self._field("tokenizer.ggml.pre"),
            control_ids=[i for i, kind in enumerate(kinds) if kind == CONTROL],
            added_ids=[i for i, kind in enumerate(kinds) if kind == USER_DEFINED],
        )

    def _pieces(self, tokens: Sequence[str]) -> tuple[Backend, str]:
        pieces = Pieces(
            texts=tokens,
            scores=self._field("tokenizer.ggml.scores"),
            kinds=self._field("tokenizer.ggml.token_type"),
            space_first=self._field("tokenizer.ggml.add_space_prefix", True),
        )
        return backend_of(pieces, space_after_control=True)  # as llama.cpp

    def _dequantised(self, stored_name: str) -> np.ndarray:
        try:
            return self._file.tensor(stored_name)
        except ValueError as error:
            raise RefusedError(f"{str(self.path)!r}: {error}; take another quantisation of the model") from error

    def _field(self, key: str, *default: Any) -> Any:
        if key in self._file.fields:
            return self._file.fields[key]
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
            tied_embeddings="lm_head.weight" not in self._stored_names,
            context_length=self._field("llama.context_length"),
            rope_factors=self._rope_factors(),
        )

    def _vocab_size(self) -> int:
        embedding = self._stored_names.get("embed_tokens.weight")
        if embedding is None:
            raise RefusedError(f"{str(self.path)!r} has no token embedding; convert the model anew")
        return self._file.tensors[embedding].shape[0]

    def _rope_factors(self) -> tuple[float, ...] | None:
        """Llama 3.1 and later: the scaling comes as a tensor of divisors."""
        if _ROPE_FACTORS not in self._file.tensors:
            return None
        return tuple(self._dequantised(_ROPE_FACTORS).tolist())


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
