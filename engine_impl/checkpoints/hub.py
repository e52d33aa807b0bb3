"""Models of the Hugging Face hub, in the cache that all its tools share (HF_HOME).

What is in the cache whole is used as it is, without a look at the network; `slipstream fetch` brings it up to date.
Nobody is asked for a token: the one that `hf auth login` or HF_TOKEN left is used where there is one.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import RefusedError
from .hf_config import config_path
from .mistral_format import PARAMS, WEIGHTS
from .safetensors import INDEX, weight_files
from .tekken import TEKKEN

CONFIG_FILES = ["config.json"]
FILES = [
    *CONFIG_FILES, "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", INDEX,
    "model*.safetensors",
]  # fmt: skip
"""What is fetched. Never a pickle."""

MISTRAL_FILES = [PARAMS, TEKKEN, f"{WEIGHTS}*.safetensors", f"{WEIGHTS}.safetensors.index.json"]
"""Of a model that comes without a config.json."""

ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
"""Of an adapter."""

_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache."""

    name: str
    bytes: int
    whole: bool
    """config and weights are there"""


def is_id(model: str) -> bool:
    """Whether this could be a hub id, `org/name`, or `org/name@revision`."""
    return _ID.fullmatch(model) is not None and not model.endswith((".gguf", ".json", ".safetensors"))


def model_folder(model: str) -> Path:
    """The model's files: from the cache if they are whole, else fetched. Raises RefusedError as `fetch` does."""
    folder = _cached(model, FILES)
    return folder if folder is not None and _is_whole(folder) else fetch(model)


def adapter_folder(name: str) -> Path:
    """An adapter's files, likewise."""
    folder = _cached(name, ADAPTER_FILES)
    if folder is not None and all((folder / file).is_file() for file in ADAPTER_FILES):
        return folder
    return _download(name, ADAPTER_FILES)


def config_file(model: str) -> Path:
    """The model's config.json alone, or its params.json, likewise."""
    folder = _cached(model, CONFIG_FILES)
    if folder is None or not config_path(folder).is_file():
        folder = _download(model, CONFIG_FILES)
    if not config_path(folder).is_file():
        folder = _download(model, [PARAMS])
    return config_path(folder)


def fetch(model: str) -> Path:
    """Bring the cache up to date, with a progress bar on stderr; what came before an interruption is kept.

    Raises RefusedError, with what to do, for a model that is not there, private, gated, or without safetensors weights,
    and when the network fails.
    """
    folder = _download(model, FILES)
    if not (folder / "config.json").is_file():
        folder = _download(model, MISTRAL_FILES)
    if not config_path(folder).is_file():
        raise RefusedError(
            f"{model} came without a config.json: it is no model in transformers' form, or not whole; run `slipstream "
            f"fetch {model}` where there is a network"
        )
    weight_files(folder, model)
    return folder


def cached_models() -> list[CachedModel]:
    """What the cache holds of this kind, by name."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return sorted(
        (
            CachedModel(
                name=repository.repo_id,
                bytes=repository.size_on_disk,
                whole=any(_is_whole(revision.snapshot_path) for revision in repository.revisions),
            )
            for repository in repositories
            if repository.repo_type == "model"
        ),
        key=lambda model: model.name,
    )


def _is_whole(folder: Path) -> bool:
    try:
        return config_path(folder).is_file() and bool(weight_files(folder, ""))
    except RefusedError:
        return False


def _cached(model: str, files: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = _parts(model)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _download(model: str, files: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    name, revision = _parts(model)
    page = f"https://huggingface.co/{name}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except errors.GatedRepoError as error:
        raise RefusedError(
            f"{name} is gated: accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise RefusedError(
            f"model {name!r} is neither a folder here nor a public model of the Hugging Face hub; check the name "
            "or, if it is private, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise RefusedError(f"{name} has no revision {revision!r}; see {page}/tree/main") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise RefusedError(
            f"model {name!r} is neither a folder here nor whole in the cache, and the hub is out of reach "
            f"({_why(error)}); run `slipstream fetch {model}` where there is a network, with the same HF_HOME"
        ) from error
    except Exception as error:  # the HTTP and transfer libraries beneath have errors of their own
        raise RefusedError(
            f"{name} could not be fetched whole ({_why(error)}); run it again: what has come is kept"
        ) from error


def _why(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _parts(model: str) -> tuple[str, str | None]:
    matched = _ID.fullmatch(model)
    if matched is None:
        raise RefusedError(f"{model!r} is no hub id; give org/name, or org/name@revision")
    name, revision = matched.groups()
    return name, revision
