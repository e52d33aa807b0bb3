"""Requests and their times, from a seed."""

import json

import numpy as np
import pytest
from slipstream.benchmarks.load.workload import OUTPUT, PROMPT, arrivals, lengths, make_requests
from slipstream.benchmarks.options.flags import id_range
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
