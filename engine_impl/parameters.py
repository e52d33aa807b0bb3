"""What programs are given beside a state: a model's weights, a draft model's and adapters, and how they come onto the
devices."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .adapters.peft_folder import adapter_folder, read_adapter
from .adapters.stacks import AdapterPlaces, AdapterWeights
from .checkpoints.contract import Checkpoint
from .errors import RefusedError
from .forward import LayerLoop, Params
from .models.decoder import Decoder
from .sizes import device_bytes
from .weights.alike import join, joined_shapes
from .weights.load import abstract_params, needed_shapes
from .weights.loaded import loaded


@dataclass(frozen=True, eq=False)
class Parameters:
    """Of one engine. The modules, with their linear ones as quantisation left them, hold no weights."""

    model: Decoder
    draft: Decoder | None
    """the draft model's"""
    mesh: Mesh
    dtype: jnp.dtype
    layer_loop: LayerLoop
    """decides the parameters' form"""
    kv_heads: int
    """as checkpoints and adapters have them"""
    places: AdapterPlaces | None
    """of the adapters that the devices hold; None: there are none"""
    kept_in: Path | None
    """the folder that keeps the weights as programs read them, if any"""

    @property
    def max_adapters(self) -> int:
        """Adapters that the devices hold at once."""
        return 0 if self.places is None else self.places.count

    def abstract(self) -> Params:
        """Shapes, types and shardings."""
        params = self._shapes_of(self.model)
        if self.draft is not None:
            params |= {"draft": self._shapes_of(self.draft)}
        return params if self.places is None else params | {"adapters": self.places.abstract(self.layer_loop)}

    @property
    def bytes(self) -> int:
        """Of all devices together."""
        return self.mesh.size * device_bytes(jax.tree.leaves(self.abstract()))

    def load(self, checkpoint: Checkpoint, draft_checkpoint: Checkpoint | None = None) -> Params:
        """Read the weights onto the mesh, the draft model's too where there is one. Raises RefusedError when a
        checkpoint does not fit its model."""
        params = self._loaded(self.model, checkpoint)
        if self.draft is not None and draft_checkpoint is not None:
            params |= {"draft": self._loaded(self.draft, draft_checkpoint)}
        return self.without_adapters(params)

    def _shapes_of(self, model: Decoder) -> Params:
        return joined_shapes(model, abstract_params(model, self.mesh, self.dtype, self.layer_loop))

    def _loaded(self, model: Decoder, checkpoint: Checkpoint) -> Params:
        """Vectors are joined behind loading, so that no checkpoint and no folder of kept weights knows of it."""
        params = loaded(model, checkpoint, self.mesh, self.dtype, self.layer_loop, self.kept_in)
        return join(params, self._shapes_of(model))

    def read_adapter(self, path: str) -> AdapterWeights:
        """A PEFT folder's, or a hub id's, into the host's memory; from any thread.

        Raises RefusedError for one that does not fit the model or its place, and where there are no places.
        """
        if self.places is None:
            raise RefusedError("there are no adapters; serve with --max-adapters N")
        shapes = needed_shapes(self.model, self.kv_heads)
        return read_adapter(adapter_folder(path), self.model, shapes, self.kv_heads, self.places)

    def put_adapter(self, params: Params, index: int, adapter: AdapterWeights) -> Params:
        """An adapter onto the devices, at `index` (from 1 to `max_adapters`), whatever was there. The adapters of
        `params` are donated: hold what it gives.

        Raises AdaptersLostError when it fails once they are donated; before, what made it fail.
        """
        assert self.places is not None
        return params | {"adapters": self.places.put(params["adapters"], index, adapter)}

    def without_adapters(self, params: Params) -> Params:
        """The parameters with no adapter on the devices, whatever has become of those that were there."""
        if self.places is None:
            return params
        return params | {"adapters": self.places.emptied(params.get("adapters", ()), self.layer_loop)}
