"""A PEFT folder is read whole and right, or refused by name."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from slipstream.engine_impl.adapters import peft_config
from slipstream.engine_impl.adapters.peft_folder import adapter_folder, read_adapter
from slipstream.engine_impl.adapters.sites import DOWN, UP, sites_of
from slipstream.engine_impl.adapters.stacks import AdapterPlaces
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.models import registry
from slipstream.engine_impl.runtime.workers import Workers
from slipstream.engine_impl.weights.load import needed_shapes
from slipstream.engine_impl.weights.sharding import make_mesh

from ..tiny_models import TINY

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "bias": "none",
    "lora_dropout": 0.1, "task_type": "CAUSAL_LM", "modules_to_save": None, "use_dora": False,
}  # fmt: skip
SHAPES = {"self_attn.q_proj": (128, 32), "mlp.down_proj": (32, 48)}


def tensors_of(rank=2, layers=(0, 1)):
    """A counts up from 1, B from 101."""
    tensors = {}
    for layer in layers:
        for path, (O, I) in SHAPES.items():
            module = f"base_model.model.model.layers.{layer}.{path}"
            tensors[f"{module}.lora_A.weight"] = 1 + np.arange(rank * I, dtype=np.float32).reshape(rank, I)
            tensors[f"{module}.lora_B.weight"] = 101 + np.arange(O * rank, dtype=np.float32).reshape(O, rank)
    return tensors


def written(folder: Path, tensors=None, **changes) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors_of() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def read(folder: Path, rank: int = 4, devices: int = 1):
    model = registry.build(TINY)
    mesh = make_mesh(jax.devices(), TINY.num_heads, TINY.num_kv_heads, devices)
    places = AdapterPlaces(sites_of(model, mesh), 2, 3, rank, mesh, jnp.dtype("float32"))
    return read_adapter(folder, model, needed_shapes(model, TINY.num_kv_heads), TINY.num_kv_heads, places)


def test_tensors_become_arrays_with_the_scale_in_b(tmp_path):
    adapter = read(written(tmp_path))
    assert adapter.rank == 2
    assert set(adapter.array) == {f"{path}.{part}" for path in SHAPES for part in (DOWN, UP)}
    for path in SHAPES:
        for layer in range(2):
            module = f"base_model.model.model.layers.{layer}.{path}"
            down, up = (tensors_of()[f"{module}.lora_{end}.weight"] for end in "AB")
            np.testing.assert_array_equal(adapter.array[f"{path}.{DOWN}"][layer], down)
            np.testing.assert_array_equal(adapter.array[f"{path}.{UP}"][layer], 3 * up)  # alpha / r
    assert adapter.bytes == sum(2 * 4 * 2 * (O + I) for O, I in SHAPES.values())


def test_patterns_of_whole_names_are_those_of_the_trained_model(tmp_path):
    """PEFT writes them with the prefix that the model had there, such as `model.`."""
    whole = "model.layers.1.self_attn.q_proj"
    tensors = {name: tensor for name, tensor in tensors_of().items() if "layers.0.mlp" not in name}
    for end, shape in (("A", (3, 32)), ("B", (128, 3))):
        tensors[f"base_model.model.{whole}.lora_{end}.weight"] = np.ones(shape, np.float32)
    changes = {"rank_pattern": {f"^{whole}": 3}, "alpha_pattern": {whole: 12}}
    adapter = read(written(tmp_path, tensors, exclude_modules=["model.layers.0.mlp.down_proj"], **changes))
    assert adapter.rank == 3
    assert (adapter.array[f"self_attn.q_proj.{UP}"][1] == 4).all()  # alpha / r
    assert not adapter.array[f"mlp.down_proj.{UP}"][0].any()


def test_expressions_are_matched_aside(tmp_path, monkeypatch):
    workers = Workers(1, seconds=0.3, memory_mib=64)
    monkeypatch.setattr(peft_config, "WORKERS", workers)
    adapter = read(written(tmp_path, target_modules=r".*\.(q|down)_proj"))
    assert set(adapter.array) == {f"{path}.{part}" for path in SHAPES for part in (DOWN, UP)}
    with pytest.raises(RefusedError, match=r"matching its patterns takes longer than 0.3 s; write them simpler"):
        read(written(tmp_path, target_modules=r"(.*.*.*.*.*.*)*x"))
    with pytest.raises(RefusedError, match=r"\(q_proj.* is no regular expression"):
        read(written(tmp_path, rank_pattern={"(q_proj": 2}))
    workers.close()


def test_half_precision_is_read(tmp_path):
    halved = {name: tensor.astype(np.float16) for name, tensor in tensors_of().items()}
    assert read(written(tmp_path, halved)).array[f"mlp.down_proj.{DOWN}"][1, 0, 0] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; only LORA"),
        ({"use_dora": True}, "use_dora=True, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"bias": "all"}, "bias='all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.w1"]}, "target_parameters"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
        ({"init_lora_weights": "pissa_niter_4"}, "the base's weights were changed too"),
        ({"of_tomorrow": 3}, "of_tomorrow=3, a field that is not known here"),
        ({"r": 0}, "ranks from 0 to 0"),
        ({"rank_pattern": {"q_proj": 129}}, "ranks from 2 to 129"),
        ({"r": "two"}, "one of another kind"),
        ({"r": float("inf")}, "one of another kind"),
        ({"rank_pattern": [3]}, "one of another kind"),
        ({"target_modules": None}, "one of another kind"),
        ({"target_modules": ["x"]}, "name none of its linear modules"),
        ({"target_modules": ["q_proj"]}, r"unexpected: layers.0.mlp.down_proj.lora_A, .*lora_B"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, r"missing: layers.0.mlp.up_proj.lora_A"),
        ({"layers_to_transform": [0]}, r"unexpected: layers.1.mlp.down_proj.lora_A"),
        ({"exclude_modules": ["q_proj"]}, r"unexpected: layers.0.self_attn.q_proj.lora_A"),
        ({"r": 3}, r"lora_A is \(2, 48\), the model needs \(3, 48\)"),
        ({"lora_alpha": float("nan")}, "q_proj has values that are NaN or infinite, or become so by the scale nan"),
        ({"lora_alpha": 7e38}, "infinite, or become so by the scale 3.5e"),
        ({"lora_alpha": 4e36}, "infinite, or become so by the scale 2e"),
        ({"r": 5}, "rank 5, at most 4 is served; serve with --max-adapter-rank 5"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, tmp_path):
    with pytest.raises(RefusedError, match=message):
        read(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("base_model.model.lm_head.lora_A.weight", np.ones((2, 32), np.float32), "unexpected: lm_head.lora_A"),
        ("base_model.model.model.norm.weight", np.ones(32, np.float32), "norm.weight, which is no lora_A or lora_B"),
        (
            "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight",
            np.full((32, 2), np.inf, np.float32),
            "layers.1.mlp.down_proj has values that are NaN or infinite",
        ),
        (
            "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight",
            np.ones((33, 2), np.float32),
            r"lora_B is \(33, 2\), the model needs \(32, 2\)",
        ),
    ],
)
def test_tensors_that_are_not_right_are_refused(name, tensor, message, tmp_path):
    with pytest.raises(RefusedError, match=message):
        read(written(tmp_path, tensors_of() | {name: tensor}))


def test_files_that_are_not_right_are_refused(tmp_path):
    with pytest.raises(RefusedError, match="'nowhere' does not exist; give a folder with"):
        adapter_folder("nowhere")
    with pytest.raises(RefusedError, match=r"adapter_config.json' cannot be read \(No such file"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(RefusedError, match="is no JSON"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(RefusedError, match="is no JSON"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(RefusedError, match=r"adapter_model\.bin is pickled"):
        read(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(RefusedError, match="no whole safetensors file"):
        read(tmp_path)


def test_shares_lie_as_the_bases_do():
    model = registry.build(TINY)
    sites = {site.path: site for site in sites_of(model, make_mesh(jax.devices(), 8, 4, 8))}
    assert sites["self_attn.q_proj"].spec(UP) == ("tensor", None)
    assert sites["self_attn.q_proj"].spec(DOWN) == (None, None)
    assert sites["self_attn.o_proj"].spec(UP) == (None, None)
    assert sites["self_attn.o_proj"].spec(DOWN) == (None, "tensor")
