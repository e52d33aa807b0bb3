"""One adapter for a command that answers or scores by itself."""

from dataclasses import replace

from ..engine_impl.config import EngineConfig


def with_room(config: EngineConfig, adapter: str | None) -> EngineConfig:
    """The config with a place for the adapter (a folder or a hub id), of its rank. Raises RefusedError."""
    if adapter is None:
        return config
    from ..engine_impl.adapters.peft_config import read_peft_config
    from ..engine_impl.adapters.peft_folder import adapter_folder

    return replace(config, max_adapters=1, max_adapter_rank=read_peft_config(adapter_folder(adapter)).largest_rank)
