"""SentencePiece vocabularies as `tokenizers` backends: from a `tokenizer.model`, or the same tables in a GGUF file.

Algorithms as in the SentencePiece library (https://github.com/google/sentencepiece), which the tests compare with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from ..errors import RefusedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces, numbered alike in SentencePiece and GGUF."""

SPACE = "▁"


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A vocabulary, in id order, and how text is prepared for it."""

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    unigram: bool = False
    """the unigram language model (Kudo, arXiv 1804.10959) instead of byte-pair encoding"""
    space_first: bool = True
    """text begins as if behind a space"""
    single_spaces: bool = False
    """runs of spaces count as one, those at the ends as none"""
    charsmap: bytes = b""
    """compiled rules of character normalisation; empty is none"""

    def ids_of(self, kind: int) -> list[int]:
        return [i for i, kind_of_piece in enumerate(self.kinds) if kind_of_piece == kind]


def read_pieces(path: Path) -> tuple[Pieces, dict[str, int]]:
    """A `tokenizer.model`: its pieces, and the ids of its own {"bos_token", "eos_token", "unk_token"}.

    Raises RefusedError for a file that is none, or one with an algorithm that is not there.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        model.Clear()
    trained, normal = model.trainer_spec, model.normalizer_spec
    if not model.pieces:
        raise RefusedError(f"{str(path)!r} is no SentencePiece model; fetch it anew")
    if trained.model_type not in (trained.UNIGRAM, trained.BPE) or trained.treat_whitespace_as_suffix:
        raise RefusedError(f"{str(path)!r} is neither a BPE nor a unigram model with spaces in front of words")
    pieces = Pieces(
        texts=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        kinds=[piece.type for piece in model.pieces],
        unigram=trained.model_type == trained.UNIGRAM,
        space_first=normal.add_dummy_prefix,
        single_spaces=normal.remove_extra_whitespaces,
        charsmap=normal.precompiled_charsmap,
    )
    ids = {"bos_token": trained.bos_id, "eos_token": trained.eos_id, "unk_token": trained.unk_id}
    return pieces, {name: i for name, i in ids.items() if 0 <= i < len(pieces.texts)}


def backend_of(pieces: Pieces, *, space_after_control: bool) -> tuple[Backend, str]:
    """(the backend, what has to be put before a text that does not begin with a control token).

    `space_after_control`: text behind a control token begins as if behind a space too.
    """
    backend = Backend(_unigram(pieces) if pieces.unigram else _bpe(pieces))
    everywhere = pieces.space_first and space_after_control
    backend.normalizer = normalizers.Sequence(list(_normalizers(pieces, everywhere)))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * pieces.space_first)
    unknown = {i: AddedToken(pieces.texts[i], special=True, normalized=False) for i in pieces.ids_of(UNKNOWN)}
    control = {i: AddedToken(pieces.texts[i], special=True, normalized=False) for i in pieces.ids_of(CONTROL)}
    backend.add_special_tokens([token for _, token in sorted((unknown | control).items())])
    # As text: where spaces were turned into marks, the pieces' own marks are found.
    backend.add_tokens([AddedToken(pieces.texts[i], normalized=True) for i in pieces.ids_of(USER_DEFINED)])
    return backend, " " if pieces.space_first and not everywhere else ""


def _normalizers(pieces: Pieces, space_first: bool) -> Iterator[normalizers.Normalizer]:
    if pieces.charsmap:
        yield normalizers.Precompiled(pieces.charsmap)
    if pieces.single_spaces:
        yield normalizers.Strip(left=space_first or not pieces.space_first, right=True)
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if space_first:
        yield normalizers.Prepend(" ")
    yield normalizers.Replace(" ", SPACE)


def _unigram(pieces: Pieces) -> models.Model:
    vocabulary = list(zip(pieces.texts, pieces.scores, strict=True))
    return models.Unigram(vocabulary, pieces.ids_of(UNKNOWN)[0], byte_fallback=BYTE in pieces.kinds)


def _bpe(pieces: Pieces) -> models.Model:
    """Two neighbours merge if their text together is a piece, the best score first."""
    normal = {pieces.texts[i]: pieces.scores[i] for i in pieces.ids_of(NORMAL)}
    ids = {text: i for i, text in enumerate(pieces.texts)}
    merges = [
        (-score, ids[text[:cut]], ids[text[cut:]], text[:cut], text[cut:])
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    unknown = [pieces.texts[i] for i in pieces.ids_of(UNKNOWN)]
    return models.BPE(
        vocab=ids,
        merges=[(left, right) for *_, left, right in sorted(merges)],
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=BYTE in pieces.kinds,
    )
