"""The embedded model against Hugging Face transformers: the same GGUF, float32, token by token."""

import functools

import jax
import numpy as np
import pytest
import torch
from slipstream.engine_impl.checkpoints.embedded import embedded_model
from slipstream.engine_impl.quantization.panels import decoded
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.text.chat import Chat

from .tiny_models import embedded_engine, greedy, logits_behind

CHATS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "Erkläre mir die Relativitätstheorie in zwei Sätzen.",
    "List the first 10 prime numbers: 2, 3, 5,",
    "东京是日本的首都",
]
TEXTS = [
    "Once upon a time, in a village by the river, there lived",
    "The 3 laws of thermodynamics state that in 1865",
    "import numpy as np\n\nclass Matrix:\n    def __init__(self, rows, cols):\n",
    "Zutaten: 250 g Mehl, 3 Eier 🥚, ½ l Milch — dann",
]


@pytest.fixture(scope="module")
def prompts():
    tokenizer = embedded_engine()[0].get_tokenizer()
    chats = [tokenizer.render_chat(Chat.of([{"role": "user", "content": text}])) for text in CHATS]
    return [tokenizer.encode(text) for text in chats + TEXTS]


@functools.cache
def reference():
    from transformers import AutoModelForCausalLM

    path = embedded_model()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def reference_logits(token_ids):
    with torch.no_grad():
        return reference()(torch.tensor([token_ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def answers(prompts):
    """Ten prompts x 40 tokens, together in ten slots."""
    return greedy(*embedded_engine(), prompts, 40)


@pytest.fixture(scope="module")
def references(prompts, answers):
    """One pass over prompt and answer tells what transformers would choose at each place, given what came before."""
    both = zip(prompts, answers, strict=True)
    return [reference_logits(prompt + answer[:-1])[len(prompt) - 1 :] for prompt, answer in both]


@pytest.mark.slow
def test_greedy_tokens_equal_transformers(answers, references):
    assert [logits.argmax(-1).tolist() for logits in references] == answers


@pytest.mark.slow
@pytest.mark.parametrize("i", [0, 5, 9])
def test_greedy_tokens_alone_are_those_of_one_batch(prompts, answers, i):
    """In another slot."""
    session = Session(*embedded_engine())
    alone = [int(session.start((i + 3) % 10, prompts[i]).token_BW[0, 0])]
    alone += [int(session.step().token_BW[0, 0]) for _ in range(31)]
    assert alone == answers[i][:32]


@pytest.mark.slow
def test_prefill_logits_equal_transformers(prompts, references):
    """Within 1e-3, in every length of a piece that the prompts fall into."""
    engine, params = embedded_engine()
    for prompt, logits in zip(prompts, references, strict=True):
        np.testing.assert_allclose(logits_behind(engine, params, prompt), logits[0], atol=1e-3)


@pytest.mark.slow
def test_logprobs_equal_transformers(prompts):
    """Within 1e-4: a prompt's own, those of drawn tokens with penalties on, and the likeliest tokens beside them."""
    engine, params = embedded_engine()
    prompt = max((prompt for prompt in prompts if len(prompt) <= 64), key=len)
    sampling = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3, logprobs=5)
    session = Session(engine, params)
    (prefix,) = session.prefill(4, prompt, next_id=-1)
    results = [session.start(4, prompt, sampling), *(session.step() for _ in range(12))]
    results = [jax.tree.map(lambda values: values[0], result) for result in results]
    answer = [int(result.token_BW[0]) for result in results]

    expected = torch.tensor(reference_logits(prompt + answer)).log_softmax(-1).numpy()
    before = np.arange(len(prompt) - 1)
    np.testing.assert_allclose(
        prefix.logprob_NT[0, : len(prompt) - 1], expected[before, np.array(prompt[1:])], atol=1e-4
    )
    for position, (result, token) in enumerate(zip(results, answer, strict=True), len(prompt) - 1):
        np.testing.assert_allclose(result.logprob_BW[0], expected[position, token], atol=1e-4)
        likeliest = np.argsort(-expected[position])[:20]
        np.testing.assert_allclose(result.top_logprob_BWP[0], expected[position, likeliest], atol=1e-4)
        np.testing.assert_allclose(expected[position, result.top_token_BWP[0]], result.top_logprob_BWP[0], atol=1e-4)


@pytest.mark.slow
def test_three_devices_give_the_tokens_of_one(prompts):
    """Nine query heads and three kv heads over three devices; sampled and greedy, by programs of one shape each."""
    of_64 = [prompt for prompt in prompts if 16 < len(prompt) <= 64]

    def answers(engine, params):
        tokens = greedy(engine, params, of_64[:4], 12)
        sampling = SamplingParams(temperature=0.7, top_p=0.9, seed=5)
        sampled = Session(engine, params).start(0, of_64[-1], sampling)
        return [*tokens, int(sampled.token_BW[0, 0])]

    assert len(of_64) >= 4

    engine, params = embedded_engine(3)
    assert engine.init_decode_state().cache.rows.addressable_shards[0].data.shape[2] == 1
    assert answers(engine, params) == answers(*embedded_engine())


@pytest.mark.slow
def test_the_weights_are_transformers_weights():
    """GGUF's permuted q and k rows, tied embeddings and norms: bit for bit."""
    engine, params = embedded_engine()
    params = decoded(engine.model, params)
    state = reference().state_dict()
    for i in (0, 29):
        for name, value in params["layers"][i].items():
            np.testing.assert_array_equal(value, state[f"model.layers.{i}.{name}"].numpy(), err_msg=name)
    np.testing.assert_array_equal(params["embed_tokens"]["weight"], state["model.embed_tokens.weight"].numpy())
    np.testing.assert_array_equal(params["norm"]["weight"], state["model.norm.weight"].numpy())
    assert params["lm_head"]["weight"] is params["embed_tokens"]["weight"]
