"""The flags of `slipstream bench mixed`."""

from dataclasses import dataclass

from .flags import check_positive
from .targets import Targets


@dataclass(frozen=True, kw_only=True)
class MixedOptions(Targets):
    """Long prompts arrive at a running server while streams decode: how long do the streams stall, and how long until
    all are answered? Stop tokens are ignored, so that every block is the same work.
    """

    streams: int = 4
    """Answers under way when the prompts come (requests)."""
    stream_prompt_tokens: int = 32
    """Their prompts (tokens)."""
    stream_tokens: int = 128
    """Their answers (tokens); enough to outlast the prompts' prefills."""
    prompts: int = 4
    """Long prompts, sent at one moment (requests)."""
    prompt_tokens: int = 900
    """Each of them (tokens)."""
    answer_tokens: int = 32
    """Their answers (tokens)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            self, "streams", "stream_prompt_tokens", "stream_tokens", "prompts", "prompt_tokens", "answer_tokens"
        )
