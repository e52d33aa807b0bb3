"""slipstream generate: offline, through the same orchestrator as the server."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ..engine_impl.config import EngineConfig
from ..engine_impl.errors import RefusedError
from ..engine_impl.runtime import timeline
from ..engine_impl.text.chat import Chat
from ..server.request.options import AnswerOptions, check_utf8
from .adapter import with_room
from .form import FormFlags
from .show import print_growing

if TYPE_CHECKING:
    from ..engine_impl.text.tokenizer import Tokenizer
    from ..server.request.answer import Answer

Prompt = str | list[int]


@dataclass(frozen=True)
class Generate:
    """Answer prompts offline, several at once; the answers stream to the terminal, or come as JSON."""

    engine: EngineConfig
    answer: AnswerOptions
    form: FormFlags
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A prompt (text); may be given several times."""
    prompt_file: Path | None = None
    """A file of prompts (path): a JSON string or a JSON list of token ids per line."""
    raw: bool = False
    """Take the text as it is, without the model's chat template. Token ids always are."""
    adapter: str | None = None
    """A LoRA adapter that changes the model: a folder as PEFT writes it, or a hub id."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object as the last line of stdout: token ids, texts, finish reasons, times (ms), and what the
    start was spent on (s)."""

    def run(self) -> int:
        prompts, grammar = self._prompts(), self.form.form().made()  # refused before the slow load

        from ..engine_impl.loading import load_engine
        from .offline import answer

        engine, params = load_engine(with_room(self.engine, self.adapter))
        all_ids = [encode(engine.get_tokenizer(), prompt, raw=self.raw) for prompt in prompts]
        growing = answer(engine, params, all_ids, self.answer, grammar, self.adapter)
        if self.as_json:
            print_json(engine.model_name, all_ids, growing)
        else:
            print_growing(growing, [str(prompt) for prompt in prompts])
        return 0

    def _prompts(self) -> list[Prompt]:
        prompts: list[Prompt] = list(self.prompt)
        if self.prompt_file is not None:
            prompts += read_prompts(self.prompt_file)
        if not prompts:
            raise RefusedError("no prompt; give at least one --prompt TEXT, or a --prompt-file")
        for number, prompt in enumerate(prompts, start=1):
            if not prompt:
                raise RefusedError(f"prompt {number} is empty; give it a text or at least one token id")
        return prompts


def read_prompts(path: Path) -> list[Prompt]:
    """One prompt a line, empty lines left out. Raises RefusedError, naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"cannot read the prompt file {path}: {error}") from error
    return [read_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def read_prompt(line: str, where: str) -> Prompt:
    try:
        prompt = json.loads(line)
    except json.JSONDecodeError:
        prompt = None
    if isinstance(prompt, str):
        return check_utf8(prompt, where)
    if isinstance(prompt, list) and all(type(item) is int for item in prompt):
        return prompt
    raise RefusedError(f"{where}: must be a JSON string or a JSON list of token ids, not {line[:80]}")


def encode(tokenizer: "Tokenizer", prompt: Prompt, *, raw: bool) -> list[int]:
    """Token ids of a prompt; a text becomes the user's turn of a chat unless raw."""
    if isinstance(prompt, list):
        return prompt
    if raw:
        return tokenizer.encode(prompt)
    return tokenizer.encode_chat(Chat.of([{"role": "user", "content": prompt}])).token_ids


def print_json(model: str, prompts: list[list[int]], growing: "Iterator[list[Answer]]") -> None:
    """One line, when all are whole. The start is over when the first token is there."""
    first, startup = next(growing), timeline.THIS_PROCESS.startup()
    *_, answers = first, *growing
    results = [{"prompt_token_ids": ids} | answer.as_json() for ids, answer in zip(prompts, answers, strict=True)]
    print(json.dumps({"model": model, "results": results, "startup": startup.as_json()}), flush=True)
