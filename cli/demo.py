"""slipstream demo: a real server, a real question, a clean stop."""

import signal
import time
from dataclasses import dataclass

from ..engine_impl.config import EngineConfig
from ..server.child import STOP_S, server
from ..server.request.options import AnswerOptions
from .conversation import ALONE

QUESTION = "What is the capital of France, and what is it known for?"


@dataclass(frozen=True)
class Demo:
    """Start a server, ask it a question over gRPC, show the answer and its speed, stop the server."""

    engine: EngineConfig
    answer: AnswerOptions
    question: str = QUESTION
    """What to ask (text)."""

    def __post_init__(self) -> None:
        self.answer.check_one_sample("the demo")

    def run(self) -> int:
        print("Starting `slipstream serve` on a free port; it loads the model and compiles it ...", flush=True)
        start = time.perf_counter()
        with server(self.engine) as (process, target, log):
            print(f"SERVING on {target} after {time.perf_counter() - start:.1f} s\n\n> {self.question}\n", flush=True)
            with log.held:
                self._ask(target)
            process.send_signal(signal.SIGTERM)
            status = process.wait(STOP_S)
        print(f"\nThe server stopped with status {status}.", flush=True)
        return 1 if status else 0

    def _ask(self, target: str) -> None:
        from ..server.grpc.client import Client

        arrivals, tokens = [], 0
        with Client(target) as client:
            start = time.perf_counter()
            question = ALONE.call([ALONE.question(self.question)])
            for piece in client.ask_chat(question, self.answer):
                if piece.token_ids:
                    arrivals.append(time.perf_counter())
                    tokens += len(piece.token_ids)
                print(piece.text, end="", flush=True)
        print(f"\n\n{speed(start, arrivals, tokens)}", flush=True)


def speed(start: float, arrivals: list[float], tokens: int) -> str:
    """One line; the clock is the client's (s)."""
    if not arrivals:
        return "no tokens"
    line = f"{tokens} tokens · TTFT {(arrivals[0] - start) * 1000:.0f} ms"
    if tokens > 1 and arrivals[-1] > arrivals[0]:
        per_token = (arrivals[-1] - arrivals[0]) / (tokens - 1)
        line += f" · {per_token * 1000:.1f} ms per token · {1 / per_token:.1f} tokens/s"
    return line
