"""Tiny SentencePiece models (bytes of a tokenizer.model), trained once a run."""

import pytest

from .vocabularies import train_pieces


@pytest.fixture(autouse=True)
def weights_as_they_come(without_native_kernels):
    """Not in panels: these tests compare what an engine holds with what a file has."""


@pytest.fixture(scope="session")
def llama_pieces():
    """As Llama 2's: BPE, byte fallback, text as it is."""
    return train_pieces(
        model_type="bpe", vocab_size=620, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.98,
    )  # fmt: skip


@pytest.fixture(scope="session")
def gemma_pieces():
    """As Gemma's: no space in front of a text, runs of spaces as pieces of the user's."""
    return train_pieces(
        model_type="bpe", vocab_size=620, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, user_defined_symbols=["<|im_start|>", "▁▁▁", "▁▁"],
        character_coverage=0.98,
    )  # fmt: skip


@pytest.fixture(scope="session")
def unigram_pieces():
    """SentencePiece's own defaults: unigram, NFKC, single spaces; a piece of the user's."""
    return train_pieces(
        model_type="unigram", vocab_size=420, byte_fallback=True, user_defined_symbols=["<|im_start|>"],
        hard_vocab_limit=False,
    )  # fmt: skip
