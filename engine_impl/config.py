"""How an engine is built: one frozen dataclass, checked once. Nothing heavy: the command line reads it first."""

from dataclasses import dataclass
from typing import Literal

from .errors import RefusedError

SMALLEST_BUCKET = 16


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The model, the shape of its decode batch and the devices it runs on."""

    model: str = "embedded"
    """`embedded` (SmolLM2-135M-Instruct, fetched on first use), a GGUF file, a folder with config.json and safetensors
    files, or a model of the Hugging Face hub (org/name, or org/name@revision)."""

    model_module: str | None = None
    """A Python module that registers a model family of your own (package.module), see docs/adding-a-model.md."""

    slots: int = 8
    """Requests decoded together (slots)."""

    cache_length: int = 1024
    """Prompt and answer of one request together (tokens); a multiple of 128."""

    max_prefill_length: int | None = None
    """Longest prompt (tokens), a power of two. Default: the largest one within the cache length."""

    tensor_parallel: int | None = None
    """Devices that share the model (devices). Default: the largest size that devices and head counts allow."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights, activations and cache. `auto`: float32 on CPUs, which multiply it faster, else bfloat16."""

    quantize_kv: Literal["none", "int8"] = "none"
    """Keys and values in the cache. `int8`: codes with a scale for each token and head, half of bfloat16's bytes."""

    platform: Literal["auto", "cpu", "tpu", "cuda"] = "auto"
    """Devices to run on. `auto` takes JAX_PLATFORMS if set, else a TPU or GPU where there is one, else the CPU."""

    quantize_weights: Literal["auto", "none", "int8", "int4"] = "auto"
    """Store weights as int8 (a scale for each output) or int4 (a scale and an offset for each block of inputs). `auto`:
    as the checkpoint does if it is AWQ, GPTQ or compressed-tensors, else `none`."""

    quantize_block: int | None = None
    """Inputs that share a scale with int4 (32, 64 or 128). Default: what the checkpoint's groups allow, else 32, which
    keeps the weights of Q4_0 and Q4_1 files as they are."""

    quantize_activations: Literal["none", "int8"] = "none"
    """With int8 weights: round activations to int8 too, which doubles the rate of multiplication on a TPU."""

    quantize_exclude: tuple[str, ...] = ("lm_head",)
    """Modules that keep their weights as they are, by patterns such as `*.down_proj`; in all layers alike."""

    def __post_init__(self) -> None:
        if self.quantize_block not in (None, 32, 64, 128):
            raise RefusedError(f"quantize_block={self.quantize_block} must be 32, 64 or 128")
        if self.quantize_activations != "none" and self.quantize_weights not in ("auto", "int8"):
            raise RefusedError(
                f"quantize_activations={self.quantize_activations!r} needs int8 weights; add --quantize-weights int8"
            )
        if self.slots < 1:
            raise RefusedError(f"slots={self.slots} must be at least 1")
        if self.cache_length < 128 or self.cache_length % 128:
            raise RefusedError(
                f"cache_length={self.cache_length} must be a multiple of 128; nearest: "
                f"{max(128, round(self.cache_length / 128) * 128)}"
            )
        longest = self.largest_bucket
        if longest < SMALLEST_BUCKET or longest & (longest - 1) or longest > self.cache_length:
            raise RefusedError(
                f"max_prefill_length={longest} must be a power of two from {SMALLEST_BUCKET} "
                f"to cache_length={self.cache_length}"
            )
        if self.tensor_parallel is not None and self.tensor_parallel < 1:
            raise RefusedError(f"tensor_parallel={self.tensor_parallel} must be at least 1")

    @property
    def largest_bucket(self) -> int:
        """Longest prompt (tokens)."""
        if self.max_prefill_length is not None:
            return self.max_prefill_length
        return 1 << (self.cache_length.bit_length() - 1)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Padded prompt lengths that prefill is compiled for (tokens): powers of two up to the largest bucket."""
        first, last = SMALLEST_BUCKET.bit_length() - 1, self.largest_bucket.bit_length() - 1
        return tuple(1 << power for power in range(first, last + 1))
