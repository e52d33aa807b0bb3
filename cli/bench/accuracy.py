"""slipstream bench accuracy: what quantisation costs."""

from dataclasses import dataclass

from .flags import JsonFlag, Platform, check_positive, finish, words

ACCURACY_MODES = ("float32", "int8", "int8x8", "int4-32", "int4-64", "int4-128", "kv8", "int8+kv8")


@dataclass(frozen=True, kw_only=True)
class BenchAccuracy:
    """Measure what quantisation costs (perplexity, divergence, greedy answers) and saves (bytes), beside float32.

    The text comes with CPython. One engine is loaded at a time.
    """

    model: str = "embedded"
    """`embedded` or a checkpoint that `serve` takes."""
    modes: str = "int8,int8x8,int4-32,int4-64,int4-128,kv8,int8+kv8"
    """What is measured beside float32 (a comma list): int8 and int4-BLOCK are weights, int8x8 rounds activations too,
    kv8 is the cache."""
    tokens: int = 4096
    """Tokens of the text whose perplexity is measured by prefill (tokens); 1024 are decoded in any case."""
    threads: int | None = None
    """CPU cores that this process may use (cores). Default: all."""
    tensor_parallel: int | None = None
    """Devices that share the model (devices). Default: as `serve` chooses."""
    platform: Platform = "auto"
    """Devices to run on."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        words("modes", self.modes, ACCURACY_MODES)  # refused before the slow import
        for name in ("tokens", "threads"):
            check_positive(name, getattr(self, name))

    def run(self) -> int:
        from ...benchmarks.accuracy import AccuracyPlan, run

        plan = AccuracyPlan(
            model=self.model,
            modes=tuple(words("modes", self.modes, ACCURACY_MODES)),
            tokens=self.tokens,
            tensor_parallel=self.tensor_parallel,
            platform=self.platform,
            threads=self.threads,
        )
        return finish(run(plan), self.as_json)
