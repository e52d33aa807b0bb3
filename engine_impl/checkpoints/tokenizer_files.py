"""The tokenizer of a Hugging Face folder: tokenizer.json, tokenizer.model, or vocab.json with merges.txt, and the small
files around them.

What a key means is what it means to transformers, which the tests compare with.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ..errors import RefusedError
from ..runtime.workers import Workers
from ..text.chat_template import ChatTemplate
from ..text.tokenizer import NoTokenizer, Tokenizer
from .damage import damage_told, try_out
from .merges import MERGES, VOCABULARY, read_merges
from .pieces import backend_of, read_pieces
from .tekken import BOS, EOS, TEKKEN, read_tekken

WORKERS = Workers(1, seconds=45.0, memory_mib=4096)
"""Where tokenizers are read first."""

Fields = Mapping[str, Any]


def read_tokenizer(folder: Path, where: str, vocab_size: int) -> Tokenizer:
    """The folder's tokenizer; one that takes only token ids if it has none.

    Args:
        where: what messages call the model.
        vocab_size: the model's; ids beyond it are never taken, even if the tokenizer has some.

    Raises RefusedError for files that are damaged or contradict each other. They come from strangers, and the library
    that reads them may hang or end the process: they are read in another one first.
    """
    with damage_told(f"the tokenizer of {where}"):
        WORKERS.call(probe, folder, where, vocab_size)
        tokenizer = tokenizer_of(folder, where, vocab_size)
        tokenizer.check_template()
    return tokenizer


def probe(folder: Path, where: str, vocab_size: int) -> None:
    """In a worker. Raises whatever goes wrong."""
    try_out(tokenizer_of(folder, where, vocab_size))


def tokenizer_of(folder: Path, where: str, vocab_size: int) -> Tokenizer:
    """As `read_tokenizer`, in this process."""
    config = _read(folder / "config.json")
    config = (config.get("text_config") or {}) | config  # of a model that takes more than text
    generation = _read(folder / "generation_config.json")
    of_tokenizer = _read(folder / "special_tokens_map.json") | _read(folder / "tokenizer_config.json")
    for name, fields in (("generation_config.json", generation), ("config.json", config)):
        _check_ids(folder / name, fields, "eos_token_id")
        _check_ids(folder / name, fields, "bos_token_id")
    ends = _ids(generation.get("eos_token_id")) | _ids(config.get("eos_token_id"))
    own_ids: dict[str, int] = {}
    first_ids, prefix = None, ""
    if (folder / "tokenizer.json").is_file():
        backend = _backend(folder / "tokenizer.json")
        first_ids = _first_ids(backend)
    elif (folder / "tokenizer.model").is_file():
        pieces, own_ids = read_pieces(folder / "tokenizer.model")
        backend, prefix = backend_of(pieces, space_after_control=of_tokenizer.get("legacy") is True)
    elif (folder / TEKKEN).is_file():
        backend = read_tekken(folder / TEKKEN)
        of_tokenizer = {"bos_token": BOS, "eos_token": EOS} | of_tokenizer
    elif (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
        backend = read_merges(folder, of_tokenizer.get("tokenizer_class"), _special_tokens(of_tokenizer))
        of_tokenizer = {"add_bos_token": False} | of_tokenizer
    else:
        bos = min(_ids(config.get("bos_token_id")), default=None)
        return NoTokenizer(where, vocab_size=vocab_size, bos_id=bos, stop_ids=frozenset(ends))
    _add_tokens(backend, folder, of_tokenizer)
    special = {name: backend.id_to_token(i) or "" for name, i in own_ids.items()} | _special_tokens(of_tokenizer)
    bos_id, eos_id = (backend.token_to_id(special.get(name, "")) for name in ("bos_token", "eos_token"))
    if first_ids is None:
        first_ids = [bos_id] if bos_id is not None and of_tokenizer.get("add_bos_token", True) else []
    template = _chat_template(folder, of_tokenizer)
    return Tokenizer(
        backend,
        vocab_size=min(vocab_size, max(backend.get_vocab(with_added_tokens=True).values()) + 1),
        bos_id=bos_id,
        eos_id=min(ends, default=None) if eos_id is None else eos_id,
        stop_ids=frozenset(ends | _ids(eos_id)),
        first_ids=first_ids,
        text_prefix=prefix,
        chat_template=None if template is None else ChatTemplate(template, special),
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{str(path)!r} is not JSON ({error}); fetch it anew") from error
    if not isinstance(fields, dict):
        raise RefusedError(f"{str(path)!r} is no JSON object; fetch it anew")
    return fields


def _backend(path: Path) -> Backend:
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise RefusedError(f"{str(path)!r} is no tokenizer ({error}); fetch it anew") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else set(value) if isinstance(value, list) else {value}


def _check_ids(path: Path, fields: Fields, name: str) -> None:
    value = fields.get(name)
    one_or_more = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) for i in one_or_more):
        raise RefusedError(
            f"{str(path)!r} has {name}={ascii(value)[:80]}, which must be a token id or a list of them; fetch it anew"
        )


def _special_tokens(fields: Fields) -> dict[str, str]:
    """{"bos_token": "<s>", ...}; a token is stored as its text or as an object that has it."""
    texts = {name: _text(value) for name, value in fields.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _add_tokens(backend: Backend, folder: Path, fields: Fields) -> None:
    """Tokens that only the files around the vocabulary name. Their ids have to come out as these files say."""
    stated = {_text(token): (int(i), token) for i, token in (fields.get("added_tokens_decoder") or {}).items()}
    stated = {text: (i, {}) for text, i in _read(folder / "added_tokens.json").items()} | stated
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    options = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for text, (i, token) in sorted(stated.items(), key=lambda item: item[1][0]):
        if text not in known:
            flags = {name: token[name] for name in options if name in token}
            backend.add_tokens([AddedToken(text, **{"normalized": False, **flags})])
        if (found := backend.token_to_id(text)) != i:
            raise RefusedError(
                f"{str(folder)!r}: the token {text!r} has the id {found} in the vocabulary and {i} in the files around "
                "it; fetch the tokenizer anew"
            )


def _first_ids(backend: Backend) -> list[int]:
    """What tokenizer.json's post-processor puts before a text; add_bos_token is not heard beside it. Nothing of what it
    puts behind: an EOS would end the answer before it begins."""
    bare, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def _chat_template(folder: Path, fields: Fields) -> str | None:
    """chat_template.jinja, else the tokenizer_config's: a text, or several by name, of which we take the default."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = fields.get("chat_template")
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}
    if isinstance(template, dict):
        names = ", ".join(template)
        # It is refused when a chat comes, not before: raw text needs none.
        refusal = f"{{{{ raise_exception('of its templates ({names}) none is the default; send raw text') }}}}"
        template = template.get("default", refusal)
    if template is not None and not isinstance(template, str):
        where = str(folder / "tokenizer_config.json")
        raise RefusedError(
            f"{where!r} has chat_template={ascii(template)[:80]}, which must be a text, or several; fetch it anew"
        )
    return template
