"""Tokens as texts: put one after the other, they are the text."""

import json

import pytest
from slipstream.engine_impl.checkpoints.tokenizer_files import read_tokenizer
from slipstream.engine_impl.text.tokenizer import NoTokenizer
from slipstream.server.http.token_names import TokenNames
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tests.engine_impl.checkpoints.vocabularies import CORPUS, train_pieces


def byte_level(folder):
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in ("<s>", "</s>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS[:3], trainer)
    backend.save(str(folder / "tokenizer.json"))


def pieces(folder):
    model = train_pieces(
        vocab_size=420, model_type="bpe", byte_fallback=True, character_coverage=0.98,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model)


@pytest.mark.parametrize("write", [byte_level, pieces])
def test_names_make_the_text(write, tmp_path):
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    tokenizer = read_tokenizer(tmp_path, "here", 10_000)
    names, broken = TokenNames(tokenizer), 0
    for text in [*CORPUS, "\U0001d518 unseen"]:
        of_text = [names.of(token_id) for token_id in tokenizer.encode(text)]
        assert b"".join(bytes(name.bytes) for name in of_text).decode().removeprefix(" ") == text
        broken += sum("\ufffd" in name.text for name in of_text)
        for name in of_text:
            assert name.text == bytes(name.bytes).decode(errors="replace")
    assert broken, "some characters are several tokens"
    assert names.of(1).text == "</s>" if write is byte_level else names.of(2).text == "</s>"


def test_without_a_tokenizer_there_are_no_names():
    tokenizer = NoTokenizer("here", vocab_size=9, bos_id=None, stop_ids=frozenset())
    assert TokenNames(tokenizer).of(3).text == ""
