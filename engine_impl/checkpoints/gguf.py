"""GGUF: a Llama's shape, weights and tokenizer in one file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..errors import RefusedError
from ..models.llama import LlamaConfig
from ..tokenizer import Tokenizer, byte_level_bpe

_ROPE_FACTORS = "rope_freqs.weight"
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
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        family = self._field("general.architecture")
        if family != "llama":
            raise RefusedError(f"model file {str(path)!r} is of the family {family!r}; the families there are: llama")
        self.name = self._field("general.name", path.stem)
        self.config = self._llama_config()
        self._gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, self.config.num_layers)

    def tensor(self, name: str) -> np.ndarray:
        """One parameter of the torch module by its name, float32, shape as the module has it.

        Raises RefusedError when the file has no such tensor.
        """
        config, stored_name = self.config, self._stored_name(name)
        if stored_name not in self._tensors:
            raise RefusedError(f"{str(self.path)!r} has no tensor for the parameter {name!r}; fetch it anew")
        stored = self._tensors[stored_name]
        value = gguf.quants.dequantize(stored.data, stored.tensor_type).astype(np.float32, copy=False)
        if name.endswith("q_proj.weight"):
            return _halves_from_pairs(value, config.num_heads)
        if name.endswith("k_proj.weight"):
            return _halves_from_pairs(value, config.num_kv_heads)
        return value

    def unused(self, names: set[str]) -> list[str]:
        """Tensors of the file that none of these parameters takes."""
        return sorted(set(self._tensors) - {_ROPE_FACTORS} - {self._stored_name(name) for name in names})

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
        ends = {eos_id, self._field("tokenizer.ggml.eot_token_id", eos_id)}
        return Tokenizer(
            backend,
            vocab_size=len(tokens),
            bos_id=self._field("tokenizer.ggml.bos_token_id", None),
            eos_id=eos_id,
            stop_ids=frozenset(ends),
            adds_bos=self._field("tokenizer.ggml.add_bos_token", split == "llama-bpe"),  # as llama.cpp, where unsaid
            chat_template=self._field("tokenizer.chat_template", None),
        )

    def _stored_name(self, name: str) -> str | None:
        if name == "lm_head.weight" and self.config.tied_embeddings:
            name = "embed_tokens.weight"
        full_name = name if name.startswith("lm_head") else f"model.{name}"
        return self._gguf_names.get_name(full_name, try_suffixes=(".weight",))

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
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            rope_theta=self._field("llama.rope.freq_base", 10000.0),  # GGUF: absent means the first Llama's
            rms_norm_eps=self._field("llama.attention.layer_norm_rms_epsilon"),
            tied_embeddings="output.weight" not in self._tensors,
            context_length=self._field("llama.context_length"),
            rope_factors=self._rope_factors(),
        )

    def _rope_factors(self) -> tuple[float, ...] | None:
        """Llama 3.1 and later: the scaling comes as a tensor of divisors."""
        stored = self._tensors.get(_ROPE_FACTORS)
        return None if stored is None else tuple(stored.data.tolist())


def _halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores llama's q and k rows for a rope that turns neighbours (2i, 2i+1); ours turns halves (i, i + H/2)."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
