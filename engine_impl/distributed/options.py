"""gRPC options of the plan stream, the same at both ends."""

NEVER_S = 60.0
"""How long a silent host is believed where --step-timeout is 0 (seconds)."""


def stream_options(step_timeout_s: float) -> list[tuple[str, int]]:
    """A host that is cut off, or stopped as a whole, answers no pings: the stream to it breaks within the timeout."""
    half_ms = round((step_timeout_s or NEVER_S) * 1000 / 2)
    return [
        ("grpc.keepalive_time_ms", half_ms),
        ("grpc.keepalive_timeout_ms", half_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", half_ms // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ]
