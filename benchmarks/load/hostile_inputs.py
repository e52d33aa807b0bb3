"""HTTP bodies and gRPC messages that are made to cost their reader much, each as large as it is asked to be (bytes)."""

import json
import random
import string
from collections.abc import Callable

from ...protos import orchestrator_pb2 as pb
from ...server.grpc.service import JETSTREAM_SERVICE

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
DECODE = f"/{JETSTREAM_SERVICE}/Decode"

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


def not_utf8(size: int) -> bytes:
    """A text of bytes that are none."""
    message = pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text="a" * size)).SerializeToString()
    return message.replace(b"a", b"\xff")


def adapter(size: int) -> bytes:
    """A name that an error would repeat."""
    return pb.DecodeRequest(lora_adapter_id="a" * size, max_tokens=1).SerializeToString()


def text(size: int) -> bytes:
    """One prompt."""
    content = pb.DecodeRequest.TextContent(text="hello world " * (size // 12))
    return pb.DecodeRequest(text_content=content, max_tokens=1).SerializeToString()


def ids(size: int) -> bytes:
    """A token in each byte."""
    content = pb.DecodeRequest.TokenContent(token_ids=[5] * size)
    return pb.DecodeRequest(token_content=content, max_tokens=1).SerializeToString()


INPUTS: dict[str, tuple[str, Make]] = {
    # name: (path, body or message)
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
    "grpc-random": (DECODE, lambda size: random.Random(0).randbytes(size)),
    "grpc-not-utf8": (DECODE, not_utf8),
    "grpc-groups": (DECODE, lambda size: b"\x0b" * size),
    "grpc-adapter": (DECODE, adapter),
    "grpc-text": (DECODE, text),
    "grpc-ids": (DECODE, ids),
    "small-pieces": (CHATS, lambda size: items("messages", "{}")(min(size, 1 << 16) - 32)),
}
"""What the names of `slipstream bench hostile --only` stand for."""
