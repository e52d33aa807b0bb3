"""HTTP bodies that are made to cost their reader much. Each is as large as it is asked to be (bytes)."""

import json
import random
import string
from collections.abc import Callable

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"

Make = Callable[[int], bytes]


def repeated(unit: str) -> Make:
    """One prompt, the same again and again."""
    return lambda size: json.dumps({"prompt": unit * (size // len(json.dumps(unit).encode()[1:-1]))}).encode()


def random_letters(size: int) -> bytes:
    """One prompt without a space."""
    return json.dumps({"prompt": "".join(random.Random(0).choices(string.ascii_lowercase, k=size))}).encode()


def items(field: str, item: str) -> Make:
    """A list of as many items as fit."""
    return lambda size: f'{{"{field}": [{",".join([item] * (size // (len(item) + 1)))}]}}'.encode()


INPUTS: dict[str, tuple[str, Make]] = {
    # name: (path, body)
    "words": (COMPLETIONS, repeated("hello world ")),
    "digits": (COMPLETIONS, repeated("7")),
    "letter": (COMPLETIONS, repeated("a")),
    "spaces": (COMPLETIONS, repeated(" ")),
    "random": (COMPLETIONS, random_letters),
    "control": (COMPLETIONS, repeated("<|im_end|>")),
    "chat": (
        CHATS,
        lambda size: json.dumps({"messages": [{"role": "user", "content": "word " * (size // 5)}]}).encode(),
    ),
    "lists": (COMPLETIONS, items("prompt", "[1]")),
    "numbers": (COMPLETIONS, items("prompt", "1")),
    "objects": (CHATS, items("messages", "{}")),
    "wrong-prompts": (COMPLETIONS, items("prompt", "{}")),
    "wrong-messages": (CHATS, items("messages", "1")),
    "small-pieces": (CHATS, lambda size: items("messages", "{}")(min(size, 1 << 16) - 32)),
}
"""What the names of `slipstream bench hostile --only` stand for."""
