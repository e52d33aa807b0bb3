"""lm-evaluation-harness against the server, and against transformers on the same weights."""

import socket
import subprocess
from contextlib import contextmanager
from typing import Any

import pytest
from slipstream.engine_impl.checkpoints.embedded import embedded_model
from slipstream.engine_impl.checkpoints.gguf import GGUFCheckpoint

from tests.test_end_to_end import CLI, SIZES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # the harness's own, and those of what it imports
]

DOCS = [
    {"question": "The capital of France is", "choices": ["Paris.", "a banana, as 3 x 7 = 21.", "Zürich 🚆"], "gold": 0},
    {"question": "Two plus two is", "choices": ["four.", "blue, and never\n\nanything else.", "東京"], "gold": 0},
]
CHOICE = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
}
GENERATE = {
    "task": "tiny_generate",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"until": ["\n\n", "."], "max_gen_toks": 12, "do_sample": False, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}


def evaluated(lm, config, **more):
    """What the model said of each document, and the task's metrics."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    made = {"test_split": "test", "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(DOCS)}}
    task = ConfigurableTask(config=config | made)
    found: Any = evaluate(
        lm, {"tasks": {config["task"]: task}, "groups": {}, "group_map": {}}, bootstrap_iters=0, **more
    )
    said = [sample["filtered_resps"] for sample in found["samples"][config["task"]]]
    return said, found["results"][config["task"]]


@contextmanager
def served():
    """A server's address, of the sizes whose programs other tests compile, too."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*CLI, "serve", "--port", "0", "--http-port", str(port), *SIZES]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("SERVING on")
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def reference():
    """The harness over transformers: its Llama with the embedded model's weights as we read them, and a tokenizer that
    splits as the model's does. test_embedded_model.py compares the weights with what transformers' own reader makes of
    the file, which takes far longer."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    checkpoint = GGUFCheckpoint(embedded_model())
    shape: Any = checkpoint.config
    tokenizer = checkpoint.tokenizer()
    config: Any = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.model_dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.context_length,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model: Any = LlamaForCausalLM(config)
    weights = {f"model.{name}": torch.from_numpy(checkpoint.tensor(name)) for name in checkpoint.shapes()}
    model.load_state_dict(weights, strict=False)
    assert {*model.state_dict()} == {*weights, "lm_head.weight"}  # which is the embedding
    names = {f"{name}_token": tokenizer.token(getattr(tokenizer, f"{name}_id")) for name in ("bos", "eos")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend, pad_token=names["eos_token"], **names)
    fast.chat_template = tokenizer.chat_template
    hf: Any = HFLM  # whose arguments the checker does not see
    return hf(pretrained=model.eval(), tokenizer=fast, batch_size=1, max_length=64)


def test_the_harness_finds_what_it_finds_with_transformers(reference, monkeypatch):
    """Log-likelihoods within 1e-3 and equally greedy, with two prompts in a call; equal texts, raw and as chats; by
    the server's own tokenizer."""
    from lm_eval.api.registry import get_model

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with served() as address:
        base = f"http://{address}/v1"
        common = {"model": "embedded", "max_length": 64, "max_retries": 1}
        completions: Any = get_model("local-completions")
        chats: Any = get_model("local-chat-completions")
        raw = completions(base_url=f"{base}/completions", batch_size=2, **common)
        assert raw.tokenizer_backend == "remote"
        chat = chats(base_url=f"{base}/chat/completions", **common)

        said, metrics = evaluated(raw, CHOICE)
        expected, expected_metrics = evaluated(reference, CHOICE)
        for ours, theirs in zip(said, expected, strict=True):
            assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
            assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in theirs], abs=1e-3)
        assert metrics["acc,none"] == expected_metrics["acc,none"]
        assert evaluated(raw, GENERATE)[0] == evaluated(reference, GENERATE)[0]
        as_chat = {"apply_chat_template": True}
        assert evaluated(chat, GENERATE, **as_chat)[0] == evaluated(reference, GENERATE, **as_chat)[0]
