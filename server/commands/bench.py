"""slipstream bench: a subcommand for each benchmark. Their code is imported when one runs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ...engine_impl.config import EngineConfig
from ...engine_impl.errors import RefusedError
from ..channel import PLAIN, ChannelConfig
from ..config import ServerConfig
from .ask import DEFAULT_TARGET

JsonFlag = Annotated[bool, tyro.conf.arg(name="json")]
Dtype = Literal["auto", "float32", "bfloat16"]
Platform = Literal["auto", "cpu", "tpu", "cuda"]
ACCURACY_MODES = ("float32", "int8", "int8x8", "int4-32", "int4-64", "int4-128", "kv8", "int8+kv8")


@dataclass(frozen=True, kw_only=True)
class BenchStep:
    """Time decode steps (ms), beside a baseline in turns. Comma lists sweep: every combination is one row.

    With --json the last line of stdout is one object; for a sweep it is {"sweep": [one object a row]}.
    """

    model: str = "embedded"
    """`embedded`, the path of a GGUF file, or a preset with random weights (llama-3.1-8b, llama-2-7b, ...)."""
    slots: str = "8"
    """Slots, all of them live (requests; a comma list sweeps)."""
    cache_length: str = "1024"
    """Cache length (tokens a slot; a comma list sweeps)."""
    live_tokens: str = "192"
    """Tokens that each slot holds, on average over a block of steps (tokens; a comma list sweeps)."""
    dtype: str = "auto"
    """auto, float32 or bfloat16 (a comma list sweeps)."""
    quantize_weights: str = "auto"
    """auto (as the checkpoint is), none, int8 or int4 (a comma list sweeps)."""
    quantize_kv: str = "none"
    """none or int8 (a comma list sweeps)."""
    versus: Literal["none", "eager", "eager-per-layer", "transformers", "transformers-dynamic"] = "none"
    """Time this baseline in turns (A B A B): the eager cache, stacked or an array a layer; Hugging Face transformers
    with a static or a dynamic cache (CPU)."""
    steps: int = 16
    """Steps of one block (steps)."""
    pairs: int = 5
    """Blocks of each of the two (blocks)."""
    threads: int | None = None
    """CPU cores that this process, baseline included, may use (cores). Default: all."""
    tensor_parallel: int | None = None
    """Devices that share the model (devices). Default: as `serve` chooses."""
    platform: Platform = "auto"
    """Devices to run on. `auto` takes a TPU or GPU where there is one, else the CPU."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        self._points(dict)  # refused before the slow import
        for name in ("steps", "pairs", "threads"):
            check_positive(name, getattr(self, name))

    def run(self) -> int:
        from ...benchmarks.step import Point, StepPlan, run

        plan = StepPlan(
            model=self.model,
            platform=self.platform,
            tensor_parallel=self.tensor_parallel,
            versus=self.versus,
            steps=self.steps,
            pairs=self.pairs,
            threads=self.threads,
        )
        return finish(run(plan, self._points(Point)), self.as_json)

    def _points(self, point: Callable[..., Any]) -> list[Any]:
        return [
            point(
                slots=slots, cache_length=cache_length, live_tokens=live_tokens, dtype=dtype,
                quantize_weights=quantize_weights, quantize_kv=quantize_kv,
            )
            for slots in integers("slots", self.slots)
            for cache_length in integers("cache_length", self.cache_length)
            for dtype in words("dtype", self.dtype, ("auto", "float32", "bfloat16"))
            for quantize_weights in words("quantize_weights", self.quantize_weights, ("auto", "none", "int8", "int4"))
            for quantize_kv in words("quantize_kv", self.quantize_kv, ("none", "int8"))
            for live_tokens in integers("live_tokens", self.live_tokens)
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchKernel:
    """Time decode attention and the flush alone (µs), beside other implementations that this backend runs."""

    slots: int = 8
    """Slots (requests)."""
    cache_length: int = 1024
    """Cache length (tokens a slot)."""
    live_tokens: str = "192"
    """Tokens that each slot holds (tokens; a comma list sweeps)."""
    layers: int = 30
    """Layers of the cache; attention is timed over all of them, as in a step (layers)."""
    heads: int = 9
    """Query heads (heads)."""
    kv_heads: int = 3
    """kv heads (heads)."""
    head_dim: int = 64
    """Size of a head (values)."""
    dtype: Dtype = "auto"
    """Type of q and the cache. `auto`: float32 on CPUs, else bfloat16."""
    repeats: int = 20
    """Calls that are timed (calls)."""
    platform: Platform = "auto"
    """Devices to run on."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        integers("live_tokens", self.live_tokens)
        for name in ("slots", "cache_length", "layers", "heads", "kv_heads", "head_dim", "repeats"):
            check_positive(name, getattr(self, name))

    def run(self) -> int:
        from ...benchmarks.kernel import KernelPlan, run

        plan = KernelPlan(
            slots=self.slots,
            cache_length=self.cache_length,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            repeats=self.repeats,
            platform=self.platform,
        )
        return finish(run(plan, integers("live_tokens", self.live_tokens)), self.as_json)


@dataclass(frozen=True, kw_only=True)
class BenchServe:
    """Load a running server over gRPC and report latencies (ms), tokens/s, goodput and refusals."""

    target: str = DEFAULT_TARGET
    """The server's address (host:port)."""
    pattern: Literal["closed", "poisson", "bursts"] = "closed"
    """closed: so many requests in flight, always. poisson, bursts: requests come at a rate, answered or not."""
    load: str = "1,4,8"
    """Requests in flight (closed) or requests a second (poisson, bursts); a comma list is run in turn."""
    requests: int = 64
    """Requests counted at each load (requests)."""
    warm_up: int = 8
    """Requests before them that are not counted (requests)."""
    burst_size: int = 8
    """Requests of one burst (requests); the bursts' starts are a Poisson process."""
    prompt_lengths: str = "fixed:128"
    """Prompt lengths (tokens): fixed:N, uniform:LOW:HIGH, sharegpt, or file:PATH (JSON: [[prompt, output], ...])."""
    output_lengths: str = "fixed:64"
    """Longest answers (tokens): likewise. A file gives both; name it in both places."""
    token_ids: str = "300:1000"
    """Prompts are drawn from these ids (LOW:HIGH, HIGH left out). The server counts a stop token as an end."""
    max_length: int | None = None
    """Prompt and answer together are cut to this (tokens); the server's --cache-length. Default: not cut."""
    seed: int = 0
    """Same seed, same requests at the same times (a number)."""
    slo_ttft_ms: float | None = None
    """Goodput counts a request only if its first token came within this (ms)."""
    slo_tpot_ms: float | None = None
    """Likewise its time per output token (ms)."""
    slo_e2e_ms: float | None = None
    """Likewise its whole answer (ms)."""
    timeout_s: float = 600.0
    """How long one request may take (seconds)."""
    plot: Path | None = None
    """Draw latency against load there (.svg or .png)."""
    channel: ChannelConfig = PLAIN
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        for load in numbers("load", self.load):
            if self.pattern == "closed" and load != int(load):
                raise RefusedError(
                    f"load={load} must be a whole number of requests in flight; or use --pattern poisson"
                )
        for name in ("requests", "burst_size"):
            check_positive(name, getattr(self, name))
        if self.warm_up < 0:
            raise RefusedError(f"warm_up={self.warm_up} must be 0 or more")

    def run(self) -> int:
        from ...benchmarks.serve import ServePlan, run

        plan = ServePlan(
            target=self.target,
            pattern=self.pattern,
            requests=self.requests,
            warm_up=self.warm_up,
            burst_size=self.burst_size,
            prompt_lengths=self.prompt_lengths,
            output_lengths=self.output_lengths,
            token_ids=self.token_ids,
            max_length=self.max_length,
            seed=self.seed,
            slo_ms={"ttft": self.slo_ttft_ms, "tpot": self.slo_tpot_ms, "e2e": self.slo_e2e_ms},
            timeout_s=self.timeout_s,
            channel=self.channel,
        )
        return finish(run(plan, numbers("load", self.load), self.plot), self.as_json)


@dataclass(frozen=True, kw_only=True)
class BenchGrowth:
    """How costs grow: a step with live tokens, cache length and slots, insert with its bucket, the host with slots."""

    model: str = "embedded"
    """`embedded`, the path of a GGUF file, or a preset with random weights."""
    cache_lengths: str = "1024,4096"
    """Cache lengths of the live-token curves (tokens; a comma list). The shortest is also the slot curve's."""
    live_tokens: str = "64,256,512,768,960"
    """Live tokens of each slot (tokens; a comma list); those beyond a cache are left out of its curve."""
    slots: str = "1,2,4,8,16,32"
    """Slots of the slot curve and of the host curve (requests; a comma list)."""
    base_slots: int = 8
    """Slots of the live-token curves (requests)."""
    steps: int = 8
    """Steps of one block (steps)."""
    blocks: int = 3
    """Blocks a point (blocks)."""
    threads: int | None = None
    """CPU cores that this process may use (cores). Default: all."""
    platform: Platform = "auto"
    """Devices to run on."""
    plot: Path | None = None
    """Draw the curves there (.svg or .png)."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        for name in ("cache_lengths", "live_tokens", "slots"):
            integers(name, getattr(self, name))
        for name in ("base_slots", "steps", "blocks", "threads"):
            check_positive(name, getattr(self, name))

    def run(self) -> int:
        from ...benchmarks.growth import GrowthPlan, run

        plan = GrowthPlan(
            model=self.model,
            cache_lengths=tuple(integers("cache_lengths", self.cache_lengths)),
            live_tokens=tuple(integers("live_tokens", self.live_tokens)),
            slots=tuple(integers("slots", self.slots)),
            base_slots=self.base_slots,
            steps=self.steps,
            blocks=self.blocks,
            threads=self.threads,
            platform=self.platform,
        )
        return finish(run(plan, self.plot), self.as_json)


@dataclass(frozen=True, kw_only=True)
class BenchSoak:
    """Thousands of mixed requests against a server in this process: answers, cancels, deadlines, cut connections,
    nonsense. Ends with status 1 if a slot, an answer or memory is lost.
    """

    model: str = "embedded"
    """`embedded` or the path of a model."""
    slots: int = 8
    """Slots (requests)."""
    cache_length: int = 256
    """Cache length (tokens a slot)."""
    requests: int = 3000
    """Requests in all (requests)."""
    in_flight: int = 42
    """Requests under way at any time (requests)."""
    max_queued: int = 32
    """Requests that may wait for a slot (requests); what is beyond is refused, which is part of the test."""
    max_seconds: float = 600.0
    """No request is sent after this (seconds)."""
    prompts: int = 12
    """Different prompts (prompts)."""
    prompt_tokens: int = 48
    """Longest prompt (tokens)."""
    answer_tokens: int = 24
    """Longest answer (tokens)."""
    token_ids: str = "300:1000"
    """Prompts are drawn from these ids (LOW:HIGH, HIGH left out)."""
    seed: int = 0
    """Same seed, same requests (a number)."""
    platform: Platform = "auto"
    """Devices to run on."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        for name in ("requests", "in_flight", "max_seconds", "prompts", "prompt_tokens", "answer_tokens"):
            check_positive(name, getattr(self, name))
        self._configs()

    def _configs(self) -> tuple[EngineConfig, ServerConfig]:
        engine = EngineConfig(
            model=self.model, slots=self.slots, cache_length=self.cache_length, platform=self.platform
        )
        return engine, ServerConfig(port=0, grace_s=1.0, max_queued=self.max_queued)

    def run(self) -> int:
        from ...benchmarks.hosted import hosted
        from ...benchmarks.soak import SoakPlan, run
        from ...benchmarks.workload import id_range
        from ...engine_impl.loading import load_engine

        engine, server = self._configs()
        plan = SoakPlan(
            requests=self.requests,
            in_flight=self.in_flight,
            max_seconds=self.max_seconds,
            prompts=self.prompts,
            prompt_tokens=self.prompt_tokens,
            answer_tokens=self.answer_tokens,
            ids=id_range(self.token_ids),
            seed=self.seed,
        )
        with hosted(*load_engine(engine), server) as serving:
            result = run(serving, plan)
        finish(result, self.as_json)
        return 1 if result["faults"] else 0


@dataclass(frozen=True, kw_only=True)
class BenchOverload:
    """What the server costs beside its bare engine, what ten times too many requests do to it, and how soon a
    cancelled slot is used again. The server runs in this process.
    """

    model: str = "embedded"
    """`embedded` or the path of a model."""
    slots: int = 8
    """Slots (requests)."""
    cache_length: int = 512
    """Cache length (tokens a slot)."""
    prompt_tokens: int = 64
    """Prompts (tokens)."""
    answer_tokens: int = 32
    """Longest answers under load (tokens)."""
    requests: int = 160
    """Requests at the usual load, and again at the overload (requests)."""
    factor: float = 10.0
    """Overload: so many times the rate that can be answered (a factor)."""
    max_queued: int = 8
    """Requests that may wait for a slot (requests)."""
    steps: int = 96
    """Decode steps of one block of the comparison with the bare engine (steps)."""
    pairs: int = 3
    """Blocks of each of the two (blocks)."""
    token_ids: str = "300:1000"
    """Prompts are drawn from these ids (LOW:HIGH, HIGH left out)."""
    seed: int = 0
    """Same seed, same requests at the same times (a number)."""
    platform: Platform = "auto"
    """Devices to run on."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "answer_tokens", "requests", "factor", "max_queued", "steps", "pairs"):
            check_positive(name, getattr(self, name))
        longest = self.prompt_tokens + self.steps + 2 * self.slots
        if longest > self._config().cache_length:
            raise RefusedError(
                f"cache_length={self.cache_length} must hold prompt_tokens + steps + 2 * slots = {longest} tokens"
            )

    def _config(self) -> EngineConfig:
        return EngineConfig(model=self.model, slots=self.slots, cache_length=self.cache_length, platform=self.platform)

    def run(self) -> int:
        from ...benchmarks.overload import OverloadPlan, run
        from ...benchmarks.workload import id_range
        from ...engine_impl.loading import load_engine

        plan = OverloadPlan(
            prompt_tokens=self.prompt_tokens,
            answer_tokens=self.answer_tokens,
            requests=self.requests,
            factor=self.factor,
            max_queued=self.max_queued,
            steps=self.steps,
            pairs=self.pairs,
            ids=id_range(self.token_ids),
            seed=self.seed,
        )
        return finish(run(*load_engine(self._config()), plan), self.as_json)


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


@dataclass(frozen=True, kw_only=True)
class BenchLoading:
    """Measure the host memory that loading takes beyond the weights (bytes); needs no model and no accelerator.

    A checkpoint with random weights is written and loaded, its weights stay in this process's memory.
    """

    shape: str = "llama-3.2-1b"
    """A preset of the Llama family (see `slipstream models`)."""
    stored: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type in the files."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type in memory."""
    loop: Literal["scan", "unrolled"] = "scan"
    """`scan` stacks the layers, as on TPUs; `unrolled` keeps an array for each, as on CPUs."""
    tensor_parallel: int = 1
    """Devices that share the weights (devices); the CPU is one, unless XLA_FLAGS makes more of it."""
    folder: Path | None = None
    """Where the checkpoint is written, and removed again (path). Default: where temporary files go."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def run(self) -> int:
        from ...benchmarks.loading import LoadingPlan, run

        fields = {name: value for name, value in vars(self).items() if name != "as_json"}
        return finish(run(LoadingPlan(**fields)), self.as_json)


@dataclass(frozen=True, kw_only=True)
class BenchJetStream:
    """JetStream's orchestrator beside ours: two servers on the same engine, the same load in turns (A B A B)."""

    model: str = "embedded"
    """`embedded` or a model that `serve` takes."""
    slots: int = 8
    """Slots (requests)."""
    cache_length: int = 256
    """Cache length (tokens a slot)."""
    in_flight: int = 8
    """Requests in flight, always (requests)."""
    requests: int = 32
    """Requests of one block (requests)."""
    prompt_tokens: int = 64
    """Length of every prompt (tokens)."""
    output_tokens: int = 32
    """Longest answer (tokens)."""
    pairs: int = 3
    """Blocks of each of the two (blocks)."""
    cancels: int = 3
    """Cancelled answers of each of the two (requests)."""
    cancelled_tokens: int = 128
    """Length of the answers of which one is cancelled (tokens)."""
    seed: int = 0
    """Same seed, same prompts (a number)."""
    timeout_s: float = 120.0
    """How long one request may take (seconds)."""
    platform: Platform = "auto"
    """Devices to run on."""
    as_json: JsonFlag = False
    """Print one JSON object as the last line of stdout."""

    def __post_init__(self) -> None:
        for name in ("in_flight", "requests", "prompt_tokens", "output_tokens", "pairs", "cancels", "cancelled_tokens"):
            check_positive(name, getattr(self, name))
        longest = self.prompt_tokens + max(self.output_tokens, self.cancelled_tokens)
        if longest > self._engine().cache_length:
            raise RefusedError(
                f"prompt and answer of {longest} tokens exceed cache_length={self.cache_length}; raise --cache-length"
            )

    def run(self) -> int:
        from ...benchmarks.jetstream import JetStreamPlan, run

        plan = JetStreamPlan(
            engine=self._engine(),
            in_flight=self.in_flight,
            requests=self.requests,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            pairs=self.pairs,
            cancels=self.cancels,
            cancelled_tokens=self.cancelled_tokens,
            seed=self.seed,
            timeout_s=self.timeout_s,
        )
        return finish(run(plan), self.as_json)

    def _engine(self) -> EngineConfig:
        return EngineConfig(model=self.model, slots=self.slots, cache_length=self.cache_length, platform=self.platform)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure: a decode step, a kernel, a server, the growth of costs, quantisation, an overload, a soak, JetStream."""

    what: (
        Annotated[BenchStep, tyro.conf.subcommand("step")]
        | Annotated[BenchKernel, tyro.conf.subcommand("kernel")]
        | Annotated[BenchServe, tyro.conf.subcommand("serve")]
        | Annotated[BenchGrowth, tyro.conf.subcommand("growth")]
        | Annotated[BenchAccuracy, tyro.conf.subcommand("accuracy")]
        | Annotated[BenchOverload, tyro.conf.subcommand("overload")]
        | Annotated[BenchSoak, tyro.conf.subcommand("soak")]
        | Annotated[BenchLoading, tyro.conf.subcommand("loading")]
        | Annotated[BenchJetStream, tyro.conf.subcommand("jetstream")]
    )

    def run(self) -> int:
        return self.what.run()


def finish(result: dict[str, Any], as_json: bool) -> int:
    """The benchmark has printed its table."""
    if as_json:
        print(json.dumps(result), flush=True)
    return 0


def check_positive(name: str, value: float | None) -> None:
    """Raises RefusedError unless it is None or above 0."""
    if value is not None and value <= 0:
        raise RefusedError(f"{name}={value} must be at least 1")


def integers(name: str, text: str) -> list[int]:
    """ "1,8" -> [1, 8], each at least 1. Raises RefusedError."""
    return [int(value) for value in numbers(name, text, kind=int)]


def numbers(name: str, text: str, kind: Callable[[str], float] = float) -> list[float]:
    """ "0.5,8" -> [0.5, 8.0], each above 0. Raises RefusedError."""
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        raise RefusedError(f"{name}={text!r} must be positive numbers with commas between them, such as 1,8,32")
    return values


def words(name: str, text: str, known: tuple[str, ...]) -> list[str]:
    """ "float32,bfloat16" -> a list. Raises RefusedError for a word that is not known."""
    values = text.split(",")
    if unknown := [value for value in values if value not in known]:
        raise RefusedError(f"{name}={unknown[0]!r} is not known; those that are: {', '.join(known)}")
    return values
