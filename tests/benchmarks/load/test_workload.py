"""Requests and their times, from a seed."""

import json

import numpy as np
import pytest
from slipstream.benchmarks.load.workload import OUTPUT, PROMPT, arrivals, lengths, make_requests
from slipstream.benchmarks.options.flags import id_range
from slipstream.engine_impl.compiler.lengths import length_mix
from slipstream.engine_impl.errors import RefusedError


def drawn(spec, column=PROMPT, count=500):
    draw = lengths(spec, column)
    return [draw(np.random.default_rng([7, index]), index) for index in range(count)]


def test_fixed_and_uniform():
    assert set(drawn("fixed:5")) == {5}
    assert set(drawn("uniform:2:4")) == {2, 3, 4}


def test_sharegpt_has_the_published_means_more_or_less():
    assert np.mean(drawn("sharegpt", PROMPT, 3000)) == pytest.approx(161, rel=0.15)
    assert np.mean(drawn("sharegpt", OUTPUT, 3000)) == pytest.approx(338, rel=0.15)


def test_sharegpt_is_the_mix_that_plan_tells_the_ceiling_of():
    mix = length_mix("sharegpt")
    assert np.mean(drawn("sharegpt", PROMPT, 3000)) == pytest.approx(mix.prompt_mean, rel=0.08)
    assert np.mean(drawn("sharegpt", OUTPUT, 3000)) == pytest.approx(mix.answer_mean, rel=0.08)


def test_a_file_gives_pairs_in_order_and_again(tmp_path):
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps([[3, 10], [4, 20]]))
    assert drawn(f"file:{path}", PROMPT, 3) == [3, 4, 3]
    assert drawn(f"file:{path}", OUTPUT, 3) == [10, 20, 10]


@pytest.mark.parametrize("spec", ["fixed", "fixed:0", "uniform:3:2", "uniform:1", "zipf:3", "file:/nowhere", "fixed:x"])
def test_other_lengths_are_refused(spec):
    with pytest.raises(RefusedError, match="lengths"):
        lengths(spec, PROMPT)


@pytest.mark.parametrize("text", ["[]", "{}", "[[1]]", "[[1, 0]]", "[1]"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "lengths.json"
    path.write_text(text)
    with pytest.raises(RefusedError, match="lengths file"):
        lengths(f"file:{path}", PROMPT)


def test_requests_are_the_same_from_the_same_seed_and_fit_the_server():
    def make(count, seed, max_length=None):
        specs = lengths("uniform:1:9", PROMPT), lengths("fixed:20", OUTPUT)
        return make_requests(count, *specs, ids=(10, 20), max_length=max_length, seed=seed)

    assert make(3, seed=1) == make(5, seed=1)[:3]
    assert make(3, seed=1) != make(3, seed=2)
    for ask in make(50, seed=1, max_length=8):
        assert all(10 <= token < 20 for token in ask.prompt_ids)
        assert len(ask.prompt_ids) >= 1
        assert ask.max_tokens >= 1
        assert len(ask.prompt_ids) + ask.max_tokens <= 8


def test_blocks_have_the_same_lengths_other_tokens_and_one_prefix():
    def make(block, prefix_share=0, seed=1):
        specs = lengths("uniform:5:9", PROMPT), lengths("uniform:1:20", OUTPUT)
        options = {"ids": (10, 1000), "max_length": None, "seed": seed, "block": block, "prefix_share": prefix_share}
        return make_requests(8, *specs, **options)

    first, second = make(0), make(1)
    assert [len(ask.prompt_ids) for ask in first] == [len(ask.prompt_ids) for ask in second]
    assert [ask.max_tokens for ask in first] == [ask.max_tokens for ask in second]
    prompts = [tuple(ask.prompt_ids) for ask in [*first, *second]]
    assert len({prompt[:3] for prompt in prompts}) == 16  # no two begin alike
    shared = make(0, prefix_share=4)
    assert [ask.prompt_ids[4:] for ask in shared] == [ask.prompt_ids for ask in first]
    assert len({tuple(ask.prompt_ids[:4]) for ask in [*shared, *make(1, prefix_share=4)]}) == 1
    assert make(0, prefix_share=4, seed=2)[0].prompt_ids[:4] != shared[0].prompt_ids[:4]


def test_a_shared_prefix_is_part_of_the_longest_request():
    specs = lengths("fixed:9", PROMPT), lengths("fixed:9", OUTPUT)
    for most, own, answer in ((6, 1, 1), (8, 3, 1), (15, 9, 2), (30, 9, 9)):
        (ask,) = make_requests(1, *specs, ids=(10, 20), max_length=most, seed=0, prefix_share=4)
        assert (len(ask.prompt_ids), ask.max_tokens) == (4 + own, answer)


def test_arrivals_start_at_once_and_keep_the_rate():
    poisson = arrivals(2000, 10.0, burst_size=1, seed=0)
    assert poisson[0] == 0
    assert poisson == sorted(poisson)
    assert poisson[-1] == pytest.approx(200, rel=0.1)


def test_bursts_come_at_one_moment():
    times = arrivals(5, 1.0, burst_size=2, seed=0)
    assert times[0] == times[1] < times[2] == times[3] < times[4]


def test_id_range():
    assert id_range("3:9") == (3, 9)
    for text in ("3", "9:3", "a:b", "3:3"):
        with pytest.raises(RefusedError):
            id_range(text)
