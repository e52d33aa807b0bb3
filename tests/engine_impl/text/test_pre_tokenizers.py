"""How text is split before merging, by the published patterns."""

import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.text.pre_tokenizers import O200K, PRE_TOKENIZERS, QWEN2, pre_tokenizer
from tokenizers import pre_tokenizers


def words(name, text):
    split = pre_tokenizers.Sequence(list(pre_tokenizer(name).steps))
    return [text[start:end] for _, (start, end) in split.pre_tokenize_str(text)]


CASES = [
    (["gpt-2"], "it's 1234 ok", ["it", "'s", " 1234", " ok"]),
    (["smollm", "starcoder", "refact", "command-r"], "it's 1234", ["it", "'s", " ", "1", "2", "3", "4"]),
    (
        ["llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"],
        "IT'S 12345 a/b",
        ["IT", "'S", " ", "123", "45", " a", "/b"],
    ),
    (["qwen2", "deepseek-r1-qwen", "stablelm2"], "IT'S 123", ["IT", "'S", " ", "1", "2", "3"]),
    (["tekken"], "camelCase HTTPServer it's 1", ["camel", "Case", " HTTPServer", " it", "'s", " ", "1"]),
    (["tekken"], "12/\n", ["1", "2", "/\n"]),
    (["gpt-4o"], "camelCase it's 12345/\n", ["camel", "Case", " it's", " ", "123", "45", "/\n"]),
]


@pytest.mark.parametrize(("names", "text", "expected"), CASES)
def test_words_by_hand(names, text, expected):
    for name in names:
        assert words(name, text) == expected, name


def test_every_name_is_tried():
    assert {name for names, *_ in CASES for name in names} == set(PRE_TOKENIZERS)


def test_the_patterns_are_those_that_were_published():
    """In packages that are here; the others stand in checkpoints."""
    import inspect

    from tiktoken_ext import openai_public
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert QWEN2 == PRETOKENIZE_REGEX
    source = inspect.getsource(openai_public.o200k_base)
    rest = O200K
    for part in [line.strip()[4:-4] for line in source.split("\n") if line.strip().startswith('r"""')]:
        assert rest.startswith(part)
        rest = rest[len(part) + 1 :]
    assert not rest


def test_an_unknown_name_is_refused():
    with pytest.raises(RefusedError, match="pre-tokenizer 'viking' is not there; those there are: gpt-2, smollm"):
        pre_tokenizer("viking")
