"""What a reply tells beside the texts."""

import pytest
from slipstream.server.http.bodies import CompletionBody
from slipstream.server.http.completions import CompletionReply
from slipstream.server.http.token_names import TokenNames
from slipstream.server.request.events import Event, FinishReason, Usage

from tests.fakes import FakeEngine, FakeTokenizer


def usage(prompt_tokens, cached_tokens):
    return Usage(
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        generated_tokens=2,
        accepted_draft_tokens=3,
        rejected_draft_tokens=1,
        queue_ms=0,
        ttft_ms=1,
        total_ms=2,
    )


@pytest.mark.parametrize("is_stream", [False, True])
def test_cached_tokens_and_drafts_are_those_of_all_prompts(is_stream):
    body = CompletionBody.model_validate({"prompt": ["abc", "de"], "stream": is_stream})
    requests = body.requests("x", FakeEngine(), lambda number: print)
    reply = CompletionReply(body, requests, "x", "fake", TokenNames(FakeTokenizer()))
    batches = [
        [(number, Event(text="f", finish_reason=FinishReason.LENGTH, usage=of_request))]
        for number, of_request in enumerate([usage(3, 2), usage(2, 1)])
    ]
    for batch in batches:
        if is_stream:
            reply.chunk(batch)
        else:
            reply.add(batch)
    assert (reply.usage_chunk() if is_stream else reply.whole())["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"accepted_prediction_tokens": 6, "rejected_prediction_tokens": 2},
    }
