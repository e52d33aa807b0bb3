"""The reader of the compiler's schedules, and what it says of the kernels that we ship."""

import pytest
from slipstream.benchmarks.compiler.cores import CORES
from slipstream.benchmarks.compiler.kernel_rows import AttentionRow, ChunkRow, FlushRow, ScatterRow, Setting
from slipstream.benchmarks.compiler.kernel_schedules import measure, read
from slipstream.benchmarks.compiler.llo import parse, programs
from slipstream.kernels.ragged_attention.page_sizes import shape_key, tuned_rows

# A dump of the attention kernel for v5e with most bundles left out, the rest renumbered and their operands shortened.
# Regions follow their branches' four delay slots: the stage that computes (branch at 4), and in it the start from the
# new token (0xa), a whole block (0x12) and a boundary block (0x1b).
DUMP = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0  ;;  %s2 = inlined_call_operand.hbm [shape: bf16[96,1,4,128]] } /* entry bundle: %ragged */
   0x1   :  { %17 = dma.hbm_to_smem /*hbm=*/%s15, /*size_in_granules=*/16 }
   0x2 LB: > { %s3 = sadd.s32 1, %s2 } /* Start region 109 */
   0x3   : > { %44 = dma.hbm_to_vmem [thread:$0]  (!%p1), /*hbm=*/%s4, /*vmem=*/%s5 /*
base_bounds: (4, 96, 1, 512, 2)
element_size_in_bytes: 2048 */ }
   0x4   : > { %262 = sbr.rel (%p9) target = $region32  ;;  %s6 = sand.u32 (!%p9), 1, %s15 }
   0x5   :  {}
   0x6   :  {}
   0x7   :  {}
   0x8   :  {} /* End region 30 */
   0x9   : > { %3014 = dma.done.wait (%p7), %s265, 32 }
   0xa   : > { %329 = sbr.rel (%p7) target = $region44 }
   0xb   :  {}
   0xc   :  {}
   0xd   :  {}
   0xe   :  {} /* End region 42 */
   0xf   : > { %338 = vadd.xlane.f32.xlu0 %v337 }
  0x10   : > { %342 = vst.msk [vmem:[#allocation2] sm:$0xf] %vm1, %v340 } /* End region 43 */
  0x11 PF: > { %s8 = sld [smem:[#allocation29_spill]] } /* Start/End empty region 44 :: Start region 45 */
  0x12   : > { %354 = sbr.rel (%p4) target = $region48 }
  0x13   :  {}
  0x14   :  {}
  0x15   :  {}
  0x16   :  {}
  0x17   : > { %400 = vmatpush.bf16.xpose.msra.mxu0 %v1  ;;  %v2 = vld [vmem:[%s1] sm:$0xf] }
  0x18   : > { %401 = vmatmul.bf16.vlgmr.msra.gmra.mxu0 %v2 }
  0x19   : > { %402 = vst [vmem:[#allocation4] sm:$0xf] %v9 }
  0x1a PF: > { %p2 = scmp.lt.s32.totalorder %s3, %s4 } /* Start/End empty region 48 :: Start region 49 */
  0x1b   : > { %914 = sbr.rel (!%p13) target = $region52 }
  0x1c   :  {}
  0x1d   :  {}
  0x1e   :  {}
  0x1f   :  {}
  0x20   : > { %v7 = vsel %vm1, %v1, %v2 }
  0x21   : > { %500 = vmatmul.bf16.vlgmr.msra.gmra.mxu1 %v7 }
  0x22   : > { %501 = vpop.f32.mrf.mxu1 }
  0x23   : > { %502 = vst [vmem:[#allocation4] sm:$0xf] %v9 }
  0x24 PF: > { %s9 = sshll.u32 %s8, 1 } /* Start/End empty region 52 :: Start/End empty region 32 */
  0x25   : > { %45 = sbr.rel (!%p13) target = $region109 }
  0x26   :  {}
  0x27   :  {}
  0x28   :  {}
  0x29   : > { %s10 = smov %s11 } /* End region 3 :: End region 108 */
  0x2a   :  { %2058 = vsyncpa [#allocation11], 1 } /* exit bundle: %ragged */
"""

# XLA's scatter with most bundles left out: a loop over parts of the rows, in it one over rounds (0x1 to 0x10), of two
# rows each, which ends in one that copies tiles where rows share them (0xb to 0xf, jumped over by the branch at 0x6).
SCATTER = """
     0   :  { %s1 = smov 0 } /* Start region 440 */
   0x1 LB: > { %s3 = sadd.s32 1, %s2 } /* Start region 429 */
   0x2   : >> { %6732 = shalt.err (!%p1) /* BoundsCheck 2 [deref of %s93] for %97 = dma.hbm_to_vmem */ }
   0x3   : >> { %97 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s4, /*vmem=*/%s5 }
   0x4   : >> { %98 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s6, /*vmem=*/%s7 }
   0x5   : >> { %7721 = dma.done.wait [#allocation5], 2048 }
   0x6   : >> { %669 = sbr.rel (%p6029_p9) target = $region23 }
   0x7   :  {}
   0x8   :  {}
   0x9   :  {}
   0xa   :  {} /* End region 21 */
   0xb LB: >>> { %757 = sbr.rel (!%p754_p1) target = $region418 } /* Start region 418 */
   0xc   :  {}
   0xd   :  {}
   0xe   :  {}
   0xf   :  {} /* End region 418 */
  0x10 PF: >> { %99 = dma.vmem_to_hbm /*vmem=*/%s5, /*hbm=*/%s4 } /* Start/End empty region 23 */
  0x11   : >> { %100 = dma.vmem_to_hbm (%p1), /*vmem=*/%s7, /*hbm=*/%s6 }
  0x12   : >> { %60 = sbr.rel (!%p57_p10) target = $region429 }
  0x13   :  {}
  0x14   :  {}
  0x15   :  {}
  0x16   :  {} /* End region 429 */
  0x17   :  { %14 = sbr.rel (!%p12_p13) target = $region440 }
  0x18   :  {}
  0x19   :  {}
  0x1a   :  {}
  0x1b   :  {} /* End region 440 */
"""


def test_bundles_by_hand():
    """The loop is 0x2 to 0x29, 40 bundles. Its start takes 2 of them, a whole block 3 and a boundary block 4."""
    program = parse(DUMP, delay_slots=4)
    assert (program.start, program.end) == (0x2, 0x2A)
    assert [(r.branch, r.start, r.end) for r in program.regions] == [
        (0x04, 0x09, 0x24),  # the stage that computes
        (0x0A, 0x0F, 0x11),
        (0x12, 0x17, 0x1A),
        (0x1B, 0x20, 0x24),
    ]
    stage, start, whole, boundary = program.regions
    assert program.stages() == {stage}
    assert program.of("vmat") == (whole, boundary)
    assert program.issued([]) == 40 - 27  # 0x9 to 0x23
    assert program.issued([stage]) == 40 - 2 - 3 - 4
    assert program.issued([stage, whole]) == 40 - 2 - 4
    assert program.issued([stage, start, whole, boundary]) == 40


def test_a_row_by_hand():
    row = read("v5e", Setting("attention", 1, 128, "bfloat16", 512), DUMP)
    assert row == AttentionRow(
        "v5e",
        row.setting,
        page_bytes=512 * 2 * 128 * 2,
        pipeline=31,
        whole=34,
        boundary=35,
        slot=2,
        dma_cycles=480,  # 256 KiB at 819 GB/s and 1.5 GHz
    )
    assert isinstance(row, AttentionRow)
    assert row.is_dma_bound
    # 1024 rows end anywhere in a block: 1024 / 512 + 511 / 1024 blocks, all of them waiting for HBM
    assert row.cycles == round((2 + 511 / 1024) * 480 + 2)


def test_flush_enters_every_region():
    row = read("v5e", Setting("flush", 4, 128, "bfloat16"), DUMP)
    assert row == FlushRow("v5e", row.setting, step=40, dma_cycles=1920)  # 32 layers of 4 x 8 rows of 512 bytes, twice


def test_a_scatters_round_by_hand():
    """The innermost loop with the transfers, 0x1 to 0x16, without what it does in rare rounds; a check is no DMA."""
    row = read("v5e", Setting("scatter", 4, 128, "bfloat16"), SCATTER)
    # two tiles of 8 rows of 512 bytes, there and back: 16 KiB at 819 GB/s and 1.5 GHz
    assert row == ScatterRow("v5e", row.setting, rows=2, round=22 - 5, dma_cycles=30)


def test_refuses_what_it_does_not_understand():
    with pytest.raises(ValueError, match="0 loops in a program of 1 bundles"):
        parse("     0   :  { %s1 = smov 0 }", delay_slots=4)
    with pytest.raises(ValueError, match="no end of a region"):
        parse(DUMP, delay_slots=1)


def test_programs_of_a_dump(tmp_path):
    (tmp_path / "1795-ragged_attention_1x128_page512.1-03-final_bundles.txt").write_text("bundles")
    (tmp_path / "1795-ragged_attention_1x128_page512.1-02-schedule-analysis_final_bundles.txt").write_text("not these")
    (tmp_path / "1795-TLP-hlo.txt").write_text("nor this")
    assert programs(tmp_path) == {"ragged_attention_1x128_page512": "bundles"}


@pytest.fixture(scope="module")
def shipped():
    """The rows of all that is read below, by setting: one process loads libtpu."""
    wanted = [*ATTENTION, WINDOWED, INT8, *FLUSHES, SCATTER_OF_4, *CHUNKS]
    return {row.setting: row for row in measure("v5e", wanted)}


def tuned(kv_heads, head_dim, dtype, **options):
    """The kernel as it is shipped for v5e."""
    rows = tuned_rows("TPU v5 lite")[shape_key(kv_heads, head_dim, dtype)]
    return Setting("attention", kv_heads, head_dim, dtype, rows, **options)


ATTENTION = [tuned(K, H, "bfloat16") for K, H in [(1, 128), (4, 128), (8, 128), (1, 64), (4, 64)]]
WINDOWED = tuned(4, 128, "bfloat16", window=True, soft_cap=50.0)
INT8 = tuned(4, 128, "int8")
FLUSHES = [Setting("flush", K, 128, "bfloat16") for K in (1, 4, 8)]
SCATTER_OF_4 = Setting("scatter", 4, 128, "bfloat16")
CHUNKS = [Setting("chunk", *shape, 256, tokens=512) for shape in ((1, 128, "bfloat16"), (8, 64, "int8"))]


@pytest.mark.slow
def test_int8_saves_time_and_a_window_costs_little(shipped):
    """On v5e, at the tuned pages: rows of 264 bytes take less time than of 512; a border more is a few bundles."""
    rows = [shipped[setting] for setting in (ATTENTION[1], WINDOWED, INT8)]
    plain, windowed, int8 = (row for row in rows if isinstance(row, AttentionRow))
    assert windowed.whole < plain.whole + 40
    assert int8.cycles < 0.65 * plain.cycles


def test_a_chunk_goes_over_its_blocks_and_whole_pages():
    setting = Setting("chunk", 2, 64, "bfloat16", 256, tokens=512)
    row = ChunkRow("v5e", setting, 1, 256, pipeline=1, diagonal=10, own=5, cached=7, dma_cycles=8, mxu_cycles=1)
    assert row.cycles(0) == 2 * (2 * 10 + 5)  # two heads, each in steps of its own
    assert row.cycles(257) == row.cycles(0) + 2 * 2 * 2 * 8  # both blocks read two pages, and wait for HBM


@pytest.mark.slow
def test_a_chunk_waits_for_its_own_work(shipped):
    """Pages arrive while a block of queries is busy, most of the time with products."""
    one, several = (shipped[setting] for setting in CHUNKS)
    assert isinstance(one, ChunkRow)
    assert isinstance(several, ChunkRow)
    assert (one.heads, several.heads, one.block) == (1, 1, 256)
    for row in (one, several):
        assert row.dma_cycles < row.mxu_cycles < row.cached
        assert max(row.diagonal, row.own) < 1.1 * row.cached
    assert one.mxu_cycles > 0.7 * one.cached


@pytest.mark.slow
def test_a_scatter_costs_more_than_the_flush(shipped):
    """On v5e, of 32 layers of 16 slots with 4 kv heads: what the evidence for one flush a step rests on."""
    scatter, flush = shipped[SCATTER_OF_4], shipped[FLUSHES[1]]
    assert isinstance(scatter, ScatterRow)
    assert isinstance(flush, FlushRow)
    rounds = 32 * 16 * 4 / scatter.rows
    assert rounds * scatter.round > 5 * 16 * max(flush.step, flush.dma_cycles)


@pytest.mark.slow
def test_what_we_ship_waits_for_hbm(shipped):
    """Attention in bf16 at the tuned pages, and the flush: fewer bundles than cycles of DMA, on v5e."""
    rows = [shipped[setting] for setting in (*ATTENTION, *FLUSHES)]
    attention = [row for row in rows if isinstance(row, AttentionRow)]
    assert [(row.setting.page, row.whole) for row in attention if not row.is_dma_bound] == []
    assert [(r.setting, r.step) for r in rows if isinstance(r, FlushRow) and r.step > r.dma_cycles] == []
    # A slot's last page is masked. Pages are smaller than the blocks that were read before, so its mask weighs more.
    late = [(row.setting, row.boundary, row.dma_cycles) for row in attention if row.boundary > 1.15 * row.dma_cycles]
    assert late == []
    assert all(row.chip in CORES for row in rows)
