"""`jetstream.engine.engine_api` of JetStream's last source, as far as an engine meets it: written from a list of its
members, since no package has it. Whoever calls the engine below does it as that source's Driver does."""

import abc
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ExistingPrefix:
    cache: Any
    common_prefix_tokens: Any


@dataclass(frozen=True)
class SlotData:
    tokens: Any
    valid: Any
    lengths: Any
    log_prob: Any


@dataclass(frozen=True, kw_only=True)
class ResultTokens:
    data: Any
    tokens_idx: tuple[int, int]
    valid_idx: tuple[int, int]
    length_idx: tuple[int, int]
    samples_per_slot: int
    log_prob: Any = None

    def copy_to_host_async(self) -> None:
        self.data.copy_to_host_async()

    def convert_to_numpy(self) -> "ResultTokens":
        return replace(self, data=np.array(self.data))

    def get_result_at_slot(self, slot: int) -> SlotData:
        """Of all the samples that a slot has."""
        return self.get_result_at_slots(range(slot * self.samples_per_slot, (slot + 1) * self.samples_per_slot))

    def get_result_at_slots(self, slots: Any) -> SlotData:
        """Of one sample in each of the slots."""
        rows = self.data[list(slots)]
        token, valid, length = (rows[:, slice(*at)] for at in (self.tokens_idx, self.valid_idx, self.length_idx))
        return SlotData(token, valid, length[:, 0], np.asarray(self.log_prob)[list(slots)])


class Engine(abc.ABC):
    @abc.abstractmethod
    def prefill(
        self, *, params, existing_prefix=None, padded_tokens, true_length, sampler=None, request_id=None
    ) -> tuple[Any, ResultTokens]: ...

    @abc.abstractmethod
    def prefill_multisampling(
        self, *, params, existing_prefix=None, padded_tokens, true_length, sampler=None, rng=None, num_samples=1
    ) -> tuple[Any, ResultTokens]: ...

    @abc.abstractmethod
    def generate(self, params, decode_state, sampler=None) -> tuple[Any, ResultTokens]: ...

    @abc.abstractmethod
    def insert(self, prefix, decode_state, slot, request_id=None) -> Any: ...

    @abc.abstractmethod
    def bulk_insert(self, prefix, decode_state, slots) -> Any: ...

    def free_resource(self, slot) -> Any:
        return None

    @abc.abstractmethod
    def load_params(self, *args, **kwargs) -> Any: ...

    @abc.abstractmethod
    def get_prefix_destination_sharding(self) -> Any: ...

    @abc.abstractmethod
    def get_tokenizer(self) -> Any: ...

    def build_tokenizer(self, metadata) -> Any:
        raise AssertionError("a SentencePiece file is read")

    @abc.abstractmethod
    def init_decode_state(self, *args, **kwargs) -> Any: ...

    @property
    @abc.abstractmethod
    def max_concurrent_decodes(self) -> int: ...

    @property
    @abc.abstractmethod
    def samples_per_slot(self) -> int: ...

    @property
    @abc.abstractmethod
    def max_prefill_length(self) -> int: ...

    @property
    @abc.abstractmethod
    def mesh(self) -> Any: ...

    @property
    @abc.abstractmethod
    def colocated_cpus(self) -> Any: ...

    @property
    @abc.abstractmethod
    def use_chunked_prefill(self) -> bool: ...

    @property
    @abc.abstractmethod
    def prefill_chunk_size(self) -> int: ...
