"""Which page sizes are chosen, and that the chosen ones are among those that are measured."""

import json

from slipstream.benchmarks.compiler.kernel_report import settings
from slipstream.benchmarks.compiler.kernel_rows import AttentionRow, Setting
from slipstream.benchmarks.compiler.page_choice import choose, excess, write
from slipstream.kernels.ragged_attention import page_sizes
from slipstream.kernels.ragged_attention.page_sizes import path_of, shape_key, tuned_rows


def attention_row(page, dma_cycles, chip="v5e"):
    return AttentionRow(chip, Setting("attention", 1, 128, "bfloat16", page), 0, 0, 0, 0, 0, dma_cycles)


def test_chooses_the_smallest_page_that_loses_little():
    """Each chip its own: on the first 512 rows win by far, on the second 256 cost 2 % more than 512."""
    rows = [
        *(attention_row(page, dma) for page, dma in ((128, 100), (256, 150), (512, 240))),
        *(attention_row(page, dma, "v6e") for page, dma in ((128, 100), (256, 136), (512, 240))),
    ]
    assert [round(over, 2) for over in excess(rows).values()] == [0.42, 0.12, 0, 0.42, 0.02, 0]
    chosen = {chip: page for (chip, *_), (page, _) in choose(rows).items()}
    assert chosen == {"v5e": 512, "v6e": 256}


def test_writes_what_it_chose_and_keeps_other_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(page_sizes, "FOLDER", tmp_path)
    path_of("TPU v5 lite").write_text(json.dumps({"1 x 128 bfloat16": 256, "5 x 64 int8": 128}))
    tuned_rows.cache_clear()
    (path,) = write([attention_row(512, 100)])
    assert (path.parent, path.name) == (tmp_path, "tpu_v5_lite.json")
    assert json.loads(path.read_text()) == {"1 x 128 bfloat16": 512, "5 x 64 int8": 128}
    tuned_rows.cache_clear()


def test_every_tuned_page_was_measured():
    measured = {(shape_key(s.kv_heads, s.head_dim, s.dtype), s.page) for s in settings() if s.kernel == "attention"}
    for kind in ("TPU v4", "TPU v5", "TPU v5 lite", "TPU v6 lite"):
        assert set(tuned_rows(kind).items()) <= measured
        assert set(tuned_rows(kind)) == {shape for shape, _ in measured}
