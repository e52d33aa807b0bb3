"""How many replicas there should be. Serve's controller asks: nothing heavy is imported here."""

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext

QUEUED, RUNNING = "queued", "running"
"""What a replica tells of its engine (requests). Serve's own count is of calls: it takes a call of 32 prompts for one
request, and one for the models' names too."""


def replicas_for_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """An autoscaling policy: as many as have `target_ongoing_requests` each, of those that wait, at an engine or for a
    replica, and those that run. Serve rounds it up and applies bounds, factors and delays."""
    told = context.aggregated_metrics or {}
    at_engines = sum(sum(told.get(name, {}).values()) for name in (QUEUED, RUNNING))
    requests = at_engines + (context.total_queued_requests or 0)
    assert isinstance(context.config, AutoscalingConfig)
    return requests / context.config.get_target_ongoing_requests(), {}
