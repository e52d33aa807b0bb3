"""An engine beside the model of Hugging Face transformers whose checkpoint it loaded."""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from slipstream.engine_impl.assembly import assembled
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.engine import Engine
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.weights.sharding import make_mesh

from ..tiny_models import logits_behind


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
    as_on_tpus = devices > 1 and len(set(model.module_of_layer)) == 1
    loop = "scan" if as_on_tpus else "unrolled"  # a layer's window and rope are selected by its number
    engine = assembled(model, mesh, config, jnp.dtype("float32"), tokenizer, "tiny", layer_loop=loop)
    return engine, engine.parameters.load(checkpoint)


PROMPTS = [[(7 * i * i + 3 * i) % 101 for i in range(n)] for n in (120, 131)]
"""The second one is computed in two pieces: the last tokens' windows reach back into the first. Both are of two shapes
together, each of which costs two programs."""


GIVEN = [(5 * i * i + 2 * i + 3) % 101 for i in range(32)]
"""What stands behind each prompt: any tokens do, as each one's log-probability has all logits in it. What chooses
tokens is one for all families, and takes the compiler longer than the layers."""


def assert_equal(reference: Any, engine: Engine, params: Any) -> None:
    """Logits behind both prompts, steps that go on from there, and logits where a text goes on behind prompt and
    beginning."""
    session = Session(engine, params)
    logits = [reference_logits(reference, prompt + GIVEN)[len(prompt) - 1 :] for prompt in PROMPTS]
    for slot, (prompt, logits_TV) in enumerate(zip(PROMPTS, logits, strict=True)):
        np.testing.assert_allclose(logits_behind(engine, params, prompt + GIVEN[:9]), logits_TV[9], atol=1e-4)
        prefix = session.prefilled(slot, prompt)
        np.testing.assert_allclose(np.asarray(prefix.logits_NV)[0], logits_TV[0], atol=1e-4)
        assert len(set(logits_TV.argmax(-1).tolist())) >= 5  # a model that repeats itself would prove little
        session.insert(engine.force(prefix, GIVEN[:1]), slot)
    assert_steps_equal(session, logits)


def assert_steps_equal(session: Session, logits: list[np.ndarray], atol: float = 1e-4) -> None:
    """What steps say of each given token is what its logits_TV do: those of a slot, behind its prompt and behind each
    of the tokens. The first of these is each slot's last."""
    given = GIVEN[1 : len(logits[0]) - 1]
    told = np.array([session.score([token] * len(logits)) for token in given])
    for slot, logits_TV in enumerate(logits):
        logprob_TV = torch.log_softmax(torch.from_numpy(logits_TV[1:-1]), dim=-1).numpy()
        np.testing.assert_allclose(told[:, slot], logprob_TV[np.arange(len(given)), given], atol=atol)


def reference_logits(model, token_ids):
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()
