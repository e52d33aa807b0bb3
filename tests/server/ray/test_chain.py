"""Prompts with a common beginning have as many digests in common as whole blocks."""

import json

import pytest
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.server.ray.chain import BLOCK, MOST, of_body, of_message

LONG = "".join(f"{number:04d}" for number in range(BLOCK))
"""Four blocks, no two alike."""


def common(a, b):
    """How many digests two chains share from their start; behind them they share none."""
    count = next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
    assert not set(a[count:]) & set(b[count:])
    return count


def prompt(text, **more):
    return of_body(json.dumps({"model": "m", "prompt": text, **more}).encode())


def test_a_prompt_shares_its_whole_blocks_with_one_that_goes_on_differently():
    quote = 1  # JSON's, before the text
    a, b = LONG[: 2 * BLOCK - quote] + "a" * BLOCK, LONG[: 2 * BLOCK - quote] + "b" * BLOCK
    assert len(prompt(a)) == len(prompt(b)) == 3
    assert common(prompt(a), prompt(b)) == 2
    assert common(prompt(a), prompt(a[:-1] + "c")) == 3 - 1


def test_one_other_byte_at_the_start_is_another_chain():
    assert common(prompt("a" + LONG), prompt("b" + LONG)) == 0


def test_a_conversation_keeps_its_blocks_as_it_grows():
    turns = [{"role": "user", "content": LONG}]
    later = [*turns, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and then?"}]
    first, second = (of_body(json.dumps({"messages": one, "max_tokens": 5}).encode()) for one in (turns, later))
    assert common(first, second) == 4


@pytest.mark.parametrize("field", ["prompt", "messages", "input", "system"])
def test_prompts_of_all_endpoints_are_found(field):
    assert len(of_body(json.dumps({"max_tokens": 5, field: LONG}).encode())) == 4


def test_a_name_within_a_text_is_no_field():
    body = {"user": 'x "prompt": ' + LONG, "prompt": LONG}
    assert of_body(json.dumps(body).encode()) == of_body(json.dumps({"prompt": LONG}).encode())


def test_short_prompts_and_other_bodies_have_no_chain():
    assert prompt("a") == of_body(b"") == of_body(b"\x1f\x8b" + bytes(1000)) == ()


def test_no_more_than_the_window_is_looked_at():
    assert prompt(LONG * 100) == prompt(LONG * 100 + "x")
    assert len(prompt(LONG * 100)) == MOST


def test_adapters_salts_and_owners_have_chains_of_their_own():
    chains = [
        prompt(LONG),
        prompt(LONG, model="fr"),
        prompt(LONG, cache_salt="s"),
        of_body(json.dumps({"model": "m", "prompt": LONG}).encode(), b"owner"),
    ]
    assert len({chain[0] for chain in chains}) == len(chains)


def message(**fields):
    return of_message(pb.DecodeRequest(**fields).SerializeToString())


def chat(*contents):
    return {"messages": pb.DecodeRequest.Chat(messages=[{"role": "user", "content": one} for one in contents])}


def test_messages_of_grpc_share_blocks_likewise():
    text = {"text_content": {"text": LONG}}
    assert common(message(**text), message(text_content={"text": LONG + "more"}, max_tokens=7)) == 4
    assert common(message(**text), message(**text, lora_adapter_id="fr")) == 0
    assert common(message(**text), message(**text, cache_salt="s")) == 0
    ids = {"token_content": {"token_ids": range(BLOCK)}}
    assert len(message(**ids)) == 4
    assert common(message(**chat(LONG)), message(**chat(LONG, "next"))) == 4
    assert message(text_content={"text": "a"}) == message() == of_message(b"\xff") == ()
