"""An engine from its parts, made to fit: a config's layout, modules as it wants them, and programs over both."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from .. import kernels
from .adapters.sites import adapt, sites_of
from .adapters.stacks import AdapterPlaces
from .api import Sizes
from .caching import Drafting
from .checkpoints.contract import Compact
from .config import EngineConfig
from .draft_model import DraftModel, beside
from .drafting import of_long_repeats, of_text
from .engine import Engine
from .forward import LayerLoop, layer_loop_for
from .joined import join_products
from .layout import chunk_of, layout_of
from .models.decoder import Decoder
from .norms import swap_norms
from .parameters import Parameters
from .programs import Programs
from .quantization.panels import packs
from .quantization.swap import NOTHING_COMPACT, quantize
from .shapes import Shapes
from .text.tokenizer import Tokenizer


def assembled(
    model: Decoder,
    mesh: Mesh,
    config: EngineConfig,
    dtype: jnp.dtype,
    tokenizer: Tokenizer,
    model_name: str,
    kv_heads: int | None = None,
    draft: DraftModel | None = None,
    page_rows: int | None = None,
    compact: Mapping[str, Compact] = NOTHING_COMPACT,
    layer_loop: LayerLoop | None = None,
) -> Engine:
    """The engine of a model, without weights.

    `model` may be on the meta device; its kv heads must be a multiple of the mesh's size (see `loading`). Its linear
    modules are swapped here if the config asks for quantised weights, and adapted if it asks for adapters. Under a scan
    some products become one (joined.py).

    `kv_heads`: as checkpoints and adapters have them; default: the model's. `draft`: a draft model likewise, where the
    config speculates. `page_rows`: of pages that another engine has too; default: what suits the mesh. `compact`: see
    `Checkpoint.compact`. `layer_loop`: default: the platform's.

    Raises RefusedError for a cache or a chunk that is not whole pages.
    """
    platform = mesh.devices.flat[0].platform
    backend = kernels.backend_for(platform)
    layout = layout_of(config, model.config, mesh, dtype, page_rows)
    places, count = None, config.max_adapters
    sites = sites_of(model, mesh) if count else ()
    of_models = [model] if draft is None else [model, draft.model]
    layer_loop = layer_loop or layer_loop_for(platform, *of_models)
    quantize(model, config, dtype, mesh, backend, compact)
    if draft is not None:
        quantize(draft.model, draft.config, dtype, mesh, backend, draft.compact)
    if layer_loop == "scan":
        for one in of_models:
            join_products(one)
    adapt(model, sites)
    if packs(mesh, backend) and dtype == jnp.float32:
        for one in of_models:
            swap_norms(one, backend)
    if count:
        places = AdapterPlaces(sites, len(model.layers), count, config.max_adapter_rank, mesh, dtype)
    small, drafting = None, None
    if config.speculate != "off":
        drafting = Drafting(propose=of_text)
        if draft is not None:
            small = draft.model
            its = Programs(small, mesh, beside(layout, small.config, backend), backend, False)
            drafting = Drafting(propose=of_long_repeats, model=its)
    programs = Programs(model, mesh, layout, backend, count > 0, drafting=drafting)
    longest = min(config.max_prefill_length or programs.cache_length, programs.cache_length)
    return _engine_of(
        programs,
        Parameters(
            model=model,
            draft=small,
            mesh=mesh,
            dtype=dtype,
            layer_loop=layer_loop,
            kv_heads=kv_heads or model.config.num_kv_heads,
            places=places,
            kept_in=None if config.weight_cache is None else Path(config.weight_cache).expanduser(),
        ),
        Shapes(
            slots=layout.slots,
            pages_per_slot=layout.pages_per_slot,
            page_rows=layout.page_rows,
            chunk=chunk_of(config, layout, longest, platform),
            platform=platform,
            has_adapters=count > 0,
            has_reaches=programs.has_reaches,
            speculates=config.speculate != "off",
        ),
        longest,
        tokenizer,
        model_name,
    )


def twin(
    engine: Engine,
    programs: Programs | None = None,
    layer_loop: LayerLoop | None = None,
    shapes: Shapes | None = None,
) -> Engine:
    """An engine with other programs, another layer loop or other shapes, to be compared with it. With another layer
    loop the parameters have another form: load them anew."""
    return _engine_of(
        programs or engine.programs,
        replace(engine.parameters, layer_loop=layer_loop or engine.parameters.layer_loop),
        shapes or engine.shapes,
        engine.sizes.max_prefill_length,
        engine.get_tokenizer(),
        engine.model_name,
    )


def _engine_of(
    programs: Programs, parameters: Parameters, shapes: Shapes, longest: int, tokenizer: Tokenizer, model_name: str
) -> Engine:
    """Of parts that fit; `longest` of a prompt (tokens)."""
    layout = programs.layout
    sizes = Sizes(
        slots=layout.slots,
        cache_length=programs.cache_length,
        max_prefill_length=longest,
        prefill_chunk=shapes.chunk,
        prefill_batch=shapes.burst,
        prefill_lengths=shapes.lengths,
        skips_padding=any(getattr(part, "skips_padding", False) for part in programs.model.modules()),
        tokens_per_step=shapes.widths[-1],
        page_rows=layout.page_rows,
        pages=layout.pages,
        pages_per_slot=layout.pages_per_slot,
        table_entries=layout.table_entries,
        max_adapters=parameters.max_adapters,
        vocab_size=programs.model.config.vocab_size,
    )
    return Engine(programs, parameters, shapes, sizes, tokenizer, model_name)
