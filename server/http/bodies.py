"""What clients send: OpenAI's fields, vLLM's beyond them, and the requests that become of them.

A field that is null counts as left out. One that is neither here nor in a `refused` changes no answer, and is ignored.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ...engine_impl.sampling.params import MAX_LOGPROBS
from ...engine_impl.text.chat import Chat
from ..config import AUTO, ChatConfig
from ..gateway import Deliver
from ..request.chat import ChatCall, Prompt, prompt_of
from ..request.control_stops import with_control_stops
from ..request.limits import MAX_MESSAGES, Limits, check_slots
from ..request.options import AnswerOptions
from ..request.prefix_key import prefix_key
from ..request.request import Request
from .errors import BadFieldError
from .fields import (
    MAX_ITEMS,
    Effort,
    JsonList,
    JsonObject,
    Message,
    Prompts,
    StreamOptions,
    ToolChoice,
    ToolDefinition,
    few,
)
from .forms import Forms
from .options import DeclaredFields, options_in

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine
    from ...engine_impl.api import Tokenizer

DEFAULT = ChatConfig()


class Body(DeclaredFields, Forms):
    """What completions and chats have in common: a request's options, and what is HTTP's alone."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "length_penalty": (1,),
        "use_beam_search": (False,),
        "bad_words": ([],),
        "allowed_token_ids": (),
        "logits_processors": ([],),
        "truncate_prompt_tokens": (),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
        "guided_whitespace_pattern": (),
        "return_tokens_as_token_ids": (False,),
        "vllm_xargs": ({},),
    }

    model: str | None = None
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @classmethod
    def _given(cls, fields: Any) -> dict[str, Any]:
        given = super()._given(fields)
        if "stream_options" in given and not given.get("stream"):
            raise BadFieldError("stream_options", "stream_options are for streams; set stream=true or leave them out")
        return given

    @property
    def has_usage_chunk(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    @abstractmethod
    def asked_logprobs(self) -> int | None:
        """As SamplingParams.logprobs has it."""

    @property
    def told_prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens a choice's `prompt_logprobs` have; None: there are none."""
        return most(self.prompt_logprobs, self.prompt_top_logprobs or None)

    @property
    def asked_prompt_logprobs(self) -> int | None:
        """As AnswerOptions has it."""
        return self.told_prompt_logprobs

    @abstractmethod
    def prompts(self, tokenizer: "Tokenizer", limits: Limits, config: ChatConfig) -> Iterator[Prompt]:
        """One after the other. Raises RefusedError."""

    @abstractmethod
    def longest(self, room: int) -> int:
        """The answer's length at most (tokens), where the cache has `room` behind the prompt."""

    def requests(
        self,
        request_id: str,
        engine: "Engine",
        deliver_to: Callable[[int], Deliver],
        token: str | None = None,
        config: ChatConfig = DEFAULT,
    ) -> list[Request]:
        """One for each prompt. `token`: the caller's, if its cached prefixes are its own. Raises RefusedError."""
        check_slots(self.n, engine.sizes.slots)
        tokenizer, limits, requests = engine.get_tokenizer(), Limits.of(engine), []
        self._options(limits.longest)  # refused before the prompts are read: they may be megabytes
        for number, prompt in enumerate(self.prompts(tokenizer, limits, config)):
            options = with_control_stops(self._options(limits.longest - len(prompt.token_ids)), tokenizer)
            request = Request(
                prompt_ids=prompt.token_ids,
                syntax=prompt.syntax,
                grammar=prompt.grammar,
                deliver=deliver_to(number),
                id=request_id if self.num_prompts == 1 else f"{request_id}-{number}",
                prefix_key=prefix_key(self.cache_salt, token),
                prediction_ids=limits.ids_of_prediction(tokenizer, options.prediction),
                **options.fields(),
            )
            limits.check(request)
            requests.append(request)
        return requests

    def _options(self, room: int) -> AnswerOptions:
        check_logprobs("prompt_logprobs", self.prompt_logprobs)
        asked, values = self.asked_prompt_logprobs, options_in(self)
        if asked is not None:
            values |= {"prompt_logprobs": values["prompt_logprobs"] or not asked, "prompt_top_logprobs": asked}
        return AnswerOptions.of(max_tokens=self.longest(room), logprobs=self.asked_logprobs, **values)


class CompletionBody(Body):
    """POST /v1/completions. Several prompts are several requests."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = Body.refused | {"suffix": ("",), "prompt_embeds": ()}

    prompt: Prompts
    max_tokens: int = 16
    echo: bool = False
    add_special_tokens: bool = True
    """Whether texts begin as the model wants them to, mostly with a BOS."""
    logprobs: int | None = None
    best_of: int | None = None

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def asked_prompt_logprobs(self) -> int | None:
        return most(self.told_prompt_logprobs, self.logprobs if self.echo else None)

    @property
    def is_echo_alone(self) -> bool:
        """Whether the prompt is shown and nothing behind it."""
        return self.echo and self.max_tokens == 0

    def _options(self, room: int) -> AnswerOptions:
        options = super()._options(room)
        if self.echo and self.logprobs is not None and self.max_tokens == 1:
            # Evaluation harnesses take one token off the end: it has to be there, the model's end, too.
            return replace(options, sampling=replace(options.sampling, ignore_eos=True))
        return options

    def text_of(self, number: int) -> str | None:
        """A prompt as it was sent; None for token ids."""
        if self._is_ids:
            return None
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt[number]
        return prompt if isinstance(prompt, str) else None

    @property
    def num_prompts(self) -> int:
        return len(self.prompt) if isinstance(self.prompt, list) and not self._is_ids else 1

    def check_counts(self, limits: Limits) -> None:
        prompts: list[Any] = self.prompt if isinstance(self.prompt, list) and not self._is_ids else [self.prompt]
        for prompt in prompts:
            if isinstance(prompt, list):
                limits.check_count(len(prompt))

    @property
    def _is_ids(self) -> bool:
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], int)

    def prompts(self, tokenizer: "Tokenizer", limits: Limits, config: ChatConfig) -> Iterator[Prompt]:
        if self.best_of not in (None, self.n):
            raise BadFieldError("best_of", f"best_of={self.best_of} must be n={self.n}: all answers are shown")
        prompts: list[Any] = self.prompt if isinstance(self.prompt, list) and not self._is_ids else [self.prompt]
        if not prompts:
            raise BadFieldError("prompt", "prompt is an empty list; send at least one")
        grammar = self.grammar()
        for prompt in prompts:
            is_text, first = isinstance(prompt, str), self.add_special_tokens
            token_ids = limits.ids_of_text(tokenizer, prompt, with_first=first) if is_text else prompt
            yield Prompt(token_ids=token_ids, grammar=grammar)

    def longest(self, room: int) -> int:
        return 1 if self.is_echo_alone else self.max_tokens  # the token behind the prompt is not shown


class ChatBody(Body):
    """POST /v1/chat/completions."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = Body.refused | {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "chat_template": (),
        "add_special_tokens": (False,),
        "echo": (False,),
        "verbosity": ("medium",),
        "include_reasoning": (True,),
        "thinking_token_budget": (),
    }

    messages: Annotated[list[Message], *few(MAX_MESSAGES)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: Annotated[list[ToolDefinition], *few(MAX_ITEMS)] = []  # noqa: RUF012
    tool_choice: ToolChoice = AUTO
    parallel_tool_calls: bool = True
    documents: JsonList = ""
    chat_template_kwargs: JsonObject = ""
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @property
    def asked_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadFieldError("top_logprobs", "top_logprobs are for logprobs=true; set it, or leave them out")
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self, tokenizer: "Tokenizer", limits: Limits, config: ChatConfig) -> Iterator[Prompt]:
        yield prompt_of(self.call(), tokenizer, limits, config)

    def call(self) -> ChatCall:
        """What is asked, as both fronts read it. Raises BadFieldError."""
        if not self.messages:
            raise BadFieldError("messages", "messages is empty; send at least one")
        begins = self.add_generation_prompt
        chat = Chat(
            turns=tuple(message.turn(f"messages[{at}]") for at, message in enumerate(self.messages)),
            tools=tuple(tool.tool(f"tools[{at}]") for at, tool in enumerate(self.tools)),
            documents=self.documents,
            template_kwargs=self.chat_template_kwargs,
            enable_thinking=self.enable_thinking,
            reasoning_effort=self.reasoning_effort or "",
            add_generation_prompt=not self.continue_final_message if begins is None else begins,
            continue_final_message=self.continue_final_message,
        )
        choice = self.tool_choice
        return ChatCall(
            chat=chat,
            tool_choice=choice if isinstance(choice, str) else AUTO,
            tool_name="" if isinstance(choice, str) else choice.function.name,
            parallel_tool_calls=self.parallel_tool_calls,
            strict=frozenset(tool.function.name for tool in self.tools if tool.function and tool.function.strict),
            grammar=self.grammar(),
        )

    def longest(self, room: int) -> int:
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return max(room, 1) if asked is None else asked


def check_logprobs(name: str, k: int | None) -> None:
    """Raises BadFieldError."""
    if k is not None and not 0 <= k <= MAX_LOGPROBS:
        raise BadFieldError(name, f"{name}={k} must be from 0 (no others) to {MAX_LOGPROBS}, or left out")


def most(*asked: int | None) -> int | None:
    """None where all are."""
    return max((k for k in asked if k is not None), default=None)
