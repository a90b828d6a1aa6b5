"""Bytes that programs move: of texts written by hand, and of programs whose bytes are known by arithmetic."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtok import hlo, sharding

# A step of eight devices: a loop of five layers that gathers each layer's weight [128 256] from eight parts and, every
# time anew, one that is the same for all; a loop whose length only its condition tells, with an all-reduce in groups of
# four; and a reduce-scatter as TPUs write it.
TEXT = """
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%layers (t: (s32[], bf16[5,16,256], bf16[16,256])) -> (s32[], bf16[5,16,256], bf16[16,256]) {
  %t = (s32[], bf16[5,16,256]{2,1,0:T(8,128)(2,1)}, bf16[16,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = bf16[5,16,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %same = bf16[16,256]{1,0} get-tuple-element(%t), index=2
  %part = bf16[16,256]{1,0} dynamic-slice(%w, %i), dynamic_slice_sizes={1,16,256}
  %begun = (bf16[16,256]{1,0}, bf16[128,256]{1,0}) all-gather-start(%part), channel_id=1, replica_groups=[1,8]<=[8]
  %whole = bf16[128,256]{1,0} all-gather-done(%begun)
  %again = bf16[128,256]{1,0} all-gather(%same), channel_id=2, replica_groups=[1,8]<=[8]
  ROOT %out = (s32[], bf16[5,16,256]{2,1,0:T(8,128)(2,1)}, bf16[16,256]{1,0}) tuple(%next, %w, %same)
}

%bound (t: (s32[], bf16[5,16,256], bf16[16,256])) -> pred[] {
  %t = (s32[], bf16[5,16,256]{2,1,0}, bf16[16,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(77)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%parts (t: (s32[], f32[64])) -> (s32[], f32[64]) {
  %t = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[64]{0} get-tuple-element(%t), index=1
  %y = f32[64]{0} all-reduce(%x), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %out = (s32[], f32[64]{0}) tuple(%next, %y)
}

%three (t: (s32[], f32[64])) -> pred[] {
  %t = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%scatter (p: f32[1024], q: f32[8], at: s32[]) -> (f32[128], f32[1]) {
  %p = f32[1024]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %at = s32[] parameter(2)
  %all = (f32[1024]{0}, f32[8]{0}) all-reduce(%p, %q), channel_id=4, replica_groups=[1,8]<=[8], to_apply=%add
  %all.p = f32[1024]{0} get-tuple-element(%all), index=0
  %all.q = f32[8]{0} get-tuple-element(%all), index=1
  %own.p = f32[128]{0} dynamic-slice(%all.p, %at), dynamic_slice_sizes={128}
  %own.q = f32[1]{0} dynamic-slice(%all.q, %at), dynamic_slice_sizes={1}
  ROOT %own = (f32[128]{0}, f32[1]{0}) tuple(%own.p, %own.q)
}

ENTRY %main (w: bf16[5,16,256], s: bf16[16,256], x: f32[64], g: f32[1024], h: f32[8]) -> (f32[128], f32[1]) {
  %w = bf16[5,16,256]{2,1,0} parameter(0)
  %s = bf16[16,256]{1,0} parameter(1)
  %x = f32[64]{0} parameter(2)
  %g = f32[1024]{0} parameter(3)
  %h = f32[8]{0} parameter(4)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[5,16,256]{2,1,0}, bf16[16,256]{1,0}) tuple(%zero, %w, %s)
  %ran = (s32[], bf16[5,16,256], bf16[16,256]) while(%first), condition=%bound, body=%layers, known_trip_count={"n":"5"}
  %second = (s32[], f32[64]{0}) tuple(%zero, %x)
  %ran2 = (s32[], f32[64]{0}) while(%second), condition=%three, body=%parts
  ROOT %shard = (f32[128]{0}, f32[1]{0}) fusion(%g, %h, %zero), kind=kCustom, calls=%scatter
}
"""
PART = 2 * 16 * 256


def test_a_text_is_counted_exactly():
    moved = hlo.moved(TEXT)
    assert moved.collectives == {
        "all-gather": 5 * 7 * PART * 2,
        "all-reduce": 3 * 2 * 3 * 64 * 4 // 4,
        "reduce-scatter": 7 * (1024 + 8) * 4 // 8,
    }
    assert moved.hoistable == 5 * 7 * PART  # the second of the two
    assert moved.unknown == 0


@pytest.mark.parametrize(
    "old, new, kind, bytes_",
    [
        ("channel_id=2", "channel_id=1", "all-gather", 5 * 7 * PART * 2),  # they are two nevertheless
        ('{"n":"5"}', '{"n":"2"}', "all-gather", 2 * 7 * PART * 2),
        ("constant(3)", "constant(9)", "all-reduce", 9 * 2 * 3 * 64 * 4 // 4),
        ("dynamic-slice(%all.q", "negate(%all.q", "all-reduce", (3 * 2 * 3 * 64 + 7 * (1024 + 8)) * 4 // 4),
        ("{{0,1,2,3},{4,5,6,7}}", "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "all-reduce", 3 * 64 * 4),
        ("{{0,1,2,3},{4,5,6,7}}", "mesh['a'=8] {'a':(1)2}", "all-reduce", 3 * 64 * 4),
        ("{{0,1,2,3},{4,5,6,7}}", "{{0,1},{2,3},{4,5},{6,7}}", "all-reduce", 3 * 64 * 4),
    ],
)
def test_each_part_of_the_text_counts(old, new, kind, bytes_):
    assert hlo.moved(TEXT.replace(old, new)).collectives[kind] == bytes_


def test_a_notation_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="over which devices does this go"):
        hlo.moved(TEXT.replace("{{0,1,2,3},{4,5,6,7}}", "{}"))


def test_a_loop_of_unknown_length_is_counted_once_and_reported():
    moved = hlo.moved(TEXT.replace("%less = pred[] compare(%i, %n), direction=LT", "%less = pred[] parameter(1)"))
    assert moved.unknown == 1 and moved.collectives["all-reduce"] == 2 * 3 * 64 * 4 // 4


def test_what_changes_in_a_loop_cannot_be_hoisted():
    changed = TEXT.replace("tuple(%next, %w, %same)", "tuple(%next, %w, %part)")
    assert hlo.moved(TEXT).hoistable and not hlo.moved(changed).hoistable


# A product whose weight goes round a ring while it is used, two steps a turn, as TPUs do it; beside that runs a gather
# of [16 8] in pieces: begun outside, carried on in the loop.
RING = """
%more (p: f32[2,8], q: f32[16,8], x: f32[4,4]) -> (f32[4,4], f32[16,8]) {
  %p = f32[2,8]{1,0} parameter(0)
  %q = f32[16,8]{1,0} parameter(1)
  %x = f32[4,4]{1,0} parameter(2)
  %piece = f32[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8]
  %y = f32[4,4]{1,0} negate(%x)
  ROOT %both = (f32[4,4]{1,0}, f32[16,8]{1,0}) tuple(%y, %piece)
}

%begin (p: f32[2,8]) -> f32[16,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %piece = f32[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8]
}

%ring (t: (u32[], f32[4,4], f32[2,8], f32[16,8])) -> (u32[], f32[4,4], f32[2,8], f32[16,8]) {
  %t = (u32[], f32[4,4]{1,0}, f32[2,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%t), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%t), index=1
  %p = f32[2,8]{1,0} get-tuple-element(%t), index=2
  %q = f32[16,8]{1,0} get-tuple-element(%t), index=3
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %on = f32[4,4]{1,0} collective-permute(%x), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %on2 = f32[4,4]{1,0} collective-permute(%on), channel_id=6, source_target_pairs={{0,1},{1,0}}
  %m = (f32[4,4]{1,0}, f32[16,8]{1,0}) fusion(%p, %q, %on2), output_to_operand_aliasing={{1}: (1, {})}, calls=%more
  %m0 = f32[4,4]{1,0} get-tuple-element(%m), index=0
  %m1 = f32[16,8]{1,0} get-tuple-element(%m), index=1
  ROOT %out = (u32[], f32[4,4]{1,0}, f32[2,8]{1,0}, f32[16,8]{1,0}) tuple(%next, %m0, %p, %m1)
}

%bound (t: (u32[], f32[4,4], f32[2,8], f32[16,8])) -> pred[] {
  %t = (u32[], f32[4,4]{1,0}, f32[2,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%t), index=0
  %five = u32[] constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

ENTRY %main (x: f32[4,4], p: f32[2,8]) -> f32[4,4] {
  %x = f32[4,4]{1,0} parameter(0)
  %p = f32[2,8]{1,0} parameter(1)
  %zero = u32[] constant(0)
  %q = f32[16,8]{1,0} fusion(%p), calls=%begin
  %first = (u32[], f32[4,4]{1,0}, f32[2,8]{1,0}, f32[16,8]{1,0}) tuple(%zero, %x, %p, %q)
  %ran = (u32[], f32[4,4]{1,0}, f32[2,8]{1,0}, f32[16,8]{1,0}) while(%first), condition=%bound, body=%ring
  ROOT %y = f32[4,4]{1,0} get-tuple-element(%ran), index=1
}
"""


def test_a_collective_in_pieces_counts_once_and_a_ring_as_often_as_it_turns():
    moved = hlo.moved(RING)
    assert moved.collectives == {"all-gather": 7 * 2 * 8 * 4, "collective-permute": 3 * 2 * 4 * 4 * 4}  # 0, 2, 4 < 5
    assert moved.unknown == moved.hoistable == 0
    begun, turn = 4 * (2 * 8 + 16 * 8), 2 * 2 * 64 + (2 * 8 * 4 + 2 * 64) + 3 * 4  # two permutes, a piece, a counter
    assert moved.hbm == begun + 3 * turn


@pytest.mark.parametrize("old, new", [("constant(0)", "parameter(2)"), ("LT", "NE"), ("add(%i, %two)", "add(%i, %i)")])
def test_a_counter_that_cannot_be_read_is_not_guessed(old, new):
    moved = hlo.moved(RING.replace(old, new))
    assert moved.unknown == 1 and moved.collectives["collective-permute"] == 2 * 64


def test_hbm_is_read_and_written_but_not_by_what_lies_on_the_chip():
    line = "ENTRY %main (x: f32[8,128]) -> f32[8,128] {{\n  %x = f32[8,128]{{1,0}} parameter(0)\n{}\n}}"
    add = "  ROOT %y = f32[8,128]{{1,0{}}} add(%x, %x)"
    assert hlo.moved(line.format(add.format(""))).hbm == 3 * 4096
    assert hlo.moved(line.format(add.format(":T(8,128)S(1)"))).hbm == 2 * 4096
    row = "  %i = s32[] constant(0)\n  ROOT %y = f32[1,128]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,128}"
    assert hlo.moved(line.format(row)).hbm == 2 * 512 + 2 * 4  # the row it reads, not all of x
    part = "  %y = ((f32[8,128]{1,0}), f32[2,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:128]}"
    assert hlo.moved(line.format(part)).hbm == 1024


# ---- what XLA makes of programs ----


def moved(function, *args):
    return hlo.moved(jax.jit(function).lower(*args).compile().as_text())


def array(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def test_a_sum_over_all_devices_is_an_all_reduce():
    mesh = sharding.make_mesh(8)
    assert moved(lambda x: x.sum(0), array(mesh, (64, 300), "data")).collectives == {"all-reduce": 2 * 7 * 300 * 4 // 8}


def test_layers_that_are_gathered_in_a_scan_count_as_often_as_it_turns():
    mesh, layers, batch, width = sharding.make_mesh(2, 4), 6, 16, 64

    def forward(x, w):
        step = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None)
        return jax.lax.scan(step, x, w)[0]

    x, w = array(mesh, (batch, width), ("data", "fsdp")), array(mesh, (layers, width, width), None, "fsdp")
    counted = moved(forward, x, w)
    assert counted.collectives == {"all-gather": layers * 3 * width * width * 4 // 4}
    assert counted.hoistable == 0 and counted.unknown == 0

    same = moved(
        lambda x, w: jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, layers)[0],
        x,
        array(mesh, (width, width)),
    )
    assert same.collectives == {}
