"""Milliseconds of a prompt until its first token is on the host, beside transformers' in turns.

A point is one choice of prompt length, dtype and quantisation. Every prompt is random tokens, in chunks of
which the last is padded, as in the server; what the padding costs is in the time and not in the operations counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from ..engine_impl.errors import RefusedError
from .baselines.prefillers import EnginePrefiller, Prefiller, TransformersPrefiller, in_turns, timed
from .baselines.xla import xla_twin
from .measure import machine
from .measure.datasheet import datasheet_flops
from .measure.flops import matmul_flops, prefill_flops
from .measure.models import Loaded, load
from .measure.stats import Ratio
from .measure.table import Progress, table
from .measure.traffic import stored_as, weights_dtype
from .measure.verdict import UNEQUAL_TOKENS, has_unequal_tokens
from .options.prefill import PrefillOptions, PrefillPoint


def run(options: PrefillOptions) -> dict[str, Any]:
    """Measure every point. One point gives one flat object, several give {"sweep": [one object each]}."""
    load_average, threads = machine.warn_if_busy(), machine.use_threads(options.threads)
    results = [result | {"load_average": load_average} for result in _results(options, threads)]
    print(summary(results))
    return results[0] if len(results) == 1 else {"sweep": results}


def _results(options: PrefillOptions, threads: int) -> Iterator[dict[str, Any]]:
    """Points that differ in their length alone share an engine."""
    progress = Progress()
    bench: PrefillBench | None = None
    loaded_for = None
    for point in options.points:
        if loaded_for != (key := (point.dtype, point.quantize_weights)):
            progress.show(f"{options.model}: loading for {key} ...")
            bench = None  # its memory goes first
            bench, loaded_for = PrefillBench(options, point), key
        assert bench is not None
        progress.show(f"{options.model}: {point.prompt_tokens} tokens ...")
        result = bench.measure(point) | machine.describe(threads)
        progress.clear()
        yield result


class PrefillBench:
    """A loaded model with its baseline, for prompts of any length."""

    def __init__(self, options: PrefillOptions, point: PrefillPoint) -> None:
        self._options, self._loaded = options, load(options.config(point))
        self._engine = self._loaded.engine
        self._prefillers: list[Prefiller] = [EnginePrefiller(self._engine, self._loaded.params)]
        if options.versus != "none":
            self._prefillers.append(baseline(options.versus, self._loaded))
        self._device = self._engine.mesh.devices.flat[0]
        self._matmul_flops = matmul_flops(self._device, self._engine.layout.dtype)

    def measure(self, point: PrefillPoint) -> dict[str, Any]:
        """All that the table and the JSON say of a point, but for the machine."""
        count = self._options.pairs * self._options.repeats
        prompts = (
            np.random.default_rng(0).integers(0, self._engine.sizes.vocab_size, (count, point.prompt_tokens)).tolist()
        )
        with machine.compiling_anew():
            first_ms = [timed(prefiller, prompts[:1]).ms[0] for prefiller in self._prefillers]
        blocks = in_turns(self._prefillers, prompts, pairs=self._options.pairs)
        ms = [ms for block in blocks[0] for ms in block.ms]
        p50 = float(np.median(ms))
        result = (
            {"model": self._options.model, **asdict(point)}
            | {
                "dtype": weights_dtype(self._engine),
                "quantize_weights": stored_as(self._engine),
                "prefill_chunk": self._engine.sizes.prefill_chunk,
                "compile_seconds": round(max(0.0, first_ms[0] - p50) / 1000, 3),
                "prefill_ms_p50": round(p50, 4),
                "prefill_ms_min": round(min(ms), 4),
                "prefill_ms_max": round(max(ms), 4),
                "tokens_per_second": round(point.prompt_tokens * 1000 / p50, 2),
                "prefills_timed": len(ms),
                "layer_loop": self._engine.parameters.layer_loop,
            }
            | self._rates(prefill_flops(self._loaded.checkpoint.config, point.prompt_tokens), p50 / 1000)
        )
        if self._options.versus == "none":
            return result
        ours, theirs = blocks
        return (
            result
            | Ratio.of([block.ms for block in ours], [block.ms for block in theirs]).json()
            | {
                "versus": self._options.versus,
                "baseline_prefill_ms_p50": round(float(np.median([ms for block in theirs for ms in block.ms])), 4),
                "equal_tokens": [block.tokens for block in ours] == [block.tokens for block in theirs],
            }
        )

    def _rates(self, flops: int, seconds: float) -> dict[str, Any]:
        """Operations a second, and what share they are of a matrix product's and of the maker's number."""
        devices = len(list(self._engine.mesh.devices.flat))
        chips = 1 if self._device.platform == "cpu" else devices  # virtual CPU devices share the cores
        measured = self._matmul_flops * chips
        datasheet = datasheet_flops(self._device, self._engine.layout.dtype)
        return {
            "flops": flops,
            "flops_per_second": round(flops / seconds),
            "matmul_flops_per_second": round(measured),
            "mfu": round(flops / seconds / measured, 4),
            "datasheet_flops_per_second": datasheet and datasheet * chips,
            "mfu_datasheet": datasheet and round(flops / seconds / (datasheet * chips), 4),
            "chips": devices,
        }


def baseline(versus: Literal["transformers", "xla"], loaded: Loaded) -> Prefiller:
    """Another way to prefill the same weights. Raises RefusedError where the engine does not run on a CPU, and as
    `xla_twin` does."""
    if versus == "xla":
        return EnginePrefiller(*xla_twin(loaded.engine, loaded.params))
    if loaded.engine.mesh.devices.flat[0].platform != "cpu":
        raise RefusedError("versus='transformers' is compared on CPUs only; use --platform cpu")
    from .baselines.huggingface import transformers_model

    return TransformersPrefiller(transformers_model(loaded.checkpoint, weights_dtype(loaded.engine)))


def summary(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table, with what they share above it."""
    first = results[0]
    peak = first["datasheet_flops_per_second"]
    head = (
        f"{first['model']} on {first['devices']} x {first['device']} ({first['cpu']}), threads={first['threads']}, "
        f"matrix products {first['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s, "
        + (f"datasheet {peak / 1e9:.0f} GFLOP/s" if peak else "no datasheet peak for this device and type")
    )
    columns = {
        "prompt_tokens": "tokens", "prefill_chunk": "chunk", "dtype": "dtype", "quantize_weights": "weights",
        "compile_seconds": "compile s", "prefill_ms_p50": "p50 ms", "prefill_ms_min": "min ms",
        "prefill_ms_max": "max ms", "tokens_per_second": "tokens/s", "flops": "GFLOP", "mfu": "MFU",
        "mfu_datasheet": "of datasheet",
    }  # fmt: skip
    if "versus" in first:
        columns |= {
            "baseline_prefill_ms_p50": f"{first['versus']} ms", "ratio_p50": "ratio", "ratio_min": "min",
            "ratio_max": "max", "equal_tokens": "equal tokens",
        }  # fmt: skip
    rows = [[(r | {"flops": r["flops"] / 1e9})[key] for key in columns] for r in results]
    lines = [head, table(list(columns.values()), rows)]
    if any(has_unequal_tokens(result) for result in results):
        lines.append(UNEQUAL_TOKENS)
    return "\n".join(lines)
