"""Flags that several benchmarks have, and how their words are read."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg

from ...engine_impl.config import EngineConfig
from ...engine_impl.errors import RefusedError

DTYPES = ("auto", "float32", "bfloat16")
QUANTIZE_WEIGHTS = ("auto", "none", "int8", "int4")

Json = Annotated[bool, arg(name="json", help="Print one JSON object as the last line of stdout.")]
PlatformName = Literal["auto", "cpu", "tpu", "cuda"]
Platform = Annotated[
    PlatformName,
    arg(help="Devices to run on. `auto` takes a TPU or GPU where there is one, else the CPU."),
]
Dtype = Literal["auto", "float32", "bfloat16"]
Model = Annotated[
    str,
    arg(
        help="`embedded`, a checkpoint that `serve` takes, or a preset with random weights (llama-3.1-8b, llama-2-7b, "
        "...)."
    ),
]
ServedModel = Annotated[str, arg(help="`embedded` or a checkpoint that `serve` takes.")]
Slots = Annotated[int, arg(help="Slots (requests).")]
CacheLength = Annotated[int, arg(help="Cache length (tokens per slot).")]
Pairs = Annotated[int, arg(help="Blocks of each of the two (blocks).")]
Threads = Annotated[
    int | None, arg(help="CPU cores that this process may use, a baseline included (cores). Default: all.")
]
TensorParallel = Annotated[int | None, arg(help="Devices that share the model (devices). Default: as `serve` chooses.")]
TokenIds = Annotated[str, arg(help="Prompts are drawn from these ids (LOW:HIGH, HIGH left out).")]
MaxQueued = Annotated[
    int, arg(help="Requests that may wait for a slot (requests); what is beyond is refused, which is part of the test.")
]
Seed = Annotated[int, arg(help="Same seed, same requests at the same times (a number).")]

OF_THE_OUTPUT = ("as_json", "plot")
"""Flags that say where a result goes, not what is measured."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What `step` and `prefill` have in common: a model of several types, timed in turns with a baseline."""

    model: Model = "embedded"
    dtype: Annotated[str, arg(help="auto, float32 or bfloat16 (a comma list sweeps).")] = "auto"
    quantize_weights: Annotated[
        str, arg(help="auto (as the checkpoint is), none, int8 or int4 (a comma list sweeps).")
    ] = "auto"
    pairs: Pairs = 5
    threads: Threads = None
    tensor_parallel: TensorParallel = None
    platform: Platform = "auto"

    def weights(self) -> list[tuple[Any, Any]]:
        """Each (dtype, quantize_weights) of the sweep. Raises RefusedError for one that is not known."""
        return [
            (dtype, quantize_weights)
            for dtype in words("dtype", self.dtype, DTYPES)
            for quantize_weights in words("quantize_weights", self.quantize_weights, QUANTIZE_WEIGHTS)
        ]


@dataclass(frozen=True, kw_only=True)
class Hosted:
    """What benchmarks of a server have in common: the engine that it serves."""

    model: ServedModel = "embedded"
    slots: Slots = 8
    cache_length: CacheLength = 256
    platform: Platform = "auto"

    @property
    def engine(self) -> EngineConfig:
        """Raises RefusedError for sizes that no engine has."""
        return EngineConfig(model=self.model, slots=self.slots, cache_length=self.cache_length, platform=self.platform)


def facts(options: Any) -> dict[str, Any]:
    """The flags for a result's JSON, without those that say where it goes."""
    return {name: value for name, value in asdict(options).items() if name not in OF_THE_OUTPUT}


def check_positive(options: object, *names: str) -> None:
    """Raises RefusedError unless each of these flags is None or above 0."""
    for name in names:
        value = getattr(options, name)
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


def words(name: str, text: str, known: tuple[str, ...]) -> list[Any]:
    """ "float32,bfloat16" -> a list. Raises RefusedError for a word that is not known."""
    values = text.split(",")
    if unknown := [value for value in values if value not in known]:
        raise RefusedError(f"{name}={unknown[0]!r} is not known; those that are: {', '.join(known)}")
    return values


def id_range(text: str) -> tuple[int, int]:
    """ "300:1000" -> (300, 1000). Raises RefusedError."""
    low, _, high = text.partition(":")
    if low.isdecimal() and high.isdecimal() and int(low) < int(high):
        return int(low), int(high)
    raise RefusedError(f"token_ids={text!r} must be LOW:HIGH, the lowest id and one above the highest")
