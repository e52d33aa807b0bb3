"""GGUF: a model's shape, weights and tokenizer in one file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

from ..errors import RefusedError
from ..text.chat_template import ChatTemplate
from ..text.pre_tokenizers import pre_tokenizer
from ..text.tokenizer import Tokenizer, byte_level_bpe
from .contract import Codes, Compact
from .damage import damage_told, try_out
from .gguf_architectures import MODULES
from .gguf_codes import compact_of
from .gguf_config import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, GGUFFields, dequantised, read_gguf_config
from .gguf_parts import GGUFParts
from .pieces import CONTROL, USER_DEFINED, Pieces, backend_of
from .sources import halves_from_pairs

_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("eos", "eot", "eom")
TURN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>", "<|return|>", "<|call|>",
)  # fmt: skip
"""Control tokens that end a turn, whatever a file's fields say: as in llama.cpp."""
MESSAGE_END = "<|end|>"
"""It ends a message, and not the turn, where there is a `<|call|>`: gpt-oss' chat form has several messages a turn."""


class GGUFCheckpoint:
    """One open GGUF file. Tensors are memory-mapped and decoded one by one, as they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises RefusedError when the file is missing, is no GGUF file or holds a family we do not have."""
        self.path = path
        with damage_told(f"model file {str(path)!r}"):
            self._read(path)

    def _read(self, path: Path) -> None:
        self._file = GGUFParts(path)
        self._field = GGUFFields(self._file, str(path))
        self._architecture = self._field.architecture()
        of_rope = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
        names = [name for name in self._file.tensors if name not in of_rope]
        self._stored = {parameter: at for name in names for parameter, at in self._parameters(name).items()}
        self.name = self._field("general.name", path.stem)
        self.config = read_gguf_config(self._file, str(path))
        self.quantization = None  # its weights count as floats: `compact` forms hold them exactly, and nothing else

    def files(self) -> Sequence[Path]:
        """All of its parts."""
        return self._file.paths

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor there is, by its parameter's name; one that we do not know keeps the file's."""
        shapes = {name: (self._file.tensors[stored].shape, index) for name, (stored, index) in self._stored.items()}
        return {name: shape if index is None else shape[1:] for name, (shape, index) in shapes.items()}

    def tensor(self, name: str) -> np.ndarray:
        """One tensor by its parameter's name, float32, dequantised."""
        stored, index = self._stored[name]
        value = self._in_halves(name, dequantised(self._file, stored, str(self.path), index))
        is_from_zero = self._architecture.norms_from_zero and name.endswith("norm.weight")
        return value - 1 if is_from_zero else value

    def compact(self) -> Mapping[str, Compact]:
        """Of all kinds but those whose codes stand for a table's values."""
        forms = {name: compact_of(self._file.tensors[stored].kind) for name, (stored, _) in self._stored.items()}
        return {name: form for name, form in forms.items() if form is not None}

    def codes(self, name: str) -> Codes:
        """One tensor's by its parameter's name, as the file has them."""
        return self._file.codes(*self._stored[name]).each(lambda rows: self._in_halves(name, rows))

    def _in_halves(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of q and k as the model's rope turns them."""
        if self._architecture.pairs and ".q_proj." in name:
            return halves_from_pairs(rows, self.config.num_heads)
        if self._architecture.pairs and ".k_proj." in name:
            return halves_from_pairs(rows, self.config.num_kv_heads)
        return rows

    def tokenizer(self) -> Tokenizer:
        """The tokenizer and chat template that the file carries."""
        with damage_told(f"the tokenizer of {str(self.path)!r}"):
            tokenizer = self._tokenizer()
            try_out(tokenizer)
            tokenizer.check_template()
        return tokenizer

    def _tokenizer(self) -> Tokenizer:
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
        unsaid = model == "llama" or pre_tokenizer(self._field("tokenizer.ggml.pre")).adds_bos  # as llama.cpp
        adds_bos = self._field("tokenizer.ggml.add_bos_token", unsaid)
        template = self._field("tokenizer.chat_template", None)
        return Tokenizer(
            backend,
            vocab_size=len(tokens),
            bos_id=bos_id,
            eos_id=eos_id,
            stop_ids=self._stop_ids(tokens),
            first_ids=[bos_id] if adds_bos and bos_id is not None else [],
            text_prefix=prefix,
            chat_template=ChatTemplate(template, special) if template else None,
        )

    def _stop_ids(self, tokens: Sequence[str]) -> frozenset[int]:
        """What the file calls an end, and the tokens that end a turn in the chat forms that there are."""
        told = {self._field(f"tokenizer.ggml.{end}_token_id", None) for end in _ENDS} - {None}
        kinds = self._field("tokenizer.ggml.token_type")
        ends = set(TURN_ENDS) - ({MESSAGE_END} if "<|call|>" in tokens else set())
        turns = {i for i, token in enumerate(tokens) if token in ends and kinds[i] in (CONTROL, USER_DEFINED)}
        return frozenset(told | turns)

    def _byte_level_bpe(self, tokens: Sequence[str]) -> Backend:
        kinds = self._field("tokenizer.ggml.token_type")
        return byte_level_bpe(
            tokens,
            self._field("tokenizer.ggml.merges"),
            split=self._field("tokenizer.ggml.pre"),
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

    def _parameters(self, stored_name: str) -> dict[str, tuple[str, int | None]]:
        """{parameter: (its tensor in the file, which entry along the first axis; None is all)}.

        `blk.3.attn_q.weight` is our `layers.3.self_attn.q_proj.weight`; what is in no table keeps its name.
        """
        of_layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", stored_name)
        layer, module, kind = of_layer.groups() if of_layer else ("", *stored_name.rpartition(".")[::2])
        if of_layer and (own := self._architecture.layer_parameters.get(f"{module}.{kind}")):
            return {f"layers.{layer}.{own}": (stored_name, None)}
        if of_layer and module in self._architecture.stacks:
            several, count = self._architecture.stacks[module], self._file.tensors[stored_name].shape[0]
            return {f"layers.{layer}.{several.format(i)}.{kind}": (stored_name, i) for i in range(count)}
        if of_layer and module in self._architecture.layer_modules:
            return {f"layers.{layer}.{self._architecture.layer_modules[module]}.{kind}": (stored_name, None)}
        return {f"{MODULES[module]}.{kind}" if module in MODULES else stored_name: (stored_name, None)}
