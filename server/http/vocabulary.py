"""The tokenizer over HTTP, as vLLM serves it: /tokenize, /detokenize, /tokenizer_info."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ..config import ChatConfig
from ..request.limits import MAX_MESSAGES, Limits
from .bodies import ChatBody
from .errors import BadFieldError
from .fields import MAX_IDS, Message, few
from .readable import Readable

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine
    from ...engine_impl.api import Tokenizer


class TokenizeBody(ChatBody):
    """POST /tokenize: raw text, or a conversation through the model's chat template."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        name: neutral for name, neutral in ChatBody.refused.items() if name != "add_special_tokens"
    }

    prompt: str | None = None
    messages: Annotated[list[Message], *few(MAX_MESSAGES)] = []  # noqa: RUF012
    add_special_tokens: bool | None = None
    """Whether a BOS that the model needs is added; absent: to text, and not to a conversation, which brings its own."""
    return_token_strs: bool = False

    def reply(self, engine: "Engine", config: ChatConfig) -> dict[str, Any]:
        """Raises RefusedError."""
        tokenizer, limits = engine.get_tokenizer(), Limits.of(engine)
        token_ids = self._token_ids(tokenizer, limits, config)
        names = [tokenizer.token(token_id) for token_id in token_ids] if self.return_token_strs else None
        return {"count": len(token_ids), "max_model_len": limits.longest, "tokens": token_ids, "token_strs": names}

    def _token_ids(self, tokenizer: "Tokenizer", limits: Limits, config: ChatConfig) -> list[int]:
        if (self.prompt is None) == (not self.messages):
            raise BadFieldError("prompt", "prompt or messages must be there, and not both")
        if self.prompt is not None:
            return limits.ids_of_text(tokenizer, self.prompt, with_first=self.add_special_tokens is not False)
        if self.add_special_tokens:
            field = "add_special_tokens"
            raise BadFieldError(field, f"{field}=True must be left out: the model's chat template brings them")
        (prompt,) = self.prompts(tokenizer, limits, config)
        return prompt.token_ids


class DetokenizeBody(Readable):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], *few(MAX_IDS)]

    def check_counts(self, limits: Limits) -> None:
        limits.check_count(len(self.tokens))

    def reply(self, engine: "Engine", config: ChatConfig) -> dict[str, Any]:
        """The text, control tokens written out. Raises RefusedError."""
        limits = Limits.of(engine)
        limits.check_count(len(self.tokens))
        limits.check_ids(self.tokens)
        return {"prompt": engine.get_tokenizer().decode(self.tokens, with_control=True)}


def tokenizer_info(tokenizer: "Tokenizer") -> dict[str, Any]:
    """GET /tokenizer_info: what clients ask of a Hugging Face tokenizer's configuration."""

    def named(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.token(token_id)

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named(tokenizer.bos_id),
        "eos_token": named(tokenizer.eos_id),
        "add_bos_token": bool(tokenizer.first_ids),
        "chat_template": tokenizer.chat_template,
        "vocab_size": tokenizer.vocab_size,
    }
