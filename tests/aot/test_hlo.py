"""Costs of HLO text against figures worked out by hand."""

import jax
import pytest

from chai_jax.aot.cost import Collective, program_cost
from chai_jax.aot.hlo import group_size, nbytes

# Five times two iterations of an 8 x 8 x 8 product, an all-reduce in the inner loop and an all-gather after it all.
NESTED = """\
HloModule nested, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[8,8]{1,0} all-reduce(%y), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%next, %z)
}

%inner_condition (p.1: (s32[], f32[8,8])) -> pred[] {
  %p.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] constant(2)
  ROOT %less.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%outer (p.2: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p.2 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %one.2 = s32[] constant(1)
  %next.2 = s32[] add(%i.2, %one.2)
  %zero.2 = s32[] constant(0)
  %x.2 = f32[8,8]{1,0} get-tuple-element(%p.2), index=1
  %start.2 = (s32[], f32[8,8]{1,0}) tuple(%zero.2, %x.2)
  %loop.2 = (s32[], f32[8,8]{1,0}) while(%start.2), condition=%inner_condition, body=%inner
  %y.2 = f32[8,8]{1,0} get-tuple-element(%loop.2), index=1
  ROOT %t.2 = (s32[], f32[8,8]{1,0}) tuple(%next.2, %y.2)
}

%outer_condition (p.3: (s32[], f32[8,8])) -> pred[] {
  %p.3 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %n.3 = s32[] BOUND
  ROOT %less.3 = pred[] compare(%i.3, %n.3), direction=LT
}

ENTRY %main (x.4: f32[8,8]) -> f32[64,8] {
  %x.4 = f32[8,8]{1,0} parameter(0)
  %zero.4 = s32[] constant(0)
  %start.4 = (s32[], f32[8,8]{1,0}) tuple(%zero.4, %x.4)
  %loop.4 = (s32[], f32[8,8]{1,0}) while(%start.4), condition=%outer_condition, body=%outer
  %y.4 = f32[8,8]{1,0} get-tuple-element(%loop.4), index=1
  ROOT %all = f32[64,8]{1,0} all-gather(%y.4), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
}
"""
MATRIX = 8 * 8 * 4
PRODUCT = 2 * 8**3


def test_loops_count_as_often_as_they_run() -> None:
    found = program_cost(NESTED.replace("BOUND", "constant(5)"))
    assert {one.kind: (one.nbytes, one.group, one.times) for one in found.collectives} == {
        "all-reduce": (MATRIX, 4, 10),
        "all-gather": (MATRIX, 8, 1),
    }
    assert found.collective_bytes == 11 * MATRIX
    assert found.sent_bytes == 10 * MATRIX * 2 * 3 / 4 + 7 * MATRIX
    assert found.open_loops == 0
    # A counter (two read, one written), a product (likewise), an all-reduce; a counter; the all-gather.
    assert found.hbm_bytes == 10 * (3 * 4 + 3 * MATRIX + 2 * MATRIX) + 5 * 3 * 4 + 9 * MATRIX
    # Beside the products each run adds up 64 entries (the all-reduce) and moves three counters on.
    assert 10 * PRODUCT <= found.flops <= 10 * (PRODUCT + 100)


def test_a_loop_that_was_unrolled_once_runs_half_as_often() -> None:
    """Its counter goes on by two: the ten runs of the inner loop become five; of three runs, two are left."""
    for bound, runs in ((2, 5), (3, 10)):
        text = NESTED.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")
        text = text.replace("%n.1 = s32[] constant(2)", f"%n.1 = s32[] constant({bound})")
        found = program_cost(text.replace("BOUND", "constant(5)"))
        assert {one.kind: one.times for one in found.collectives} == {"all-reduce": runs, "all-gather": 1}
        assert runs * PRODUCT <= found.flops <= runs * (PRODUCT + 100)
    copied = NESTED.replace("%next = s32[] add(%i, %one)", "%j = s32[] copy(%i)\n  %next = s32[] add(%j, %one)")
    assert program_cost(copied.replace("BOUND", "constant(5)")).collectives[0].times == 10


def test_a_loop_without_a_bound_counts_once_and_is_reported() -> None:
    found = program_cost(NESTED.replace("BOUND", "get-tuple-element(%p.3), index=0"))
    assert found.open_loops == 1
    assert found.collective_bytes == 3 * MATRIX
    assert 2 * PRODUCT <= found.flops <= 2 * (PRODUCT + 100)
    # The outer loop's body alone: the all-gather behind it is left out.
    iteration = program_cost(NESTED.replace("BOUND", "get-tuple-element(%p.3), index=0"), per_iteration=True)
    assert iteration.collective_bytes == 2 * MATRIX
    assert 2 * PRODUCT <= iteration.flops <= found.flops
    with pytest.raises(ValueError, match="no loop"):
        program_cost(NESTED.replace("BOUND", "constant(5)"), per_iteration=True)


def test_agrees_with_xla_where_there_is_no_loop() -> None:
    compiled = jax.jit(lambda x: (x @ x).sum()).lower(jax.ShapeDtypeStruct((16, 16), "float32")).compile()
    analysis = compiled.cost_analysis()
    found = program_cost(compiled.as_text())
    assert (found.flops, found.hbm_bytes) == (analysis["flops"], analysis["bytes accessed"])
    assert found.collectives == ()


def test_bytes_of_shapes() -> None:
    assert nbytes("f32[2,3]{1,0:T(8,128)}") == 24
    assert nbytes("(bf16[4]{0}, s8[8,2]{1,0:T(8,128)(4,1)}, /*index=2*/pred[3], u32[])") == 8 + 16 + 3 + 4
    assert nbytes("s4[16]") == 8


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}", 4),
        ("source_target_pairs={{0,1},{1,0}}", 1),
    ],
)
def test_group_sizes(groups: str, size: int) -> None:
    assert group_size(f"%x = f32[] all-reduce(%y), channel_id=1, {groups}, to_apply=%add") == size


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-reduce", 150), ("all-gather", 300), ("reduce-scatter", 75), ("all-to-all", 75), ("collective-permute", 100)],
)
def test_a_ring_of_four(kind: str, sent: float) -> None:
    assert Collective(kind, 100, 4, 1).sent == sent


def test_the_start_of_an_asynchronous_collective_counts_once() -> None:
    text = """\
HloModule async

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %done = f32[8]{0} collective-permute-done(%start)
}
"""
    assert program_cost(text).collectives == (Collective("collective-permute", 32, 1, 1),)


# A table in HBM of which a fusion reads one row, a cache into which another writes one, and a product in fast memory.
IN_PLACE = """\
HloModule in_place

%row (table: f32[1000,128], at: s32[]) -> f32[1,128] {
  %table = f32[1000,128]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %found = f32[1,128]{1,0} dynamic-slice(%table, %at, %zero), dynamic_slice_sizes={1,128}
}

%put (cache: f32[1000,128], new: f32[1,128], at.1: s32[]) -> f32[1000,128] {
  %cache = f32[1000,128]{1,0} parameter(0)
  %new = f32[1,128]{1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %doubled = f32[1,128]{1,0} add(%new, %new)
  ROOT %put.1 = f32[1000,128]{1,0} dynamic-update-slice(%cache, %doubled, %at.1, %zero.1)
}

ENTRY %main (table.2: f32[1000,128], cache.2: f32[1000,128], at.2: s32[]) -> f32[1000,128] {
  %table.2 = f32[1000,128]{1,0} parameter(0)
  %cache.2 = f32[1000,128]{1,0} parameter(1)
  %at.2 = s32[] parameter(2)
  %row.2 = f32[1,128]{1,0:T(1,128)S(1)} fusion(%table.2, %at.2), kind=kLoop, calls=%row
  %sum.2 = f32[1,128]{1,0:T(1,128)S(1)} add(%row.2, %row.2)
  ROOT %put.2 = f32[1000,128]{1,0} fusion(%cache.2, %sum.2, %at.2), kind=kLoop, calls=%put
}
"""


def test_bytes_are_those_of_hbm_and_of_what_is_touched() -> None:
    row, at = 128 * 4, 4
    # One row is read into fast memory, where it is doubled; from there one row is written. The tables stay.
    assert program_cost(IN_PLACE).hbm_bytes == (row + at) + (row + at)
    everywhere = IN_PLACE.replace(":T(1,128)S(1)", "")
    assert program_cost(everywhere).hbm_bytes == (2 * row + at) + 3 * row + (2 * row + at)


def test_what_a_fusion_within_a_fusion_touches_is_a_part_too() -> None:
    """A scan's product takes its slice of a stack of weights through a fusion of its own."""
    wrapped = """\
%outer (table.3: f32[1000,128], at.3: s32[]) -> f32[1,128] {
  %table.3 = f32[1000,128]{1,0} parameter(0)
  %at.3 = s32[] parameter(1)
  %inner.3 = f32[1,128]{1,0} fusion(%table.3, %at.3), kind=kLoop, calls=%row
  ROOT %doubled.3 = f32[1,128]{1,0} add(%inner.3, %inner.3)
}

%outer_put (cache.4: f32[1000,128], new.4: f32[1,128], at.4: s32[]) -> f32[1000,128] {
  %cache.4 = f32[1000,128]{1,0} parameter(0)
  %new.4 = f32[1,128]{1,0} parameter(1)
  %at.4 = s32[] parameter(2)
  ROOT %inner.4 = f32[1000,128]{1,0} fusion(%cache.4, %new.4, %at.4), kind=kLoop, calls=%put
}

ENTRY"""
    nested = IN_PLACE.replace("calls=%row", "calls=%outer").replace("calls=%put", "calls=%outer_put")
    assert program_cost(nested.replace("ENTRY", wrapped)).hbm_bytes == program_cost(IN_PLACE).hbm_bytes


def test_a_copy_into_fast_memory_is_read_once() -> None:
    text = """\
HloModule prefetch

ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %start = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%x)
  %here = f32[256]{0:S(1)} copy-done(%start)
  ROOT %out = f32[256]{0} negate(%here)
}
"""
    assert program_cost(text).hbm_bytes == 1024 + 1024


def test_a_collective_that_is_spread_over_fusions_counts_once() -> None:
    text = """\
HloModule fused

%begin (p: f32[64]) -> f32[512] {
  %p = f32[64]{0} parameter(0)
  ROOT %all = f32[512]{0} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
}

%step (p.1: f32[64], x.1: f32[32]) -> (f32[512], f32[32]) {
  %p.1 = f32[64]{0} parameter(0)
  %all.1 = f32[512]{0} all-gather(%p.1), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
  %x.1 = f32[32]{0} parameter(1)
  %y.1 = f32[32]{0} negate(%x.1)
  ROOT %both = (f32[512]{0}, f32[32]{0}) tuple(%all.1, %y.1)
}

ENTRY %main (p.2: f32[64], x.2: f32[32]) -> f32[32] {
  %p.2 = f32[64]{0} parameter(0)
  %x.2 = f32[32]{0} parameter(1)
  %start = f32[512]{0} fusion(%p.2), kind=kCustom, calls=%begin
  %next = (f32[512]{0}, f32[32]{0}) fusion(%p.2, %x.2), kind=kCustom, calls=%step
  ROOT %y.2 = f32[32]{0} get-tuple-element(%next), index=1
}
"""
    found = program_cost(text)
    assert found.collectives == (Collective("all-gather", 256, 8, 1),)
    assert found.hbm_bytes == (256 + 2048) + (128 + 128)
