"""What coarser numbers cost in accuracy and save in memory: each mode beside the same model in float32.

Every mode takes the same exam (exam.py): perplexity of a text by prefill and by decoding, the divergence of the next
token's distribution, and greedy answers. Prefill does not read the stored cache, so a quantised cache shows in what is
decoded alone. What a mode does not name is float32.
"""

import gc
import math
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from torch import nn

from ..engine_impl.checkpoints.contract import Checkpoint
from ..engine_impl.checkpoints.open import open_checkpoint
from ..engine_impl.config import EngineConfig
from ..engine_impl.engine import Engine
from ..engine_impl.forward import Params
from ..engine_impl.loading import build_engine, choose_devices
from ..engine_impl.models import registry
from ..engine_impl.models.parts import Linear
from ..engine_impl.quantization.linear import EncodedModule
from ..engine_impl.scoring import perplexity
from ..engine_impl.weights.load import HEAD, float_shapes
from . import exam
from .exam import Exam
from .measure import machine
from .measure.stats import percentile
from .measure.table import Progress, table
from .options.accuracy import MODES, AccuracyOptions, Mode

MIB = 2**20


class Paper(NamedTuple):
    """What one engine handed in."""

    prefilled: list[float]
    """the text's tokens' log-probabilities"""
    forced: list[float]
    """likewise, by decoding"""
    logprob_PBV: list[np.ndarray]
    """the reference's only: whole distributions, one array [B, V] a position"""
    kl: list[float]
    """KL(reference || this) of each of these distributions (nats)"""
    equal_top: float
    """share of them with the reference's likeliest token"""
    answer_BA: np.ndarray


def run(options: AccuracyOptions) -> dict[str, Any]:
    """Measure the modes one after another, one engine at a time.

    Raises RefusedError for a model that cannot be loaded or has no tokenizer.
    """
    progress, threads = Progress(), machine.use_threads(options.threads)
    choose_devices(options.platform)  # before anything else asks JAX for some
    checkpoint, reference, results = open_checkpoint(options.model), None, []
    for name in options.measured:
        progress.show(f"{options.model}: {name} ...")
        start = time.perf_counter()
        gc.collect()  # the engine before
        result, paper = measured(options, name, checkpoint, reference)
        reference = reference or paper
        results.append(result | {"seconds": round(time.perf_counter() - start, 1)})
    progress.clear()
    print(summary(options.model, results))
    return {"model": options.model, "modes": results} | machine.describe(threads)


def measured(
    options: AccuracyOptions, name: str, checkpoint: Checkpoint, reference: Paper | None
) -> tuple[dict[str, Any], Paper]:
    """One mode: (what the JSON says of it, what its engine handed in)."""
    mode, before = MODES[name], _live_bytes()
    config = EngineConfig(
        model=options.model, platform=options.platform, tensor_parallel=options.tensor_parallel,
        slots=exam.SLOTS, cache_length=exam.WINDOW, cache_tokens=exam.SLOTS * exam.WINDOW,
        quantize_exclude=_excluded(mode, checkpoint),
        **{"dtype": "float32", "quantize_weights": "none", **mode.options},
    )  # fmt: skip
    engine = build_engine(config, checkpoint)
    params = jax.block_until_ready(engine.parameters.load(checkpoint))
    gc.collect()
    weights_bytes = _live_bytes() - before
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.init_decode_state().cache))
    paper = taken(options, engine, params, reference)
    basis = reference or paper
    weights_theory, cache_theory = theory_bytes(engine), cache_theory_bytes(engine, config.quantize_kv)
    by_prefill = None if config.quantize_kv != "none" else perplexity(paper.prefilled)
    by_decode = perplexity(paper.forced)
    ratio = {
        "prefill": by_prefill and by_prefill / perplexity(basis.prefilled),
        "decode": by_decode / perplexity(basis.forced),
    }
    deciding = ratio["prefill"] or ratio["decode"]
    result = {
        "mode": name,
        "perplexity_prefill": by_prefill,
        "perplexity_decode": by_decode,
        "perplexity_ratio_prefill": ratio["prefill"],
        "perplexity_ratio_decode": ratio["decode"],
        "goal": mode.goal,
        "goal_met": None if mode.goal is None else deciding <= mode.goal,
        "prefilled_tokens": len(paper.prefilled),
        "decoded_tokens": len(paper.forced),
        "kl_mean": float(np.mean(paper.kl)),
        "kl_p99": percentile(paper.kl, 99),
        "equal_top": paper.equal_top,
        **agreement(basis.answer_BA, paper.answer_BA),
        "quantized_share": quantized_share(engine),
        "weights_bytes": weights_bytes,
        "weights_bytes_over_theory": weights_bytes / weights_theory,
        "cache_bytes": cache_bytes,
        "cache_bytes_over_theory": cache_bytes / cache_theory,
    }
    return result, paper


def taken(options: AccuracyOptions, engine: Engine, params: Params, reference: Paper | None) -> Paper:
    """The exam, by one engine."""
    questions = Exam.of(engine, options.tokens)
    forced, kept, kl, equal = [], [], [], []
    whole = iter(reference.logprob_PBV) if reference is not None else None
    for logprob_BV, token_B in questions.forced(engine, params):
        forced += np.asarray(logprob_BV[np.arange(len(token_B)), token_B]).tolist()
        if whole is None:
            kept.append(np.asarray(logprob_BV))
        of_reference_BV = logprob_BV if whole is None else next(whole)
        kl_B, equal_B = _compared(of_reference_BV, logprob_BV)
        kl += np.asarray(kl_B).tolist()
        equal += np.asarray(equal_B).tolist()
    prefilled = questions.prefilled(engine, params, options.tokens)
    return Paper(prefilled, forced, kept, kl, float(np.mean(equal)), questions.continued(engine, params))


@jax.jit
def _compared(expected_BV: jax.Array, logprob_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(KL(expected || this) of each row, whether the likeliest token is the same)."""
    kl_B = (jnp.exp(expected_BV) * (expected_BV - logprob_BV)).sum(-1)
    return kl_B, expected_BV.argmax(-1) == logprob_BV.argmax(-1)


def agreement(expected_BA: np.ndarray, answer_BA: np.ndarray) -> dict[str, float]:
    """How far answers agree: tokens before the first that differs (mean over answers), share of equal tokens."""
    equal_BA = expected_BA == answer_BA
    return {
        "equal_prefix_mean": float(np.cumprod(equal_BA, axis=1).sum(axis=1).mean()),
        "equal_share": float(equal_BA.mean()),
    }


def theory_bytes(engine: Engine) -> int:
    """Weights by arithmetic: n elements of a matrix of I inputs as int8 n + 4 n / I bytes, as int4 in blocks of b
    n / 2 + 2 s n / b, where s is the size of a float; as a checkpoint's own codes of c bits c n / 8 + g n / b, where g
    is the size of a block's scale and offset; all else s n, or 2 n of 16 bits."""
    bytes_there = 0
    for path, shape in _float_shapes(engine):
        part: Any = engine.model.get_submodule(path)
        count = math.prod(shape)
        kind, size = _kind(part), engine.layout.dtype.itemsize
        if kind == "int4":
            bytes_there += count // 2 + 2 * size * count // part.block
        elif kind == "int8":
            inputs = shape[1]  # of [O, I] and of experts, [E, I, O]
            bytes_there += count + 4 * count // inputs
        elif kind in ("4-bit", "8-bit", "float8"):
            grids = (1 + part.form.has_offset) * jnp.dtype(part.form.grid).itemsize
            bytes_there += count // (2 if kind == "4-bit" else 1) + grids * count // part.block
        else:
            bytes_there += count * (2 if kind in ("bfloat16", "float16") else size)
    return bytes_there


def cache_theory_bytes(engine: Engine, quantize_kv: str) -> int:
    """k and v, each H values a head and token: as floats, or as int8 with an f32 scale."""
    layout = engine.layout
    one = layout.head_dim + 4 if quantize_kv == "int8" else layout.head_dim * layout.dtype.itemsize
    return layout.layers * layout.slots * layout.kv_heads * layout.length * 2 * one


def quantized_share(engine: Engine) -> float:
    """Share of the parameters that are rounded to codes; a checkpoint's own codes are not rounded."""
    counts = [(engine.model.get_submodule(path), math.prod(shape)) for path, shape in _float_shapes(engine)]
    return sum(count for part, count in counts if _kind(part) in ("int8", "int4")) / sum(n for _, n in counts)


def _kind(part: Any) -> str:
    return part.kind if isinstance(part, EncodedModule) else "none"


def _float_shapes(engine: Engine) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(path of the module, shape) of each parameter; a tied head is none."""
    for name, shape in float_shapes(engine.model).items():
        if name != HEAD or not engine.model.config.tied_embeddings:
            yield name.rpartition(".")[0], shape


def _excluded(mode: Mode, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The modules that no block divides stay floats, as the engine's refusal advises."""
    block = mode.options.get("quantize_block", 1)
    default = EngineConfig().quantize_exclude
    linear = {n: part for n, part in registry.build(checkpoint.config).named_modules() if isinstance(part, Linear)}
    kinds = sorted({f"*.{n.split('.')[-1]}" for n, part in linear.items() if _is_split(n, part, block, default)})
    return (*default, *kinds)


def _is_split(name: str, part: nn.Linear, block: int, excluded: tuple[str, ...]) -> bool:
    return part.in_features % block != 0 and not any(fnmatch(name, pattern) for pattern in excluded)


def _live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def summary(model: str, results: list[dict[str, Any]]) -> str:
    """The results as a table, with what they share above it."""
    first = results[0]
    head = (
        f"{model}: perplexity over {first['prefilled_tokens']} prefilled and {first['decoded_tokens']} decoded tokens, "
        f"divergence over the latter, {exam.SLOTS} greedy answers of {exam.ANSWER} tokens"
    )
    headers = (
        "mode", "ppl prefill", "ratio", "ppl decode", "ratio", "goal", "KL mean", "KL p99", "top %", "equal prefix",
        "equal %", "codes %", "weights MiB", "/theory", "cache MiB", "/theory",
    )  # fmt: skip
    return f"{head}\n{table(headers, [_cells(result) for result in results])}"


def _cells(result: dict[str, Any]) -> list[object]:
    def percent(key: str) -> float:
        return round(100 * result[key], 1)

    goal = "" if result["goal"] is None else f"<= {result['goal']} {'met' if result['goal_met'] else 'MISSED'}"
    return [
        result["mode"], _fixed(result["perplexity_prefill"]), _fixed(result["perplexity_ratio_prefill"]),
        _fixed(result["perplexity_decode"]), _fixed(result["perplexity_ratio_decode"]), goal, result["kl_mean"],
        result["kl_p99"], percent("equal_top"), round(result["equal_prefix_mean"], 1), percent("equal_share"),
        percent("quantized_share"), result["weights_bytes"] / MIB, _fixed(result["weights_bytes_over_theory"]),
        result["cache_bytes"] / MIB, _fixed(result["cache_bytes_over_theory"]),
    ]  # fmt: skip


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
