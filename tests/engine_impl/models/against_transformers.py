"""An engine beside the model of Hugging Face transformers whose checkpoint it loaded."""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from slipstream.engine_impl.assembly import assembled, twin
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.weights.sharding import make_mesh

from ..tiny_models import greedy, logits_behind


def draw_weights(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.2 * drawn)
            elif parameter.dim() == 1:
                parameter.copy_(drawn)
            else:
                parameter.copy_(drawn * (0.3 if "embed" in name or "wte" in name else 2) / parameter.shape[-1] ** 0.5)


def load(folder, devices, cache_length=256, speculate: Literal["off", "auto"] = "off"):
    checkpoint = SafetensorsCheckpoint(folder)
    mesh = make_mesh(jax.devices(), checkpoint.config.num_heads, checkpoint.config.num_kv_heads, devices)
    model = registry.build(replace(checkpoint.config, num_kv_heads=max(checkpoint.config.num_kv_heads, mesh.size)))
    config = EngineConfig(
        slots=2,
        cache_length=cache_length,
        cache_tokens=2 * cache_length,
        prefill_chunk=128,
        speculate=speculate,
    )
    tokenizer: Any = None
    engine = assembled(model, mesh, config, jnp.dtype("float32"), tokenizer, "tiny")
    if devices > 1 and len(set(model.module_of_layer)) == 1:
        engine = twin(engine, layer_loop="scan")  # as on TPUs: a layer's window and rope are selected by its number
    return engine, engine.parameters.load(checkpoint)


PROMPTS = [[(7 * i * i + 3 * i) % 101 for i in range(n)] for n in (120, 131)]
"""The second one is computed in two pieces: the last tokens' windows reach back into the first. Both are of two shapes
together, each of which costs three programs."""


def assert_equal(reference: Any, engine: Engine, params: Any) -> None:
    """Logits behind both prompts, then 32 greedy tokens, each what transformers would say after the same text, and the
    same where an answer goes on behind prompt and beginning."""
    answers = greedy(engine, params, PROMPTS, 32)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = reference_logits(reference, prompt + answer[:-1])[len(prompt) - 1 :]
        logits_V = logits_behind(engine, params, prompt)
        np.testing.assert_allclose(logits_V, expected[0], atol=1e-4)
        assert expected.argmax(-1).tolist() == answer
        assert len(set(answer)) >= 5  # a model that repeats itself would prove little
    texts = [prompt + answer[:9] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    assert greedy(engine, params, texts, 23) == [answer[9:] for answer in answers]


def reference_logits(model, token_ids):
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()
