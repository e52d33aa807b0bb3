"""Adapters that PEFT wrote, and what PEFT says of them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = ("all", "rslora", "patterns")
PLACES: dict[str, Any] = {"max_adapters": 3, "max_adapter_rank": 8}


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of the matrices of attention and feed-forward; no experts, no routers."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    return sorted(name for name in names if name.endswith("_proj"))


def with_adapters(model: Any) -> Any:
    """The model with three adapters, which differ in what they change, in rank and in scale."""
    import peft

    linear = linear_names(model)
    configs = {
        "all": {"r": 4, "lora_alpha": 6, "target_modules": linear},
        "rslora": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": linear[:1]},
        "patterns": {
            "r": 2, "lora_alpha": 5, "target_modules": linear, "layers_to_transform": [1],
            "rank_pattern": {linear[0]: 6}, "alpha_pattern": {f"layers.1.*.{linear[-1]}": 9},
        },
    }  # fmt: skip
    first, *others = (peft.LoraConfig(**config, init_lora_weights=False) for config in configs.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
        adapted = peft.get_peft_model(model, first, adapter_name=NAMES[0])
    for name, config in zip(NAMES[1:], others, strict=True):
        adapted.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[1] ** 0.5)
    return adapted.eval()


def saved(adapted: Any, root: Path) -> dict[str, Path]:
    """Each adapter's folder."""
    adapted.save_pretrained(root)
    return {name: root / name for name in NAMES}


@contextmanager
def merged(adapted: Any, name: str | None) -> Iterator[Any]:
    """The base with the adapter in its weights; None: the base alone."""
    if name is None:
        with adapted.disable_adapter():
            yield adapted
        return
    adapted.set_adapter(name)  # what it leaves alone would keep another one's term
    adapted.merge_adapter([name])
    try:
        yield adapted
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of modules that this adapter leaves alone
            adapted.unmerge_adapter()


def peft_logits(adapted: Any, name: str | None, token_ids: list[int]) -> np.ndarray:
    """logits_TV of PEFT's own merged model."""
    with merged(adapted, name) as model, torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()
