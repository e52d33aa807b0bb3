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
from .prefill import BenchPrefill
from .serve import BenchServe
from .soak import BenchSoak
from .start import BenchStart
from .step import BenchStep


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure: steps, prefills, kernels, starts, servers, growing costs, quantisation, overload, soak, JetStream."""

    what: (
        Annotated[BenchStep, tyro.conf.subcommand("step")]
        | Annotated[BenchPrefill, tyro.conf.subcommand("prefill")]
        | Annotated[BenchKernel, tyro.conf.subcommand("kernel")]
        | Annotated[BenchStart, tyro.conf.subcommand("start")]
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
