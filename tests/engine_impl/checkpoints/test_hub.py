"""The Hugging Face hub without a network: a fabricated cache, and the library's own errors."""

import shutil
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from slipstream.engine_impl.checkpoints import hub
from slipstream.engine_impl.checkpoints.open import open_checkpoint
from slipstream.engine_impl.checkpoints.safetensors import SafetensorsCheckpoint
from slipstream.engine_impl.compiler.plan import shape_of
from slipstream.engine_impl.errors import RefusedError

from .folders import CONFIG, random_tensors, write_folder
from .test_mistral_format import mistral_folder

COMMIT = "c" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; the network is off (tests/conftest.py)."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    return tmp_path / "hub"


def snapshot(cache, name="org/tiny", revision="main", commit=COMMIT, **options):
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return write_folder(repository / "snapshots" / commit, **options)


def opened(model: str) -> SafetensorsCheckpoint:
    checkpoint = open_checkpoint(model)
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    return checkpoint


def test_a_cached_model_needs_no_network(cache):
    folder = snapshot(cache, files=2)
    checkpoint = opened("org/tiny")
    assert (checkpoint.name, checkpoint.folder) == ("org/tiny", folder)
    assert set(checkpoint.shapes()) == {name.removeprefix("model.") for name in random_tensors()}
    assert shape_of("org/tiny") == checkpoint.config


def test_a_revision_can_be_named(cache):
    snapshot(cache)
    other = snapshot(cache, revision="v2", commit="d" * 40, config=CONFIG | {"num_hidden_layers": 1})
    assert opened("org/tiny@v2").folder == other
    assert shape_of("org/tiny@v2").num_layers == 1
    assert shape_of("org/tiny").num_layers == 2


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "config.json"])
def test_a_cached_part_is_not_taken_for_the_whole(cache, lost):
    """It would be fetched; here there is no network."""
    (snapshot(cache, files=2) / lost).unlink()
    with pytest.raises(
        RefusedError, match=r"lacks 1 of 2 files|without a config\.json.*run `slipstream fetch org/tiny`"
    ):
        open_checkpoint("org/tiny")


def test_a_cached_config_is_enough_to_plan(cache):
    (snapshot(cache) / "model.safetensors").unlink()
    assert shape_of("org/tiny").vocab_size == CONFIG["vocab_size"]


def test_what_is_not_cached_and_out_of_reach_is_told(cache):
    with pytest.raises(RefusedError, match="'org/none' is neither a folder here nor whole in the cache"):
        open_checkpoint("org/none")


@pytest.fixture
def online(cache, monkeypatch):
    """What a download does: set `online["error"]`, or it makes the folder; `online["asked"]` is what it was asked."""
    told: dict[str, Any] = {"asked": []}
    local = huggingface_hub.snapshot_download

    def snapshot_download(name, *, revision, allow_patterns, local_files_only=False):
        if local_files_only:
            return local(name, revision=revision, allow_patterns=allow_patterns, local_files_only=True)
        told["asked"].append((name, revision, allow_patterns))
        if "error" in told:
            raise told["error"]
        return str(snapshot(cache, name))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return told


def test_fetched_once_and_then_found(online):
    first = opened("org/tiny")
    assert [(name, revision) for name, revision, _ in online["asked"]] == [("org/tiny", None)]
    assert opened("org/tiny").folder == first.folder
    assert len(online["asked"]) == 1
    assert hub.fetch("org/tiny") == first.folder, "fetch looks for news"
    assert len(online["asked"]) == 2


def test_mistrals_own_format_is_fetched_where_there_is_no_other(cache, tmp_path, monkeypatch):
    """And is not, beside a config.json: many folders hold a model in both."""
    theirs, _ = mistral_folder(tmp_path)
    (theirs / "README.md").write_text("")
    there = cache / "models--org--tiny" / "snapshots" / COMMIT
    there.mkdir(parents=True)
    asked = []

    def snapshot_download(name, *, revision, allow_patterns, local_files_only=False):
        if not local_files_only:
            asked.append(allow_patterns)
            for file in filter_repo_objects([path.name for path in theirs.iterdir()], allow_patterns=allow_patterns):
                shutil.copy(theirs / file, there / file)
        return str(there)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert opened("org/tiny").config == shape_of("org/tiny")
    assert asked == [hub.FILES, hub.MISTRAL_FILES]
    assert {path.name for path in there.iterdir()} == {"params.json", "consolidated.safetensors"}
    assert opened("org/tiny").folder == there
    assert len(asked) == 2, "what is there whole is not asked for"


def test_pickles_are_not_even_fetched(online):
    hub.fetch("org/tiny")
    ((_, _, patterns),) = online["asked"]
    chosen = list(filter_repo_objects(
        ["pytorch_model.bin", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
         "consolidated.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
         "tokenizer_config.json", "chat_template.jinja", "original/consolidated.00.pth", "modeling_own.py"],
        allow_patterns=patterns,
    ))  # fmt: skip
    assert chosen == [
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json",
        "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
    ]  # fmt: skip


def response(status) -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=status)


ERRORS = {
    "gated": (
        errors.GatedRepoError("gated", response=response(403)),
        "org/tiny is gated: accept its terms at https://huggingface.co/org/tiny, then log in with `hf auth login`",
    ),
    "private or absent": (
        errors.RepositoryNotFoundError("no", response=response(401)),
        "neither a folder here nor a public model .* if it is private, log in",
    ),
    "no such revision": (
        errors.RevisionNotFoundError("no", response=response(404)),
        "org/tiny has no revision 'v9'",
    ),
    "server": (errors.HfHubHTTPError("503 busy\nmore", response=response(503)), r"fetched whole \(503 busy\); run it"),
    "network": (RuntimeError("no route"), r"could not be fetched whole \(no route\).* what has come is kept"),
    "disk": (OSError(28, "No space left on device"), "could not be fetched whole .*No space left"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_each_failure_says_what_to_do(online, kind):
    online["error"], message = ERRORS[kind]
    with pytest.raises(RefusedError, match=message):
        open_checkpoint("org/tiny@v9")


@pytest.mark.parametrize(
    ("model", "is_one"),
    [
        ("org/name", True), ("meta-llama/Llama-3.1-8B", True), ("a/b@main", True), ("a/b@refs/pr/1", True),
        ("embedded", False), ("llama-3.1-8b", False), ("a/b/c", False), ("/tmp/x", False), ("./x", False),
        ("../x/y", False), ("models/x.gguf", False), ("a/config.json", False), ("a/b@", False), ("~/x", False),
    ],
)  # fmt: skip
def test_what_could_be_an_id(model, is_one):
    assert hub.is_id(model) is is_one


@pytest.mark.parametrize("model", ["nothing", "/nowhere/at/all", "nowhere/m.gguf"])
def test_what_is_nothing_is_told(cache, model):
    with pytest.raises(RefusedError, match=r"does not exist; give `embedded`, a GGUF file, a folder .*, a hub id"):
        open_checkpoint(model)


def test_what_is_cached_is_listed(cache):
    assert hub.cached_models() == []
    snapshot(cache)
    (snapshot(cache, "org/part") / "model.safetensors").unlink()
    (cache / "datasets--org--data" / "refs").mkdir(parents=True)
    found = {model.name: model for model in hub.cached_models()}
    assert {name: model.whole for name, model in found.items()} == {"org/part": False, "org/tiny": True}
    assert found["org/tiny"].bytes > sum(tensor.nbytes for tensor in random_tensors().values())
