"""slipstream bench: a subcommand for each benchmark. Their code is imported when one runs."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import subcommand

from ..benchmarks.options.accuracy import AccuracyOptions
from ..benchmarks.options.growth import GrowthOptions
from ..benchmarks.options.hostile import HostileOptions
from ..benchmarks.options.jetstream import JetStreamOptions
from ..benchmarks.options.kernel import KernelOptions
from ..benchmarks.options.mixed import MixedOptions
from ..benchmarks.options.overload import OverloadOptions
from ..benchmarks.options.prefill import PrefillOptions
from ..benchmarks.options.serve import ServeOptions
from ..benchmarks.options.soak import SoakOptions
from ..benchmarks.options.speculate import SpeculateOptions
from ..benchmarks.options.start import StartOptions
from ..benchmarks.options.step import StepOptions


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure: steps, prefills, kernels, starts, servers, speculation, mixed load, growing costs, quantisation,
    overload, soak, hostile inputs, JetStream.
    """

    what: (
        Annotated[StepOptions, subcommand("step")]
        | Annotated[PrefillOptions, subcommand("prefill")]
        | Annotated[KernelOptions, subcommand("kernel")]
        | Annotated[StartOptions, subcommand("start")]
        | Annotated[ServeOptions, subcommand("serve")]
        | Annotated[SpeculateOptions, subcommand("speculate")]
        | Annotated[MixedOptions, subcommand("mixed")]
        | Annotated[GrowthOptions, subcommand("growth")]
        | Annotated[AccuracyOptions, subcommand("accuracy")]
        | Annotated[OverloadOptions, subcommand("overload")]
        | Annotated[SoakOptions, subcommand("soak")]
        | Annotated[HostileOptions, subcommand("hostile")]
        | Annotated[JetStreamOptions, subcommand("jetstream")]
    )

    def run(self) -> int:
        """The benchmark prints its table; the status is 1 when its result is not sound."""
        result = self._measure()
        if self.what.as_json:
            print(json.dumps(result), flush=True)
        return 0 if is_sound(result) else 1

    def _measure(self) -> dict[str, Any]:
        match self.what:
            case StepOptions():
                from ..benchmarks import step

                return step.run(self.what)
            case PrefillOptions():
                from ..benchmarks import prefill

                return prefill.run(self.what)
            case KernelOptions():
                from ..benchmarks import kernel

                return kernel.run(self.what)
            case StartOptions():
                from ..benchmarks import start

                return start.run(self.what)
            case ServeOptions():
                from ..benchmarks import serve

                return serve.run(self.what)
            case SpeculateOptions():
                from ..benchmarks import speculate

                return speculate.run(self.what)
            case MixedOptions():
                from ..benchmarks import mixed

                return mixed.run(self.what)
            case GrowthOptions():
                from ..benchmarks import growth

                return growth.run(self.what)
            case AccuracyOptions():
                from ..benchmarks import accuracy

                return accuracy.run(self.what)
            case OverloadOptions():
                from ..benchmarks import overload

                return overload.run(self.what)
            case SoakOptions():
                from ..benchmarks import soak

                return soak.run(self.what)
            case HostileOptions():
                from ..benchmarks import hostile

                return hostile.run(self.what)
            case JetStreamOptions():
                from ..benchmarks import jetstream

                return jetstream.run(self.what)


def is_sound(result: dict[str, Any]) -> bool:
    """Whether every baseline gave our tokens, a soak lost nothing, and nobody held up the others."""
    rows = result.get("sweep", [result])
    return not any(row.get("equal_tokens") is False or row.get("faults") for row in rows)
