"""The wire's messages: a DecodeRequest becomes a request, a request's events become DecodeResponses."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from ..engine_impl.errors import RefusedError
from ..protos import orchestrator_pb2 as pb
from .request import Event, FinishReason, Limits, Request, check_max_tokens, sampling_params

if TYPE_CHECKING:
    from ..engine_impl.engine import Engine
    from ..engine_impl.tokenizer import TextStream, Tokenizer

REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def read_request(message: pb.DecodeRequest, engine: "Engine", deliver: Callable[[Event], object]) -> Request:
    """Raises RefusedError for what the engine cannot answer."""
    if message.num_samples not in (0, 1):
        raise RefusedError(f"num_samples={message.num_samples} must be 0 or 1; ask again for more answers")
    if message.lora_adapter_id:
        raise RefusedError(f"lora_adapter_id={message.lora_adapter_id!r} must be empty: there are no adapters")
    check_max_tokens(message.max_tokens)
    top_p = message.top_p if message.HasField("top_p") else 1.0
    seed = message.seed if message.HasField("seed") else None
    sampling = sampling_params(message.temperature, message.top_k, top_p, seed)
    prompt_ids = read_prompt(message, engine.get_tokenizer())
    Limits.of(engine).check(prompt_ids, message.max_tokens)
    return Request(prompt_ids=prompt_ids, max_tokens=message.max_tokens, sampling=sampling, deliver=deliver)


def read_prompt(message: pb.DecodeRequest, tokenizer: "Tokenizer") -> list[int]:
    """Token ids of whichever content was sent."""
    match message.WhichOneof("content"):
        case "text_content":
            return tokenizer.encode(message.text_content.text)
        case "token_content":
            bos = tokenizer.encode("")  # as JetStream does it: its clients send token ids without
            token_ids = list(message.token_content.token_ids)
            return token_ids if message.has_bos or token_ids[: len(bos)] == bos or not token_ids else bos + token_ids
        case "messages":
            turns = [{"role": turn.role, "content": turn.content} for turn in message.messages.messages]
            if not turns:
                raise RefusedError("messages is empty; send at least one")
            return tokenizer.encode(tokenizer.render_chat(turns))
        case _:
            raise RefusedError("the prompt is missing; set text_content, token_content or messages")


async def replies(
    events: asyncio.Queue[Event], request: Request, text: "TextStream"
) -> AsyncIterator[pb.DecodeResponse]:
    """One message for whatever has come since the one before. Raises the error that the request ended with."""
    last = False
    while not last:
        sample = pb.DecodeResponse.StreamContent.Sample()
        batch = [await events.get()]
        while not events.empty():
            batch.append(events.get_nowait())
        for event in batch:
            sample.token_ids.extend(event.token_ids)
            sample.text += "".join(text.feed(token_id) for token_id in event.token_ids)
        reply = pb.DecodeResponse(stream_content=pb.DecodeResponse.StreamContent(samples=[sample]))
        if last := batch[-1].is_last:
            finish(reply, batch[-1], request, text.finish())
        yield reply


def finish(reply: pb.DecodeResponse, event: Event, request: Request, rest: str) -> None:
    """Makes `reply` the last one. Raises the error that the request ended with."""
    if event.error is not None:
        raise event.error
    sample = reply.stream_content.samples[0]
    sample.text += rest
    assert event.finish_reason is not None
    sample.finish_reason = REASONS[event.finish_reason]
    reply.usage.prompt_tokens = len(request.prompt_ids)
    reply.usage.generated_tokens = request.delivered
