"""slipstream fetch: download a model, so that a server finds it without the network."""

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Fetch:
    """Download a model, or bring it up to date; prints where it lies. An interrupted download goes on where it was."""

    model: tyro.conf.Positional[str]
    """`embedded`, or a model of the Hugging Face hub (org/name, or org/name@revision), or gs://bucket/path."""

    def run(self) -> int:
        from ..engine_impl.checkpoints import buckets, hub
        from ..engine_impl.checkpoints.embedded import embedded_model

        fetch = buckets.fetch if buckets.is_url(self.model) else hub.fetch
        print(embedded_model() if self.model == "embedded" else fetch(self.model), flush=True)
        return 0
