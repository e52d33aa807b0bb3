"""slipstream bench: a subcommand for each benchmark. Their code is imported when one runs."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from .accuracy import BenchAccuracy
from .growth import BenchGrowth
from .jetstream import BenchJetStream
from .kernel import BenchKernel
from .loading import BenchLoading
from .overload import BenchOverload
from .serve import BenchServe
from .soak import BenchSoak
from .step import BenchStep


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure: a decode step, a kernel, a server, the growth of costs, quantisation, an overload, a soak, JetStream."""

    what: (
        Annotated[BenchStep, tyro.conf.subcommand("step")]
        | Annotated[BenchKernel, tyro.conf.subcommand("kernel")]
        | Annotated[BenchServe, tyro.conf.subcommand("serve")]
        | Annotated[BenchGrowth, tyro.conf.subcommand("growth")]
        | Annotated[BenchAccuracy, tyro.conf.subcommand("accuracy")]
        | Annotated[BenchOverload, tyro.conf.subcommand("overload")]
        | Annotated[BenchSoak, tyro.conf.subcommand("soak")]
        | Annotated[BenchLoading, tyro.conf.subcommand("loading")]
        | Annotated[BenchJetStream, tyro.conf.subcommand("jetstream")]
    )

    def run(self) -> int:
        return self.what.run()
