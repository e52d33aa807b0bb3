"""What transformers makes of the names in a checkpoint, and ours of that."""

import re
from typing import Any

INV_FREQ = r"rotary_emb\.inv_freq$"
"""Older checkpoints store the rope's frequencies, which follow from the config."""


class Names:
    """Of one model."""

    def __init__(self, model: Any, layers: str) -> None:
        """`layers` is the path of the list that its layers are in."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self._renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
        self._there = dict.fromkeys(model.state_dict(), True)
        self._base, self._layers = model.base_model_prefix, f"{layers}."
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        self._ignored = re.compile("|".join(f"({pattern})" for pattern in (*ignored, INV_FREQ)))

    def __call__(self, name: str) -> str:
        """A name in a checkpoint as that of the module of transformers, with `layers.` for what its layers are in."""
        from transformers.core_model_loading import rename_source_key

        name, _ = rename_source_key(name, self._renamings, [], self._base, self._there)
        return f"layers.{name.removeprefix(self._layers)}" if name.startswith(self._layers) else name

    def ignores(self, name: str) -> bool:
        """Whether it may be there without a parameter that takes it."""
        return self._ignored.search(name) is not None
