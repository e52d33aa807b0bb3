"""What a request came to."""

import logging

from slipstream.server.delivery.delivery import count, usage_of
from slipstream.server.observe.metrics import Metrics, Outcome
from slipstream.server.request.request import Request


def test_tokens_from_cached_prefixes_are_told_to_the_caller_and_to_the_log(caplog):
    request = Request(prompt_ids=[1, 2, 3], deliver=print, queued_at=1.0, ended_at=1.5, cached_tokens=2)
    usage = usage_of(request)
    assert (usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens, usage.total_ms) == (3, 2, 0, 500)
    with caplog.at_level(logging.INFO, "slipstream"):
        count(Metrics(), request, Outcome.CANCELLED)
    (record,) = caplog.records
    assert (record.fields["prompt_tokens"], record.fields["cached_tokens"]) == (3, 2)
