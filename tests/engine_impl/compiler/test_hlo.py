"""The HLO reader on a program small enough to read, and on what a compiler really writes."""

import pytest
from slipstream.engine_impl.compiler.hlo import Program

CACHE = (4, 8, 128)

TEXT = """HloModule step

%update (param_0: f32[4,8,128], param_1: f32[1,8,128]) -> f32[4,8,128] {
  %param_0 = f32[4,8,128]{2,1,0} parameter(0)
  %param_1 = f32[1,8,128]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  ROOT %dus = f32[4,8,128]{2,1,0} dynamic-update-slice(%param_0, %param_1, %zero, %zero, %zero)
}, execution_thread="sparsecore"

%body (carry: (s32[], f32[4,8,128], f32[64,64])) -> (s32[], f32[4,8,128], f32[64,64]) {
  %carry = (s32[], f32[4,8,128]{2,1,0}, f32[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %cache = f32[4,8,128]{2,1,0} get-tuple-element(%carry), index=1
  %weights = f32[64,64]{1,0} get-tuple-element(%carry), index=2
  %copied_weights = f32[64,64]{0,1} copy(%weights)
  %attend.3 = f32[8,128]{1,0} custom-call(%i, %cache), custom_call_target="tpu_custom_call", metadata={
"kernel":"two lines"
}}
  %layer = f32[1,8,128]{2,1,0} slice(%cache), slice={[0:1], [0:8], [0:128]}
  %prefetch = f32[1,8,128]{2,1,0:T(8,128)S(1)} slice(%cache), slice={[0:1], [0:8], [0:128]}
  %prefetch_of_v4 = f32[1,8,128]{2,1,0:T(8,128)S(3)} slice(%cache), slice={[0:1], [0:8], [0:128]}
  %sum = f32[8,128]{1,0} all-reduce(%attend.3), to_apply=%add, backend_config={"estimated_cycles":"100"}
  ROOT %next = (s32[], f32[4,8,128]{2,1,0}, f32[64,64]{1,0}) tuple(%i, %cache, %copied_weights)
}

%condition (carry.1: (s32[], f32[4,8,128], f32[64,64])) -> pred[] {
  %carry.1 = (s32[], f32[4,8,128]{2,1,0}, f32[64,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %bound = s32[] constant(4)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (cache: f32[4,8,128], weights: f32[64,64], row: f32[1,8,128]) -> f32[4,8,128] {
  %cache.1 = f32[4,8,128]{2,1,0} parameter(0)
  %weights.1 = f32[64,64]{1,0} parameter(1)
  %row = f32[1,8,128]{2,1,0} parameter(2)
  %zero.1 = s32[] constant(0)
  %start = (s32[], f32[4,8,128]{2,1,0}, f32[64,64]{1,0}) tuple(%zero.1, %cache.1, %weights.1)
  %loop = (s32[], f32[4,8,128]{2,1,0}, f32[64,64]{1,0}) while(%start), condition=%condition, body=%body
  %after = f32[4,8,128]{2,1,0} get-tuple-element(%loop), index=1
  %saved = f32[4,8,128]{2,1,0} copy(%after)
  %product.1 = f32[4,8,128]{2,1,0} custom-call(%saved, %row), custom_call_target="tpu_custom_call"
  %transposed_product = f32[4,128,8]{2,1,0} transpose(%product.1), dimensions={0,2,1}
  %flush_2x128.7 = f32[4,8,128] custom-call(%row, %saved), "tpu_custom_call", output_to_operand_aliasing={{}: (1, {})}
  %flushed_copy = f32[4,8,128]{2,1,0} copy(%flush_2x128.7)
  ROOT %inserted = f32[4,8,128]{2,1,0} fusion(%flush_2x128.7, %row), kind=kLoop, calls=%update
}
"""


@pytest.fixture
def program():
    return Program(TEXT)


def test_a_loops_body_counts_as_often_as_it_runs(program):
    assert program.pallas_calls() == {"attend": 4, "product": 1, "flush": 1}
    assert program.collectives() == {"all-reduce": 4}
    assert program.estimated_cycles() == 400
    assert program.operations() == 4 * (6 + 1) + 6  # the condition, too


def test_launches_inside_and_outside_of_loops_whose_turns_nobody_knows(program):
    """Two in each of the loop's four turns, six behind it, calls and copies too. Then the bound is no constant."""
    assert program.launches() == (4 * 2 + 6, 0)
    unknown = Program(TEXT.replace("%bound = s32[] constant(4)", "%bound = s32[] get-tuple-element(%carry.1), index=0"))
    assert unknown.launches() == (6, 2)


def test_copies_of_the_cache_are_found_wherever_it_goes(program):
    """Through tuples, loop and a kernel that works in place. Not the weights' copy, prefetches into VMEM and CMEM, what
    a kernel makes of it, or the update in place."""
    assert program.copies_of(CACHE, 8 * 128 * 4) == ["layer", "saved", "flushed_copy"]
    prefetched = ["prefetch", "prefetch_of_v4"]
    assert program.copies_of(CACHE, 8 * 128 * 4, on_chip=True) == ["layer", *prefetched, "saved", "flushed_copy"]


def test_copies_below_the_threshold_are_nobodys_business(program):
    assert program.copies_of(CACHE, 8 * 128 * 4 + 1) == ["saved", "flushed_copy"]


def test_a_shape_that_is_no_parameter_has_no_copies(program):
    assert program.copies_of((4, 8, 64), 1) == []
