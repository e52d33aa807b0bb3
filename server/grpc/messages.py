"""The wire's messages: a DecodeRequest becomes a request, a request's events become DecodeResponses, and back."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from ...engine_impl.errors import RefusedError
from ...protos import orchestrator_pb2 as pb
from ..request.control_stops import with_control_stops
from ..request.options import OPTIONS, AnswerOptions
from ..request.prefix_key import prefix_key
from ..request.request import Event, FinishReason, Limits, Request, TokenLogprob, Usage, check_messages, check_slots

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine
    from ...engine_impl.api import Tokenizer

REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}
REASON_OF = {number: reason for reason, number in REASONS.items()}

CAN_BE_ABSENT = {field.name for field in pb.DecodeRequest.DESCRIPTOR.fields if field.has_presence}
"""Fields: the others are zero or empty when nobody sets them."""


def read_request(
    message: pb.DecodeRequest,
    engine: "Engine",
    deliver: Callable[[Event], object],
    *,
    request_id: str,
    deadline: float | None = None,
    token: str | None = None,
) -> Request:
    """Raises RefusedError for what the engine cannot answer. `deadline`: s of time.monotonic(). `token`: the caller's,
    if its cached prefixes are its own."""
    if message.lora_adapter_id:
        raise RefusedError(f"lora_adapter_id={message.lora_adapter_id!r} must be empty: there are no adapters")
    options = read_options(message)
    check_slots(options.num_samples, engine.max_concurrent_decodes)
    limits = Limits.of(engine)
    tokenizer = engine.get_tokenizer()
    options = with_control_stops(options, tokenizer)
    prompt_ids = read_prompt(message, tokenizer, limits)  # last: the text may be megabytes
    request = Request(
        prompt_ids=prompt_ids,
        deliver=deliver,
        deadline=deadline,
        id=request_id,
        prefix_key=prefix_key(options.cache_salt, token),
        **options.fields(),
    )
    limits.check(request)
    return request


def read_options(message: pb.DecodeRequest) -> AnswerOptions:
    """Each option has a field of its name. One that can be absent is the option's default then. Raises RefusedError."""
    values = {
        one.name: one.collect(getattr(message, one.name))
        for one in OPTIONS
        if one.name not in CAN_BE_ABSENT or message.HasField(one.name)
    }
    values["num_samples"] = values["num_samples"] or 1  # JetStream's, which cannot be absent
    return AnswerOptions.of(**values)


def read_prompt(message: pb.DecodeRequest, tokenizer: "Tokenizer", limits: Limits) -> list[int]:
    """Token ids of whichever content was sent. Raises RefusedError."""
    match message.WhichOneof("content"):
        case "text_content":
            return limits.ids_of_text(tokenizer, message.text_content.text)
        case "token_content":
            limits.check_count(len(message.token_content.token_ids))
            bos = tokenizer.encode("")  # as JetStream does it: its clients send token ids without
            token_ids = list(message.token_content.token_ids)
            return token_ids if message.has_bos or token_ids[: len(bos)] == bos or not token_ids else bos + token_ids
        case "messages":
            check_messages(len(message.messages.messages))
            turns = [{"role": turn.role, "content": turn.content} for turn in message.messages.messages]
            return limits.ids_of_chat(tokenizer, turns)
        case _:
            raise RefusedError("the prompt is missing; set text_content, token_content or messages")


def write_options(message: pb.DecodeRequest, options: AnswerOptions) -> None:
    """What read_options() reads."""
    for one, value in options.values():
        if isinstance(value, tuple):
            getattr(message, one.name).extend(value)
        elif isinstance(value, Mapping):
            getattr(message, one.name).update(value)
        elif value is not None:
            setattr(message, one.name, value)


def write_reply(events: Iterable[Event], num_samples: int) -> pb.DecodeResponse:
    """One message for events of a request that follow one another."""
    reply = pb.DecodeResponse()
    samples = [reply.stream_content.samples.add() for _ in range(num_samples)]
    for event in events:
        sample = samples[event.index]
        sample.text += event.text
        sample.token_ids.extend(event.token_ids)
        for token in event.logprobs:
            write_logprob(sample.logprobs.add(), token)
        if event.finish_reason is not None:
            sample.finish_reason = REASONS[event.finish_reason]
        if event.prompt_logprobs is not None:
            reply.prompt_logprobs.extend(token.logprob for token in event.prompt_logprobs)
            if any(token.top for token in event.prompt_logprobs):
                for token in event.prompt_logprobs:
                    write_logprob(reply.prompt_likeliest.add(), token)
        if event.usage is not None:
            write_usage(reply.usage, event.usage)
    return reply


def write_logprob(message: pb.DecodeResponse.TokenLogprob, token: TokenLogprob) -> None:
    message.logprob = token.logprob
    message.top_token_ids.extend(token_id for token_id, _ in token.top)
    message.top_logprobs.extend(logprob for _, logprob in token.top)


def write_usage(message: pb.DecodeResponse.Usage, usage: Usage) -> None:
    message.prompt_tokens, message.cached_tokens = usage.prompt_tokens, usage.cached_tokens
    message.generated_tokens, message.total_ms = usage.generated_tokens, usage.total_ms
    if usage.queue_ms is not None:
        message.queue_ms = usage.queue_ms
    if usage.ttft_ms is not None:
        message.ttft_ms = usage.ttft_ms


def read_reply(reply: pb.DecodeResponse) -> Iterator[Event]:
    """The events that write_reply() was given, those of one sample as one. The last one has the usage."""
    alone = map(TokenLogprob, reply.prompt_logprobs)
    prompt_logprobs = tuple(map(read_logprob, reply.prompt_likeliest)) or tuple(alone) or None
    events = []
    for index, sample in enumerate(reply.stream_content.samples):
        if sample.text or sample.token_ids or sample.finish_reason:
            events.append(
                Event(
                    index=index,
                    text=sample.text,
                    token_ids=tuple(sample.token_ids),
                    logprobs=tuple(read_logprob(token) for token in sample.logprobs),
                    finish_reason=REASON_OF.get(sample.finish_reason),
                )
            )
    if prompt_logprobs:
        yield Event(prompt_logprobs=prompt_logprobs)
    yield from events
    if reply.HasField("usage"):
        yield Event(usage=read_usage(reply.usage))


def read_logprob(token: pb.DecodeResponse.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token.logprob, tuple(zip(token.top_token_ids, token.top_logprobs, strict=True)))


def read_usage(message: pb.DecodeResponse.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        generated_tokens=message.generated_tokens,
        queue_ms=message.queue_ms if message.HasField("queue_ms") else None,
        ttft_ms=message.ttft_ms if message.HasField("ttft_ms") else None,
        total_ms=message.total_ms,
    )
