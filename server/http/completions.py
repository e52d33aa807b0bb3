"""What clients of /v1/completions get: raw text, behind the prompt if they want it echoed."""

from dataclasses import replace
from typing import Any

from ..delivery.mailbox import Batch
from ..request.events import Event, TokenLogprob
from .bodies import CompletionBody
from .echo import Echo, echo_of
from .pieces import Piece
from .replies import Json, Reply, finite


class CompletionReply(Reply):
    """Of raw text."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    _body: CompletionBody

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._echoes: dict[int, Echo] = {}
        self._prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}

    def add(self, batch: Batch) -> None:
        super().add(self._behind_echo(batch))

    def chunk(self, batch: Batch) -> Json | None:
        return super().chunk(self._behind_echo(batch))

    @property
    def is_large(self) -> bool:
        return self._body.echo or super().is_large

    def _behind_echo(self, batch: Batch) -> Batch:
        """Its tokens begin where the prompts' text ends; nothing of them where the prompt alone is asked for."""
        if not self._body.echo:
            return batch
        return [(number, self._shifted(event, len(self._echo(number).text))) for number, event in batch]

    def _shifted(self, event: Event, by: int) -> Event:
        if not self._body.is_echo_alone:
            return event._replace(starts=tuple(by + start for start in event.starts))
        usage = event.usage and replace(event.usage, generated_tokens=0)
        return event._replace(text="", token_ids=(), starts=(), logprobs=(), usage=usage)

    def _echo(self, of_prompt: int) -> Echo:
        """Made once for all samples."""
        if of_prompt not in self._echoes:
            token_ids, tokenizer = self._requests[of_prompt].prompt_ids, self._names.tokenizer
            self._echoes[of_prompt] = echo_of(self._body.text_of(of_prompt), token_ids, tokenizer)
        return self._echoes[of_prompt]

    def _opened(self, number: int, piece: Piece) -> Piece:
        if not self._body.echo:
            return piece
        of_prompt = number // self._body.n
        if piece.prompt_logprobs is not None:  # they come once, with the first sample
            self._prompt_logprobs[of_prompt] = piece.prompt_logprobs
        echo = self._echo(of_prompt)
        return replace(
            piece,
            text=echo.text + piece.text,
            token_ids=[*echo.token_ids, *piece.token_ids],
            logprobs=[*(self._prompt_logprobs[of_prompt] if self._body.logprobs is not None else ()), *piece.logprobs],
            starts=[*echo.starts, *piece.starts],
            echoed=len(echo.token_ids),
        )

    def _whole(self, piece: Piece) -> Json:
        return {"text": piece.text}

    def _delta(self, piece: Piece, *, is_first: bool) -> Json:
        return {"text": piece.text}

    def _logprobs(self, piece: Piece) -> Json:
        """As OpenAI has them; of a prompt's first token nothing is known."""
        names = [self._names.of(token_id).text for token_id in piece.token_ids]
        first = 1 if piece.echoed else 0
        none, told = [None] * first, list(zip(names, piece.logprobs, strict=True))[first:]
        return {
            "tokens": names,
            "token_logprobs": [*none, *(finite(token.logprob) for _, token in told)],
            "top_logprobs": [*none, *(self._top(name, token) for name, token in told)],
            "text_offset": piece.starts,
        }

    def _top(self, chosen: str, token: TokenLogprob) -> dict[str, float]:
        """By text; the chosen token is always there. Of two tokens of one text, the likelier counts."""
        top: dict[str, float] = {}
        for token_id, logprob in token.top[: self._body.logprobs]:
            top.setdefault(self._names.of(token_id).text, finite(logprob))
        top.setdefault(chosen, finite(token.logprob))
        return top
