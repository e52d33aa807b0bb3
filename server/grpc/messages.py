"""The wire's messages: a DecodeRequest becomes a request, a request's events become DecodeResponses, and back."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...engine_impl.errors import RefusedError
from ...engine_impl.text.chat import NO_ARGUMENTS, Call, Chat, Tool, Turn
from ...protos import orchestrator_pb2 as pb
from ..config import AUTO, ChatConfig
from ..dialects.parts import CallPart
from ..request.adapter import NO_ADAPTERS
from ..request.chat import ROLES, ChatCall, Prompt, prompt_of
from ..request.control_stops import with_control_stops
from ..request.events import Event, FinishReason, TokenLogprob, Usage
from ..request.form import FREE, AnswerForm
from ..request.grammar import Grammar
from ..request.limits import Limits, check_messages, check_slots
from ..request.options import OPTIONS, AnswerOptions
from ..request.prefix_key import prefix_key
from ..request.request import Request

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine
    from ...engine_impl.api import Tokenizer

DEFAULT = ChatConfig()

REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
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
    config: ChatConfig = DEFAULT,
) -> Request:
    """Raises RefusedError for what the engine cannot answer. `deadline`: s of time.monotonic(). `token`: the caller's,
    if its cached prefixes are its own."""
    if message.lora_adapter_id and not engine.sizes.max_adapters:
        raise RefusedError(f"lora_adapter_id={message.lora_adapter_id!r} must be empty: {NO_ADAPTERS}")
    options = read_options(message)
    check_slots(options.num_samples, engine.sizes.slots)
    limits, grammar, tokenizer = Limits.of(engine), read_form(message).made(), engine.get_tokenizer()
    options = with_control_stops(options, tokenizer)
    prompt = read_prompt(message, tokenizer, limits, config, grammar)  # last: it may be megabytes
    request = Request(
        prompt_ids=prompt.token_ids,
        syntax=prompt.syntax,
        grammar=prompt.grammar,
        deliver=deliver,
        deadline=deadline,
        id=request_id,
        prefix_key=prefix_key(options.cache_salt, token),
        prediction_ids=limits.ids_of_prediction(tokenizer, options.prediction),
        adapter_name=message.lora_adapter_id,
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


def read_form(message: pb.DecodeRequest) -> AnswerForm:
    """What the answer must look like."""
    name = message.WhichOneof("form")
    if name is None:
        return FREE
    value: Any = tuple(message.choices.texts) if name == "choices" else getattr(message, name)
    return AnswerForm(**{name: value})


def write_form(message: pb.DecodeRequest, form: AnswerForm) -> None:
    """What read_form() reads."""
    for name in form.given:
        if name == "choices":
            message.choices.texts.extend(form.choices)
        else:
            setattr(message, name, getattr(form, name))


def read_prompt(
    message: pb.DecodeRequest,
    tokenizer: "Tokenizer",
    limits: Limits,
    config: ChatConfig = DEFAULT,
    grammar: Grammar | None = None,
) -> Prompt:
    """Of whichever content was sent. `grammar`: what the answer must look like. Raises RefusedError."""
    match message.WhichOneof("content"):
        case "text_content":
            return Prompt(token_ids=limits.ids_of_text(tokenizer, message.text_content.text), grammar=grammar)
        case "token_content":
            limits.check_count(len(message.token_content.token_ids))
            bos = tokenizer.encode("")  # as JetStream does it: its clients send token ids without
            token_ids = list(message.token_content.token_ids)
            has_bos = message.has_bos or token_ids[: len(bos)] == bos or not token_ids
            return Prompt(token_ids=token_ids if has_bos else bos + token_ids, grammar=grammar)
        case "messages":
            check_messages(len(message.messages.messages))
            return prompt_of(read_chat(message.messages, grammar), tokenizer, limits, config)
        case _:
            raise RefusedError("the prompt is missing; set text_content, token_content or messages")


def read_chat(message: pb.DecodeRequest.Chat, grammar: Grammar | None = None) -> ChatCall:
    """As both fronts ask. `grammar`: what the answer must look like where it calls no tool."""
    goes_on = message.continue_final_message
    begins = message.add_generation_prompt if message.HasField("add_generation_prompt") else not goes_on
    chat = Chat(
        turns=tuple(map(read_turn, message.messages)),
        tools=tuple(
            Tool(name=tool.name, description=tool.description, parameters=tool.parameters or NO_ARGUMENTS)
            for tool in message.tools
        ),
        documents=message.documents,
        template_kwargs=message.chat_template_kwargs,
        enable_thinking=message.enable_thinking if message.HasField("enable_thinking") else None,
        add_generation_prompt=begins,
        continue_final_message=goes_on,
    )
    return ChatCall(
        chat=chat,
        tool_choice=message.tool_choice or AUTO,
        tool_name=message.tool_name,
        parallel_tool_calls=message.parallel_tool_calls if message.HasField("parallel_tool_calls") else True,
        strict=frozenset(tool.name for tool in message.tools if tool.strict),
        grammar=grammar,
    )


def read_turn(message: pb.DecodeRequest.Message) -> Turn:
    return Turn(
        role=ROLES.get(message.role, message.role),
        content=message.content,
        name=message.name,
        reasoning=message.reasoning_content,
        calls=tuple(Call(id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls),
        call_id=message.tool_call_id,
    )


def write_chat(message: pb.DecodeRequest.Chat, call: ChatCall) -> None:
    """What read_chat() reads."""
    chat = call.chat
    for turn in chat.turns:
        calls = [pb.DecodeRequest.ToolCall(id=one.id, name=one.name, arguments=one.arguments) for one in turn.calls]
        message.messages.add(
            role=turn.role,
            content=turn.content,
            tool_calls=calls,
            tool_call_id=turn.call_id,
            name=turn.name,
            reasoning_content=turn.reasoning,
        )
    for tool in chat.tools:
        strict = tool.name in call.strict
        message.tools.add(name=tool.name, description=tool.description, parameters=tool.parameters, strict=strict)
    message.tool_choice, message.tool_name = call.tool_choice, call.tool_name
    message.parallel_tool_calls = call.parallel_tool_calls
    message.documents, message.chat_template_kwargs = chat.documents, chat.template_kwargs
    if chat.enable_thinking is not None:
        message.enable_thinking = chat.enable_thinking
    message.add_generation_prompt = chat.add_generation_prompt
    message.continue_final_message = chat.continue_final_message


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
        sample.reasoning += event.reasoning
        for part in event.calls:
            sample.tool_calls.add(index=part.index, id=part.id, name=part.name, arguments=part.arguments)
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
    message.accepted_draft_tokens = usage.accepted_draft_tokens
    message.rejected_draft_tokens = usage.rejected_draft_tokens
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
        if sample.text or sample.reasoning or sample.tool_calls or sample.token_ids or sample.finish_reason:
            events.append(
                Event(
                    index=index,
                    text=sample.text,
                    reasoning=sample.reasoning,
                    calls=tuple(
                        CallPart(index=part.index, id=part.id, name=part.name, arguments=part.arguments)
                        for part in sample.tool_calls
                    ),
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
        accepted_draft_tokens=message.accepted_draft_tokens,
        rejected_draft_tokens=message.rejected_draft_tokens,
        queue_ms=message.queue_ms if message.HasField("queue_ms") else None,
        ttft_ms=message.ttft_ms if message.HasField("ttft_ms") else None,
        total_ms=message.total_ms,
    )
