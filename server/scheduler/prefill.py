"""A request's prefill: one for all its samples."""

import time

from ...engine_impl.api import Engine, ParamsT, PrefixT, StateT
from ..delivery.result import PendingResult
from ..request.request import Request
from .slots import Slots


def start_samples(
    engine: Engine[ParamsT, PrefixT, StateT], params: ParamsT, request: Request, slots: Slots
) -> list[tuple[PrefixT, PendingResult]]:
    """A prefix and a first token for each sample. The samples after the first draw theirs from the same prefill."""
    request.started_at = now = time.monotonic()
    padded, length = engine.pad(request.prompt_ids)
    prefix, result = engine.prefill(
        params, padded, length, sampling=request.sampling, prompt_logprobs=request.prompt_logprobs
    )
    started: list[tuple[PrefixT, PendingResult]] = []
    for sample in request.samples:
        if sample.index:
            prefix, result = engine.resample(prefix, sample.sampling)
        asked = prefix.prompt_logprob_T if request.prompt_logprobs and not sample.index else None
        roster = slots.alone(sample)
        started.append((prefix, PendingResult(result, roster, is_step=False, started=now, prompt_logprob_T=asked)))
    return started
