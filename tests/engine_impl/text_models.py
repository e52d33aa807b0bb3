"""A tiny model that reads and writes text, for tests that need a whole server on virtual devices in seconds."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.text.tokenizer import Tokenizer, byte_level_bpe
from slipstream.engine_impl.weights.sharding import make_mesh

from .tiny_models import TINY, tiny_engine

BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
CHARACTERS = [chr(byte) if byte in BYTES else None for byte in range(256)]
_OTHERS = iter(range(0x100, 0x200))
TOKENS = [character or chr(next(_OTHERS)) for character in CHARACTERS]  # token i is byte i
HALF_EMOJI = ["".join(TOKENS[byte] for byte in half) for half in (b"\xf0\x9f", b"\x98\x80")]
MERGES = [f"{half[0]} {half[1]}" for half in HALF_EMOJI]
BOS, END = 258, 259
CONFIG = replace(TINY, vocab_size=260)


def byte_tokenizer(*, adds_bos: bool = False, stop_ids: frozenset[int] = frozenset({END})) -> Tokenizer:
    """One token a byte, but for an emoji's two halves: "a😀" is [97, 256, 257]."""
    backend = byte_level_bpe([*TOKENS, *HALF_EMOJI, "<s>", "</s>"], MERGES, split="gpt-2", control_ids=[BOS, END])
    first_ids = [BOS] if adds_bos else []
    return Tokenizer(
        backend, vocab_size=260, bos_id=BOS, eos_id=END, stop_ids=stop_ids, first_ids=first_ids, chat_template=None
    )


def text_engine(devices: Sequence[Any], tokenizer: Tokenizer, *, slots: int = 3) -> tuple[Engine, Any]:
    """A random Llama over all the devices given, float32, cache length 128; always the same weights."""
    mesh = make_mesh(devices, CONFIG.num_heads, CONFIG.num_kv_heads, len(devices))
    engine, params = tiny_engine(CONFIG, slots=slots, mesh=mesh)
    engine.get_tokenizer = lambda: tokenizer
    return engine, params


@functools.cache
def one_device_engine() -> tuple[Engine, Any]:
    """Compiled once a test run."""
    return text_engine(jax.devices()[:1], byte_tokenizer())
