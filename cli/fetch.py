"""slipstream fetch: download a model, so that a server finds it without the network."""

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Fetch:
    """Download a model, or bring it up to date; prints where it lies. An interrupted download goes on where it was."""

    model: tyro.conf.Positional[str]
    """`embedded`, or a model of the Hugging Face hub (org/name, or org/name@revision)."""

    def run(self) -> int:
        from ..engine_impl.checkpoints.embedded import embedded_model
        from ..engine_impl.checkpoints.hub import fetch

        print(embedded_model() if self.model == "embedded" else fetch(self.model), flush=True)
        return 0
