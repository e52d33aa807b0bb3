"""What the leader's callers hold instead of parameters, states, prefixes and adapters: the value here, and the number
under which the followers keep theirs."""

from collections import deque
from typing import Any

from ..api import DeviceArray


class Handle:
    """Parameters, or a state. When it dies, `freed` is told its number."""

    def __init__(self, number: int, value: Any, freed: deque[int]) -> None:
        self.number, self.value, self._freed = number, value, freed

    def __del__(self) -> None:
        self._freed.append(self.number)


class PrefixHandle(Handle):
    """As `api.Prefix`."""

    def is_ready(self) -> bool:
        return self.value.is_ready()

    @property
    def logprob_NT(self) -> DeviceArray:
        return self.value.logprob_NT

    @property
    def top_token_NTP(self) -> DeviceArray:
        return self.value.top_token_NTP

    @property
    def top_logprob_NTP(self) -> DeviceArray:
        return self.value.top_logprob_NTP


class AdapterHandle(Handle):
    """As `api.Adapter`."""

    @property
    def rank(self) -> int:
        return self.value.rank

    @property
    def bytes(self) -> int:
        return self.value.bytes

    @property
    def device_bytes(self) -> int:
        return self.value.device_bytes
