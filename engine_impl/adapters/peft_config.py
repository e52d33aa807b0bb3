"""adapter_config.json, as PEFT writes it: what a LoRA adapter changes, and by how much.

A field that is known and not read here has to say what it says when nobody asks for it.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import MAX_RANK
from ..errors import RefusedError
from ..runtime.workers import WorkerError, Workers

CONFIG = "adapter_config.json"

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "task_type": (None, "CAUSAL_LM"),
    "modules_to_save": (None, []),
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "layer_replication": (None, []),
    "layers_pattern": (None, [], "", "layers"),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
}
"""Fields that would change what an adapter does, with the values that change nothing."""

OF_TRAINING = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("inference_mode", "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core"),
    *("monteclora_config", "peft_version", "qalora_group_size", "revision", "runtime_config", "velora_config"),
}
READ = {
    *("alpha_pattern", "exclude_modules", "layers_to_transform", "lora_alpha", "peft_type", "r", "rank_pattern"),
    *("target_modules", "use_rslora"),
}

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How `init_lora_weights` begins where the base's weights were changed too, so that the adapter fits no other."""


WORKERS = Workers(1, seconds=2.0, memory_mib=64)
"""Where a stranger's regular expressions are matched: some take longer than anybody lives."""
PLAIN = re.compile(r"\^?[\w.]*\$?")
"""A pattern that takes no time."""


@dataclass(frozen=True)
class Change:
    """What an adapter does to a module."""

    rank: int
    scale: float
    """What B A is multiplied by."""


@dataclass(frozen=True)
class Module:
    """Of the model, with all the names that it may have had in the one that was trained."""

    names: tuple[str, ...]
    layer: int


@dataclass(frozen=True)
class PeftConfig:
    """One adapter's. Its patterns are of whole names in the model that was trained; a module is asked for by all the
    names that it may have had there."""

    where: str
    """for messages"""
    r: int
    alpha: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]
    """a regular expression of whole names, or the names' ends"""
    exclude_modules: str | tuple[str, ...]
    layers: frozenset[int] | None
    """None: all"""
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @property
    def largest_rank(self) -> int:
        return max([self.r, *self.rank_pattern.values()])

    def changes(self, modules: Sequence[Module]) -> list[Change | None]:
        """What the adapter does to each; None: nothing. Raises RefusedError for patterns that cannot be matched."""
        try:
            if all(map(PLAIN.fullmatch, self._expressions)):
                return changes(self, modules)
            return WORKERS.call(changes, self, modules)
        except re.error as error:
            raise RefusedError(f"{self.where}: {error.pattern!r:.80} is no regular expression ({error.msg})") from error
        except WorkerError as error:
            raise RefusedError(f"{self.where}: matching its patterns {error}; write them simpler") from error

    def change(self, module: Module) -> Change | None:
        """Kalajdzievski, arXiv 2312.03732, has the square root."""
        if self.layers is not None and module.layer not in self.layers:
            return None
        if not _match(self.target_modules, module.names) or _match(self.exclude_modules, module.names):
            return None
        rank = int(_of_pattern(self.rank_pattern, module.names, self.r))
        alpha = _of_pattern(self.alpha_pattern, module.names, self.alpha)
        return Change(rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))

    @property
    def _expressions(self) -> list[str]:
        """All that is matched as a regular expression."""
        whole = [text for text in (self.target_modules, self.exclude_modules) if isinstance(text, str)]
        return [*whole, *self.rank_pattern, *self.alpha_pattern]


def changes(config: PeftConfig, modules: Sequence[Module]) -> list[Change | None]:
    """In a worker, or here."""
    return [config.change(module) for module in modules]


def read_peft_config(folder: Path) -> PeftConfig:
    """Raises RefusedError for what is no LoRA adapter of a language model, or does more than one."""
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise RefusedError(
            f"{str(path)!r} cannot be read ({error.strerror}); give the folder of a PEFT adapter"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{str(path)!r} is no JSON ({error}); fetch it anew") from error
    where = str(path)
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type") if isinstance(fields, dict) else None
        raise RefusedError(f"{where} has peft_type={kind!r}; only LORA adapters are read")
    for name, value in fields.items():
        allowed = NEUTRAL.get(name)
        if allowed is not None and value not in allowed:
            raise RefusedError(f"{where} has {name}={_shown(value)}, which is not supported; train without it")
        if allowed is None and value and name not in READ | OF_TRAINING:
            raise RefusedError(f"{where} has {name}={_shown(value)}, a field that is not known here")
    started = fields.get("init_lora_weights")
    if isinstance(started, str) and started.lower().startswith(CHANGES_BASE):
        raise RefusedError(
            f"{where} has init_lora_weights={started!r}: the base's weights were changed too; convert it to LoRA with "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    try:
        return _config(where, fields)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise RefusedError(f"{where} lacks a field or has one of another kind ({error!r}); fetch it anew") from error


def _config(where: str, fields: Mapping[str, Any]) -> PeftConfig:
    targets, layers = fields["target_modules"], fields.get("layers_to_transform")
    config = PeftConfig(
        where=where,
        r=int(fields["r"]),
        alpha=float(fields["lora_alpha"]),
        use_rslora=bool(fields.get("use_rslora", False)),
        target_modules=_listed(targets),
        exclude_modules=_listed(fields.get("exclude_modules") or ()),
        layers=None if layers is None else frozenset([layers] if isinstance(layers, int) else map(int, layers)),
        rank_pattern={str(key): int(value) for key, value in (fields.get("rank_pattern") or {}).items()},
        alpha_pattern={str(key): float(value) for key, value in (fields.get("alpha_pattern") or {}).items()},
    )
    ranks = [config.r, *config.rank_pattern.values()]
    if not 1 <= min(ranks) <= max(ranks) <= MAX_RANK:
        raise RefusedError(f"{where} has ranks from {min(ranks)} to {max(ranks)}; they must be from 1 to {MAX_RANK}")
    return config


def _listed(names: str | Sequence[str]) -> str | tuple[str, ...]:
    return names if isinstance(names, str) else tuple(map(str, names))


def _match(pattern: str | tuple[str, ...], names: Sequence[str]) -> bool:
    if isinstance(pattern, str):
        return any(re.fullmatch(pattern, name) for name in names)
    return any(name == end or name.endswith(f".{end}") for name in names for end in pattern)


def _of_pattern(pattern: Mapping[str, float], names: Sequence[str], otherwise: float) -> float:
    found = (value for key, value in pattern.items() if any(re.match(rf"(.*\.)?({key})$", name) for name in names))
    return next(found, otherwise)


def _shown(value: Any) -> str:
    return f"{value!r:.80}"
