"""score, models and fetch, from words to what a user sees."""

import json
import math

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from slipstream.cli import main as cli
from slipstream.engine_impl.checkpoints import embedded

from tests.engine_impl.checkpoints.folders import CONFIG, write_folder

IDS = [5, 77, 130, 9, 9, 200, 31, 64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model without a tokenizer."""
    return write_folder(tmp_path_factory.mktemp("score") / "m", config=CONFIG | {"architectures": ["LlamaForCausalLM"]})


@pytest.fixture(scope="module")
def expected(folder):
    """transformers' log-probabilities of IDS."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logprob_TV = torch.log_softmax(model(torch.tensor([IDS])).logits[0], -1)
    return [float(logprob_TV[i - 1, IDS[i]]) for i in range(1, len(IDS))]


def words(folder, *more):
    size = ["--cache-length", "128", "--slots", "2", "--tensor-parallel", "1"]
    return ["score", "--model", str(folder), *size, "--tokens", ",".join(map(str, IDS)), *more]


@pytest.mark.slow
@pytest.mark.parametrize("through", ["prefill", "decode"])
def test_score_equals_transformers(folder, expected, through, capsys):
    assert cli.run(words(folder, "--through", through, "--json")) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(told) == ["token_ids", "logprobs", "perplexity"]
    assert told["token_ids"] == IDS
    assert told["logprobs"][0] is None
    np.testing.assert_allclose(told["logprobs"][1:], expected, atol=1e-4)
    assert told["perplexity"] == pytest.approx(math.exp(-np.mean(expected)), rel=1e-4)


def test_a_model_of_few_positions_needs_no_flag(folder, capsys):
    """It has 256."""
    command = ["score", "--model", str(folder), "--tensor-parallel", "1", "--tokens"]
    assert cli.run([*command, "1,2,3"]) == 0
    assert cli.run([*command, ",".join("1" * 257)]) == 2
    assert "257 tokens must be from 2 to 256 (see --max-prefill-length)" in capsys.readouterr().err
    assert cli.run([*command, "1,2,3", "--cache-length", "1024"]) == 2
    assert "cache_length=1024 is beyond what" in capsys.readouterr().err


@pytest.mark.slow
def test_a_chat_with_a_folder_reaches_the_model_as_transformers_encodes_it(tmp_path, capsys):
    """With its own tokenizer, template and BOS, once."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path / "m")
    control, letters = ["<unk>", "<s>", "</s>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(control + letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(control)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": template}))
    size = ["--cache-length", "128", "--slots", "2", "--tensor-parallel", "1", "--max-tokens", "5"]
    assert cli.run(["generate", "--model", str(folder), *size, "--prompt", "größe 🥚", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    reference = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "größe 🥚"}]
    assert result["prompt_token_ids"] == reference.apply_chat_template(chat, return_dict=False)
    assert result["prompt_token_ids"].count(1) == 1


def test_score_for_people(folder, expected, capsys):
    assert cli.run(words(folder)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(IDS) + 1
    assert lines[0].split() == ["5", "-", "''"]
    assert lines[1].split()[:2] == ["77", f"{expected[0]:.4f}"]
    told, perplexity, *rest = lines[-1].split()
    assert (told, rest) == ("perplexity", ["over", str(len(IDS) - 1), "tokens"])
    assert float(perplexity) == pytest.approx(math.exp(-np.mean(expected)), abs=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--text", "hi"],
            "tokenizer (tokenizer.json, tokenizer.model, tekken.json, or vocab.json with merges.txt); give token ids",
        ),
        (["--tokens", "1"], "1 tokens must be from 2 to 128 (see --max-prefill-length)"),
        (["--tokens", ",".join("1" * 129)], "129 tokens must be from 2 to 128"),
        (["--through", "decode", "--tokens", ",".join("1" * 129)], "129 tokens must be from 2 to 128 (see --cache-len"),
        (["--tokens", "1,259"], "token id 259 must be from 0 to 258"),
        (["--tokens", "1,-1"], "token id -1 must be"),
    ],
)
def test_score_refuses(folder, more, message, capsys):
    assert cli.run(["score", "--model", str(folder), "--cache-length", "128", *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give either --text TEXT or --tokens"),
        (["--text", "a", "--tokens", "1,2"], "give either"),
        (["--tokens", "1;2"], "tokens='1;2' must be token ids with commas between"),
    ],
)
def test_score_refuses_before_it_loads(more, message, capsys):
    assert cli.run(["score", "--model", "/nowhere", *more]) == 2
    assert message in capsys.readouterr().err


def test_models_lists_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "home"))
    (tmp_path / "models--org--tiny" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("c" * 40)
    write_folder(tmp_path / "models--org--tiny" / "snapshots" / ("c" * 40))
    assert cli.run(["models", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"llama", "qwen3", "gemma2"} <= set(told["families"])
    assert "llama-3.1-8b" in told["presets"]
    assert told["embedded"] is None
    assert [(model["name"], model["whole"]) for model in told["cached"]] == [("org/tiny", True)]
    assert cli.run(["models"]) == 0
    text = capsys.readouterr().out
    assert "embedded    not fetched yet" in text
    assert "  org/tiny  0.00 GB\n" in text


def test_fetch(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(write_folder(tmp_path / name)))
    assert cli.run(["fetch", "org/tiny"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'org/tiny'}\n"
    monkeypatch.setattr(embedded, "embedded_model", lambda: tmp_path / "m.gguf")
    assert cli.run(["fetch", "embedded"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'm.gguf'}\n"
    assert cli.run(["fetch", "/some/folder"]) == 2
    assert "'/some/folder' is no hub id; give org/name" in capsys.readouterr().err
