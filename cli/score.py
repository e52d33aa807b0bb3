"""slipstream score: how likely a model finds a text."""

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ..engine_impl.config import EngineConfig
from ..engine_impl.errors import RefusedError
from .adapter import with_room


@dataclass(frozen=True)
class Score:
    """Tell the log-probability of each token of a text given those before it, and the text's perplexity."""

    engine: EngineConfig
    text: str | None = None
    """The text, taken as it is: no chat template."""
    tokens: str | None = None
    """Token ids instead, such as 1,2,3; needs no tokenizer."""
    through: Literal["prefill", "decode"] = "prefill"
    """`prefill` takes all tokens as a prompt's, chunk by chunk; `decode` one by one through the cache, as an
    answer's tokens are."""
    adapter: str | None = None
    """A LoRA adapter that changes the model: a folder as PEFT writes it, or a hub id."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object as the last line of stdout: token_ids, logprobs (null for the first), perplexity."""

    def run(self) -> int:
        given = self._token_ids()  # refused before the slow load

        from ..engine_impl.loading import load_engine
        from ..engine_impl.scoring import perplexity, score
        from ..engine_impl.session import Session

        engine, params = load_engine(with_room(self.engine, self.adapter))
        session = Session(engine, params)
        if self.adapter is not None:
            session.use_adapter(engine.read_adapter(self.adapter))
        tokenizer = engine.get_tokenizer()
        token_ids = tokenizer.encode(self.text or "") if given is None else given
        logprobs = score(session, token_ids, self.through)
        total = perplexity(logprobs)
        if self.as_json:
            print(json.dumps({"token_ids": token_ids, "logprobs": [None, *logprobs], "perplexity": total}), flush=True)
            return 0
        for token_id, logprob in zip(token_ids, [None, *logprobs], strict=True):
            told = "-" if logprob is None else f"{logprob:.4f}"
            print(f"{token_id:>8}{told:>12}  {tokenizer.decode([token_id])!r}")
        print(f"perplexity {total:.4f} over {len(logprobs)} tokens", flush=True)
        return 0

    def _token_ids(self) -> list[int] | None:
        if (self.text is None) == (self.tokens is None):
            raise RefusedError("give either --text TEXT or --tokens 1,2,3")
        if self.tokens is None:
            return None
        try:
            return [int(word) for word in self.tokens.split(",")]
        except ValueError as error:
            raise RefusedError(
                f"tokens={self.tokens!r} must be token ids with commas between, such as 1,2,3"
            ) from error
