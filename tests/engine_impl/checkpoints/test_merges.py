"""vocab.json with merges.txt and no tokenizer.json, against transformers' own classes on the same files."""

import json

import pytest
from slipstream.engine_impl.checkpoints.merges import MERGES, SPLITS, VOCABULARY
from slipstream.engine_impl.checkpoints.tokenizer_files import read_tokenizer
from slipstream.engine_impl.errors import RefusedError
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from .vocabularies import CORPUS

END = "<|endoftext|>"
TEXTS = [*CORPUS, "", "IT'S 12345 we'LL", f"a{END}b <|im_end|> c", "two  spaces \n\n x", "e\u0301te\u0301"]


@pytest.fixture
def folder(tmp_path):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.model.save(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [MERGES, VOCABULARY]
    return tmp_path


def tell(folder, **fields):
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("name", SPLITS)
def test_ids_equal_transformers(name, folder):
    import transformers

    added = {"500": {"content": "<|im_end|>", "special": True}}
    tell(folder, tokenizer_class=name, eos_token=END, added_tokens_decoder=added)
    reference = getattr(transformers, name)(str(folder / VOCABULARY), str(folder / MERGES), eos_token=END)
    reference.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer = read_tokenizer(folder, "m", 501)
    for text in TEXTS:
        ids = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.first_ids) == (0, {0}, ())


def test_a_class_whose_split_is_not_known_is_refused(folder):
    """These files do not tell how text is split before merging."""
    for told in ({"tokenizer_class": "CodeGenTokenizer"}, {}):
        tell(folder, **told)
        with pytest.raises(RefusedError, match="those there are: GPT2Tokenizer, Qwen2Tokenizer; save it with transf"):
            read_tokenizer(folder, "m", 501)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (VOCABULARY, "{", "vocab.json' is not JSON"),
        (VOCABULARY, json.dumps({"a": 0, "b": 2}), "does not number its tokens from 0 on"),
        (MERGES, "no such", "does not fit vocab.json"),
    ],
)
def test_damaged_files_are_told(file, text, message, folder):
    tell(folder, tokenizer_class="GPT2TokenizerFast")
    (folder / file).write_text(text)
    with pytest.raises(RefusedError, match=message):
        read_tokenizer(folder, "m", 501)
