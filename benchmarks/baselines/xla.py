"""The engine as it runs on a CPU without native kernels: XLA's own products and attention, on the same weights."""

from ...engine_impl import bridge
from ...engine_impl.assembly import twin
from ...engine_impl.engine import Engine
from ...engine_impl.errors import RefusedError
from ...engine_impl.forward import Params
from ...engine_impl.models import registry
from ...engine_impl.programs import Programs
from ...engine_impl.quantization.linear import EncodedModule
from ...engine_impl.quantization.panels import PanelLinear, PanelWeight, decoded
from ...kernels import rounded


def xla_twin(engine: Engine, params: Params) -> tuple[Engine, Params]:
    """(engine, its params): float32 weights with the values that the panels have, whatever their type, and products of
    inputs that are rounded as the panels' are.

    Raises RefusedError where nothing is in panels, and where something is codes that XLA multiplies anyway.
    """
    parts = [part for part in engine.model.modules() if isinstance(part, EncodedModule)]
    if not parts or not all(isinstance(part, PanelWeight) for part in parts):
        raise RefusedError("versus='xla' is for engines whose products are all native: one CPU, and `make setup`")
    model = registry.build(engine.model.config)
    for name, part in engine.model.named_modules():
        if isinstance(part, PanelLinear) and part.form.activations == "bfloat16":
            model.get_submodule(name).register_forward_pre_hook(lambda _, args: bridge.call_kernel(rounded, *args))
    programs = Programs(model, engine.mesh, engine.layout, "xla", engine.programs.has_adapters)
    return twin(engine, programs), decoded(engine.model, params)
