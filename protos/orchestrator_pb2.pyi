from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_DEADLINE: _ClassVar[FinishReason]
    FINISH_REASON_TOOL_CALLS: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_DEADLINE: FinishReason
FINISH_REASON_TOOL_CALLS: FinishReason

class DecodeRequest(_message.Message):
    __slots__ = ("max_tokens", "text_content", "token_content", "messages", "metadata", "num_samples", "lora_adapter_id", "has_bos", "temperature", "top_k", "top_p", "seed", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop_strings", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs", "priority", "min_tokens", "logit_bias", "prompt_top_logprobs", "cache_salt", "prediction", "json_schema", "json_object", "regex", "choices", "grammar", "structural_tag")
    class TextContent(_message.Message):
        __slots__ = ("text",)
        TEXT_FIELD_NUMBER: _ClassVar[int]
        text: str
        def __init__(self, text: _Optional[str] = ...) -> None: ...
    class TokenContent(_message.Message):
        __slots__ = ("token_ids",)
        TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        token_ids: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...
    class Metadata(_message.Message):
        __slots__ = ("start_time",)
        START_TIME_FIELD_NUMBER: _ClassVar[int]
        start_time: float
        def __init__(self, start_time: _Optional[float] = ...) -> None: ...
    class Message(_message.Message):
        __slots__ = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")
        ROLE_FIELD_NUMBER: _ClassVar[int]
        CONTENT_FIELD_NUMBER: _ClassVar[int]
        TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
        TOOL_CALL_ID_FIELD_NUMBER: _ClassVar[int]
        NAME_FIELD_NUMBER: _ClassVar[int]
        REASONING_CONTENT_FIELD_NUMBER: _ClassVar[int]
        role: str
        content: str
        tool_calls: _containers.RepeatedCompositeFieldContainer[DecodeRequest.ToolCall]
        tool_call_id: str
        name: str
        reasoning_content: str
        def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ..., tool_calls: _Optional[_Iterable[_Union[DecodeRequest.ToolCall, _Mapping]]] = ..., tool_call_id: _Optional[str] = ..., name: _Optional[str] = ..., reasoning_content: _Optional[str] = ...) -> None: ...
    class ToolCall(_message.Message):
        __slots__ = ("id", "name", "arguments")
        ID_FIELD_NUMBER: _ClassVar[int]
        NAME_FIELD_NUMBER: _ClassVar[int]
        ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
        id: str
        name: str
        arguments: str
        def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., arguments: _Optional[str] = ...) -> None: ...
    class Tool(_message.Message):
        __slots__ = ("name", "description", "parameters", "strict")
        NAME_FIELD_NUMBER: _ClassVar[int]
        DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
        PARAMETERS_FIELD_NUMBER: _ClassVar[int]
        STRICT_FIELD_NUMBER: _ClassVar[int]
        name: str
        description: str
        parameters: str
        strict: bool
        def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., parameters: _Optional[str] = ..., strict: _Optional[bool] = ...) -> None: ...
    class Chat(_message.Message):
        __slots__ = ("messages", "tools", "tool_choice", "tool_name", "parallel_tool_calls", "documents", "chat_template_kwargs", "enable_thinking", "add_generation_prompt", "continue_final_message")
        MESSAGES_FIELD_NUMBER: _ClassVar[int]
        TOOLS_FIELD_NUMBER: _ClassVar[int]
        TOOL_CHOICE_FIELD_NUMBER: _ClassVar[int]
        TOOL_NAME_FIELD_NUMBER: _ClassVar[int]
        PARALLEL_TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
        DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
        CHAT_TEMPLATE_KWARGS_FIELD_NUMBER: _ClassVar[int]
        ENABLE_THINKING_FIELD_NUMBER: _ClassVar[int]
        ADD_GENERATION_PROMPT_FIELD_NUMBER: _ClassVar[int]
        CONTINUE_FINAL_MESSAGE_FIELD_NUMBER: _ClassVar[int]
        messages: _containers.RepeatedCompositeFieldContainer[DecodeRequest.Message]
        tools: _containers.RepeatedCompositeFieldContainer[DecodeRequest.Tool]
        tool_choice: str
        tool_name: str
        parallel_tool_calls: bool
        documents: str
        chat_template_kwargs: str
        enable_thinking: bool
        add_generation_prompt: bool
        continue_final_message: bool
        def __init__(self, messages: _Optional[_Iterable[_Union[DecodeRequest.Message, _Mapping]]] = ..., tools: _Optional[_Iterable[_Union[DecodeRequest.Tool, _Mapping]]] = ..., tool_choice: _Optional[str] = ..., tool_name: _Optional[str] = ..., parallel_tool_calls: _Optional[bool] = ..., documents: _Optional[str] = ..., chat_template_kwargs: _Optional[str] = ..., enable_thinking: _Optional[bool] = ..., add_generation_prompt: _Optional[bool] = ..., continue_final_message: _Optional[bool] = ...) -> None: ...
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    class Choices(_message.Message):
        __slots__ = ("texts",)
        TEXTS_FIELD_NUMBER: _ClassVar[int]
        texts: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_CONTENT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_CONTENT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LORA_ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    HAS_BOS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    JSON_OBJECT_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    STRUCTURAL_TAG_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    text_content: DecodeRequest.TextContent
    token_content: DecodeRequest.TokenContent
    messages: DecodeRequest.Chat
    metadata: DecodeRequest.Metadata
    num_samples: int
    lora_adapter_id: str
    has_bos: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop_strings: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: bool
    priority: int
    min_tokens: int
    logit_bias: _containers.ScalarMap[int, float]
    prompt_top_logprobs: int
    cache_salt: str
    prediction: str
    json_schema: str
    json_object: bool
    regex: str
    choices: DecodeRequest.Choices
    grammar: str
    structural_tag: str
    def __init__(self, max_tokens: _Optional[int] = ..., text_content: _Optional[_Union[DecodeRequest.TextContent, _Mapping]] = ..., token_content: _Optional[_Union[DecodeRequest.TokenContent, _Mapping]] = ..., messages: _Optional[_Union[DecodeRequest.Chat, _Mapping]] = ..., metadata: _Optional[_Union[DecodeRequest.Metadata, _Mapping]] = ..., num_samples: _Optional[int] = ..., lora_adapter_id: _Optional[str] = ..., has_bos: _Optional[bool] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., stop_strings: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[bool] = ..., priority: _Optional[int] = ..., min_tokens: _Optional[int] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., prompt_top_logprobs: _Optional[int] = ..., cache_salt: _Optional[str] = ..., prediction: _Optional[str] = ..., json_schema: _Optional[str] = ..., json_object: _Optional[bool] = ..., regex: _Optional[str] = ..., choices: _Optional[_Union[DecodeRequest.Choices, _Mapping]] = ..., grammar: _Optional[str] = ..., structural_tag: _Optional[str] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("initial_content", "stream_content", "usage", "prompt_logprobs", "prompt_likeliest")
    class InitialContent(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class StreamContent(_message.Message):
        __slots__ = ("samples",)
        class Sample(_message.Message):
            __slots__ = ("text", "token_ids", "finish_reason", "logprobs", "reasoning", "tool_calls")
            TEXT_FIELD_NUMBER: _ClassVar[int]
            TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
            FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
            LOGPROBS_FIELD_NUMBER: _ClassVar[int]
            REASONING_FIELD_NUMBER: _ClassVar[int]
            TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
            text: str
            token_ids: _containers.RepeatedScalarFieldContainer[int]
            finish_reason: FinishReason
            logprobs: _containers.RepeatedCompositeFieldContainer[DecodeResponse.TokenLogprob]
            reasoning: str
            tool_calls: _containers.RepeatedCompositeFieldContainer[DecodeResponse.StreamContent.ToolCallPart]
            def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., logprobs: _Optional[_Iterable[_Union[DecodeResponse.TokenLogprob, _Mapping]]] = ..., reasoning: _Optional[str] = ..., tool_calls: _Optional[_Iterable[_Union[DecodeResponse.StreamContent.ToolCallPart, _Mapping]]] = ...) -> None: ...
        class ToolCallPart(_message.Message):
            __slots__ = ("index", "id", "name", "arguments")
            INDEX_FIELD_NUMBER: _ClassVar[int]
            ID_FIELD_NUMBER: _ClassVar[int]
            NAME_FIELD_NUMBER: _ClassVar[int]
            ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
            index: int
            id: str
            name: str
            arguments: str
            def __init__(self, index: _Optional[int] = ..., id: _Optional[str] = ..., name: _Optional[str] = ..., arguments: _Optional[str] = ...) -> None: ...
        SAMPLES_FIELD_NUMBER: _ClassVar[int]
        samples: _containers.RepeatedCompositeFieldContainer[DecodeResponse.StreamContent.Sample]
        def __init__(self, samples: _Optional[_Iterable[_Union[DecodeResponse.StreamContent.Sample, _Mapping]]] = ...) -> None: ...
    class TokenLogprob(_message.Message):
        __slots__ = ("logprob", "top_token_ids", "top_logprobs")
        LOGPROB_FIELD_NUMBER: _ClassVar[int]
        TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
        TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
        logprob: float
        top_token_ids: _containers.RepeatedScalarFieldContainer[int]
        top_logprobs: _containers.RepeatedScalarFieldContainer[float]
        def __init__(self, logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...
    class Usage(_message.Message):
        __slots__ = ("prompt_tokens", "generated_tokens", "queue_ms", "ttft_ms", "total_ms", "cached_tokens", "accepted_draft_tokens", "rejected_draft_tokens")
        PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
        GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
        QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
        TTFT_MS_FIELD_NUMBER: _ClassVar[int]
        TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
        CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
        ACCEPTED_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
        REJECTED_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
        prompt_tokens: int
        generated_tokens: int
        queue_ms: float
        ttft_ms: float
        total_ms: float
        cached_tokens: int
        accepted_draft_tokens: int
        rejected_draft_tokens: int
        def __init__(self, prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., queue_ms: _Optional[float] = ..., ttft_ms: _Optional[float] = ..., total_ms: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., accepted_draft_tokens: _Optional[int] = ..., rejected_draft_tokens: _Optional[int] = ...) -> None: ...
    INITIAL_CONTENT_FIELD_NUMBER: _ClassVar[int]
    STREAM_CONTENT_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LIKELIEST_FIELD_NUMBER: _ClassVar[int]
    initial_content: DecodeResponse.InitialContent
    stream_content: DecodeResponse.StreamContent
    usage: DecodeResponse.Usage
    prompt_logprobs: _containers.RepeatedScalarFieldContainer[float]
    prompt_likeliest: _containers.RepeatedCompositeFieldContainer[DecodeResponse.TokenLogprob]
    def __init__(self, initial_content: _Optional[_Union[DecodeResponse.InitialContent, _Mapping]] = ..., stream_content: _Optional[_Union[DecodeResponse.StreamContent, _Mapping]] = ..., usage: _Optional[_Union[DecodeResponse.Usage, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[float]] = ..., prompt_likeliest: _Optional[_Iterable[_Union[DecodeResponse.TokenLogprob, _Mapping]]] = ...) -> None: ...

class HealthCheckRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthCheckResponse(_message.Message):
    __slots__ = ("is_live",)
    IS_LIVE_FIELD_NUMBER: _ClassVar[int]
    is_live: bool
    def __init__(self, is_live: _Optional[bool] = ...) -> None: ...
