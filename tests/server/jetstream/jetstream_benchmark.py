"""JetStream's own benchmark client, its code as it was released: run this file with TARGET as its argument.

Prints its result and every answer as JSON in its last line. A process of its own: the client is a script in a package
called `benchmarks`, and imports pandas, nltk and evaluate for datasets and scores that are not used here.
"""

import asyncio
import importlib
import json
import sys
from types import ModuleType


def stand_ins() -> dict[str, ModuleType]:
    """Packages that it imports and does not use."""
    members = {
        "pandas": {},
        "eval_accuracy": {"eval_accuracy": None},
        "seqio": {},
        "seqio.vocabularies": {"SentencePieceVocabulary": object, "Vocabulary": object},
    }
    modules = {name: ModuleType(name) for name in members}
    for name, module in modules.items():
        vars(module).update(members[name])
    return modules


class Ascii:
    """A tokenizer on the client's side: one token a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("ascii")


def main(target: str, prompts: list[str], output_len: int) -> None:
    """Its `benchmark`, all prompts at once."""
    sys.modules.update(stand_ins())
    sys.path.pop(0)  # this file's folder
    benchmark_serving = importlib.import_module("benchmarks.benchmark_serving")
    requests = [
        benchmark_serving.InputRequest(prompt=prompt, prompt_len=len(prompt), output_len=output_len)
        for prompt in prompts
    ]
    result, outputs = asyncio.run(
        benchmark_serving.benchmark(
            api_url=target,
            tokenizer=Ascii(),
            input_requests=requests,
            request_rate=float("inf"),
            disable_tqdm=True,
            session_cache="cache",
            priority=7,
        )
    )
    answers = {output.input_request.prompt: output.generated_text for output in outputs}
    print(json.dumps({"result": result, "answers": answers}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]))
