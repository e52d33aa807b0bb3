"""How an engine is built: one frozen dataclass, checked once. Nothing heavy: the command line reads it first."""

from dataclasses import dataclass
from typing import Literal

from .errors import RefusedError

TILE = 128
"""The cache's rows are a multiple of it (tokens)."""
MAX_RANK = 128
"""Of adapters."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The model, the shape of its decode batch and the devices it runs on."""

    model: str = "embedded"
    """`embedded` (SmolLM2-135M-Instruct, fetched on first use), a GGUF file, a folder with config.json and safetensors
    files, a model of the Hugging Face hub (org/name, or org/name@revision), or gs://bucket/path."""

    model_module: str | None = None
    """A Python module that registers a model family of your own (package.module), see docs/adding-a-model.md."""

    slots: int | None = None
    """Requests decoded together (slots). Default: 8 on CPUs, else 256, or as many as the step's memory allows."""

    cache_length: int | None = None
    """Prompt and answer of one request together (tokens); a multiple of 128. Default: what the model was trained for,
    at most 1024 on CPUs."""

    cache_tokens: int | None = None
    """Tokens of all requests together that the cache holds; a multiple of its pages' rows. Default: on CPUs what all
    slots can hold, at most a quarter of the free memory, and what the weights leave of it; else what weights and
    programs leave."""

    max_prefill_length: int | None = None
    """Longest prompt (tokens), at most the cache length, which is the default."""

    prefill_chunk: int | None = None
    """Tokens of a prompt that are computed between two steps (tokens); a multiple of the cache's pages' rows. Default:
    256 on CPUs, else 512, rounded up to whole pages; at most the longest prompt."""

    tensor_parallel: int | None = None
    """Devices that share the model (devices). Default: the largest size that devices and head counts allow."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights, activations and cache; on CPUs with native kernels of the weights and of what is multiplied with
    them, while sums, attention and cache are float32. `auto`: float32 on CPUs, else bfloat16."""

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

    weight_cache: str | None = None
    """A folder on a local disk that keeps loaded weights in the form in which the devices have them, quantised: the
    second start reads only those (path). Default: none are kept."""

    max_adapters: int = 0
    """LoRA adapters that the devices hold at once, for requests that name one (count). 0: none are served."""

    max_adapter_rank: int = 16
    """The largest rank of an adapter, which each one's place on the devices has room for (1 to 128)."""

    speculate: Literal["off", "auto"] = "off"
    """Several tokens a step. Drafts of what comes are what followed a text's last tokens where they stood before, a
    request's prediction, and what a draft model says; a step tells which of them are right. They change no answer.
    `auto`: as many a step as those of late and the steps' times make worth it."""

    draft_model: str | None = None
    """A small model of the same tokenizer that drafts too, named as `model` is; it has a cache of its own in the same
    pages. Needs `speculate`."""

    def __post_init__(self) -> None:
        if self.draft_model is not None and self.speculate == "off":
            raise RefusedError(
                f"draft_model={self.draft_model!r} drafts nothing with speculate='off'; add --speculate auto"
            )
        if self.max_adapters < 0:
            raise RefusedError(f"max_adapters={self.max_adapters} must be 0 (none) or more")
        if not 1 <= self.max_adapter_rank <= MAX_RANK:
            raise RefusedError(f"max_adapter_rank={self.max_adapter_rank} must be from 1 to {MAX_RANK}")
        if self.quantize_block not in (None, 32, 64, 128):
            raise RefusedError(f"quantize_block={self.quantize_block} must be 32, 64 or 128")
        if self.quantize_activations != "none" and self.quantize_weights not in ("auto", "int8"):
            raise RefusedError(
                f"quantize_activations={self.quantize_activations!r} needs int8 weights; add --quantize-weights int8"
            )
        if self.slots is not None and self.slots < 1:
            raise RefusedError(f"slots={self.slots} must be at least 1")
        length, longest = self.cache_length, self.max_prefill_length
        if length is not None and (length < TILE or length % TILE):
            raise RefusedError(
                f"cache_length={length} must be a multiple of {TILE}; nearest: {max(TILE, round(length / TILE) * TILE)}"
            )
        if longest is not None and (longest < 1 or (length is not None and longest > length)):
            at_most = "the cache length" if length is None else f"cache_length={length}"
            raise RefusedError(f"max_prefill_length={longest} must be from 1 to {at_most}")
        for name, tokens in {"cache_tokens": self.cache_tokens, "prefill_chunk": self.prefill_chunk}.items():
            if tokens is not None:
                check_whole(name, tokens, TILE, "pages have whole tiles of rows")
        if self.tensor_parallel is not None and self.tensor_parallel < 1:
            raise RefusedError(f"tensor_parallel={self.tensor_parallel} must be at least 1")

    @property
    def chosen(self) -> tuple[int, int, int]:
        """(slots, cache length, the cache's tokens). Raises ValueError where one was left out and `sizes.sized` has not
        filled it in."""
        if self.slots is None or self.cache_length is None or self.cache_tokens is None:
            raise ValueError(
                f"{self.slots=}, {self.cache_length=} and {self.cache_tokens=} are not all chosen yet; sizes.sized() "
                "does it"
            )
        return self.slots, self.cache_length, self.cache_tokens


def check_whole(name: str, tokens: int, rows: int, why: str) -> None:
    """Raises RefusedError for tokens that are no multiple of `rows`, with the nearest that are."""
    if tokens < rows or tokens % rows:
        below = max(0, tokens) // rows * rows
        nearest = f"{below} and {below + rows}" if below else f"{rows}"
        raise RefusedError(f"{name}={tokens} must be a multiple of {rows} ({why}); nearest: {nearest}")
