"""What a prompt begins with, as a chain of digests: two prompts share as many of them as whole blocks from their start.

A body is looked at as it came, without parsing: a hint to a router must not cost what reading a request does, and a
stranger's JSON is read elsewhere, in a process of its own. The same JSON in another spelling is another chain.
"""

import re
from array import array
from collections.abc import Iterator
from hashlib import blake2b

from google.protobuf.message import DecodeError

from ...protos import orchestrator_pb2 as pb

BLOCK = 512
"""Of a prompt (bytes): about one page of the cache."""
MOST = 32
"""Blocks that are looked at (count)."""
WINDOW = BLOCK * MOST

PROMPT = re.compile(rb'"(?:prompt|messages|input|system)"\s*:\s*')
MODEL = re.compile(rb'"(?:model|cache_salt)"\s*:\s*"[^"]{0,256}"')
"""What keeps equal prompts' caches apart: the model, which may be an adapter's name, and the salt."""


def of_body(body: bytes, owner: bytes = b"") -> tuple[bytes, ...]:
    """Of a JSON body of any of the HTTP front's endpoints; empty for one without a prompt, or with a short one.

    Args:
        owner: whose cache it is, where callers have one each.
    """
    prompt = PROMPT.search(body)
    if prompt is None:
        return ()
    apart = b"".join(sorted(match[0] for match in MODEL.finditer(body)))
    return chain(body[prompt.end() : prompt.end() + WINDOW], owner + b"\n" + apart)


def of_message(data: bytes, owner: bytes = b"") -> tuple[bytes, ...]:
    """Of a DecodeRequest's bytes, likewise."""
    try:
        message = pb.DecodeRequest.FromString(data)
    except DecodeError:
        return ()
    apart = f"{message.lora_adapter_id}\n{message.cache_salt}".encode()
    return chain(prompt_of(message)[:WINDOW], owner + b"\n" + apart)


def prompt_of(message: pb.DecodeRequest) -> bytes:
    match message.WhichOneof("content"):
        case "text_content":
            return message.text_content.text[:WINDOW].encode()
        case "token_content":
            return array("i", message.token_content.token_ids[:WINDOW]).tobytes()
        case "messages":
            return "\n".join(f"{turn.role}\t{turn.content[:WINDOW]}" for turn in message.messages.messages).encode()
        case _:
            return b""


def chain(prompt: bytes, apart: bytes) -> tuple[bytes, ...]:
    """A digest for each whole block, of all up to its end and of `apart`."""
    return tuple(digests(prompt, apart))


def digests(prompt: bytes, apart: bytes) -> Iterator[bytes]:
    digest = blake2b(apart, digest_size=8).digest()
    for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
        digest = blake2b(digest + prompt[start : start + BLOCK], digest_size=8).digest()
        yield digest
