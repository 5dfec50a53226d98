"""Counts of compiled programs, against programs counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.hlo import collectives, count_kinds, products
from benchmarks.kernels import kernels, schedule
from mae_jax.models import flops
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.variants import VitVariant
from mae_jax.models.vit import make_encoder

PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=4

%fused (p: bf16[4,8]) -> f32[8,4] {
  %p = bf16[4,8]{1,0} parameter(0)
  %c = f32[4,8]{1,0} convert(%p)
  ROOT %t = f32[8,4]{1,0} transpose(%c), dimensions={1,0}
}

%body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %f = f32[8,4]{1,0} fusion(%a), kind=kLoop, calls=%fused
  %d = f32[8,8]{1,0} dot(%f, %b), metadata={op_name="layer/product"}
  %w = f32[16,8]{1,0} all-gather(%f), replica_groups=[1,4]<=[4], dimensions={0}
}

%less (s.1: (s32[], f32[8,4])) -> pred[] {
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[8,4]) -> f32[8,8] {
  %b = f32[4,8]{1,0} parameter(1)
  %x = bf16[8,4]{1,0} parameter(0)
  %r = (f32[2,3]{1,0}, /*index=1*/f32[]) all-reduce(%b, %b), replica_groups={}, to_apply=%add
  %w.1 = (s32[], f32[8,4]) while(%t.1), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %g = (bf16[8,8]{1,0}, s8[9]) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  ROOT %k = f32[4,8]{1,0} copy(%b), metadata={op_name="an all-gather("}
}

%add (y: f32[], z: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%y, %z)
}
"""  # noqa: E501


def test_instructions_count_as_often_as_they_run():
    counts = dict(transpose=3, copy=1, gather=0, scatter=0, sort=0, convert=3)
    assert count_kinds(PROGRAM) == counts | {"while": 1}
    assert products(PROGRAM) == [(("f32", "f32"), 3), (("bf16", "bf16"), 1)]
    reduced, gathered = collectives(PROGRAM)
    assert (reduced.kind, reduced.sizes, reduced.bytes, reduced.runs) == (
        *("all-reduce", (6, 1), 28, 1),
    )
    # The CPU compiler converted from bfloat16 before sending: 2 bytes per value.
    assert (gathered.kind, gathered.sizes, gathered.bytes, gathered.runs) == (
        *("all-gather", (128,), 256, 3),
    )


def test_loops_of_unknown_length_are_refused():
    with pytest.raises(ValueError, match="unknown length"):
        count_kinds(PROGRAM.replace("known_trip_count", "trips"))
    with pytest.raises(ValueError, match="no ENTRY"):
        count_kinds("")


# Kernels: bytes, FLOPs and runs


def program(computations, entry):
    return f"HloModule jit_f\n\n{computations}\nENTRY %main (a: f32[]) -> f32[] {{\n{entry}}}\n"


def counted(text):
    """Return name, bytes, FLOPs and runs of every kernel."""
    return [
        (each.instruction.name, each.bytes, each.flops, each.instruction.runs)
        for each in kernels(text)
    ]


def test_product_with_relu():
    body = """%fused (x: bf16[128,64], w: bf16[64,32]) -> bf16[128,32] {
  %x = bf16[128,64]{1,0} parameter(0)
  %w = bf16[64,32]{1,0} parameter(1)
  %dot = f32[128,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %zero = f32[] constant(0)
  %zeros = f32[128,32]{1,0} broadcast(%zero), dimensions={}
  %max = f32[128,32]{1,0} maximum(%dot, %zeros)
  ROOT %out = bf16[128,32]{1,0} convert(%max)
}
"""
    entry = """  %p = bf16[128,64]{1,0} parameter(0)
  %q = bf16[64,32]{1,0} parameter(1)
  ROOT %relu = bf16[128,32]{1,0} fusion(%p, %q), kind=kCustom, calls=%fused
"""
    # Operands and result once each, 2 bytes a value; the float32 product stays in registers.
    moved = 2 * (128 * 64 + 64 * 32 + 128 * 32)
    assert counted(program(body, entry)) == [("relu", moved, 2 * 128 * 64 * 32, 1)]


def test_fusions_inside_a_fusion():
    """Two products in one kernel; the second weight is a slice of a stack, read by a fusion."""
    body = """%hidden (x: bf16[16,8], w: bf16[8,32]) -> bf16[16,32] {
  %x = bf16[16,8]{1,0} parameter(0)
  %w = bf16[8,32]{1,0} parameter(1)
  ROOT %fc1 = bf16[16,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%pick (all: bf16[12,32,8]) -> bf16[32,8] {
  %all = bf16[12,32,8]{2,1,0} parameter(0)
  %one = bf16[1,32,8]{2,1,0} slice(%all), slice={[3:4], [0:32], [0:8]}
  ROOT %flat = bf16[32,8]{1,0} bitcast(%one)
}

%fused (stack: bf16[12,32,8], y: bf16[16,8], v: bf16[8,32]) -> bf16[16,8] {
  %stack = bf16[12,32,8]{2,1,0} parameter(0)
  %y = bf16[16,8]{1,0} parameter(1)
  %v = bf16[8,32]{1,0} parameter(2)
  %h = bf16[16,32]{1,0} fusion(%y, %v), kind=kOutput, calls=%hidden
  %u = bf16[32,8]{1,0} fusion(%stack), kind=kLoop, calls=%pick
  ROOT %fc2 = bf16[16,8]{1,0} dot(%h, %u), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    entry = """  %p = bf16[12,32,8]{2,1,0} parameter(0)
  %q = bf16[16,8]{1,0} parameter(1)
  %r = bf16[8,32]{1,0} parameter(2)
  ROOT %mlp = bf16[16,8]{1,0} fusion(%p, %q, %r), kind=kOutput, calls=%fused
"""
    moved = 2 * (32 * 8 + 16 * 8 + 8 * 32 + 16 * 8)
    assert counted(program(body, entry)) == [("mlp", moved, 2 * 2 * 16 * 8 * 32, 1)]


def convolution(shapes, window, labels):
    lhs, kernel, output = shapes
    entry = f"""  %p = bf16[{lhs}] parameter(0)
  %q = bf16[{kernel}] parameter(1)
  ROOT %y = f32[{output}] convolution(%p, %q){window}, dim_labels={labels}
"""
    ((*_, product_flops, _),) = counted(program("", entry))
    return product_flops


def test_products_that_a_tpu_computes_as_convolutions():
    matrices = ("10,20", "20,30", "10,30")
    assert convolution(matrices, "", "bf_io->bf") == 2 * 10 * 20 * 30
    scores = ("64,197,12,32", "64,50,12,32", "64,12,197,50")  # 64 images, 12 heads, width 32
    window = ", window={size=64x12 stride=63x11 lhs_dilate=64x12}"
    assert convolution(scores, window, "0b1f_0o1i->01bf") == 2 * 64 * 12 * 197 * 50 * 32
    patches = ("2,9,3", "4,3,5", "2,2,5")  # every output has all 4 positions of the window
    assert convolution(patches, ", window={size=4 stride=4}", "b0f_0io->b0f") == 2 * 2 * 2 * 4 * 15
    padded = ("2,9,3", "3,3,5", "2,9,5")  # two of the 27 positions are padding
    assert convolution(padded, ", window={size=3 pad=1_1}", "b0f_0io->b0f") == 2 * 2 * 25 * 15


def test_norm_reads_its_input_once():
    body = """%fused (x: bf16[8,16], scale: f32[16]) -> (bf16[8,16], f32[8]) {
  %x = bf16[8,16]{1,0} parameter(0)
  %scale = f32[16]{0} parameter(1)
  %wide = f32[8,16]{1,0} convert(%x)
  %sum = f32[8]{0} reduce(%wide, %zero), dimensions={1}, to_apply=%add
  %sums = f32[8,16]{1,0} broadcast(%sum), dimensions={0}
  %again = f32[8,16]{1,0} convert(%x)
  %centered = f32[8,16]{1,0} subtract(%again, %sums)
  %scales = f32[8,16]{1,0} broadcast(%scale), dimensions={1}
  %product = f32[8,16]{1,0} multiply(%centered, %scales)
  %narrow = bf16[8,16]{1,0} convert(%product)
  ROOT %both = (bf16[8,16]{1,0}, f32[8]{0}) tuple(%narrow, %sum)
}
"""
    entry = """  %p = bf16[8,16]{1,0} parameter(0)
  %q = f32[16]{0} parameter(1)
  %norm = (bf16[8,16]{1,0}, f32[8]{0}) fusion(%p, %q), kind=kInput, calls=%fused
  ROOT %y = bf16[8,16]{1,0} get-tuple-element(%norm), index=0
"""
    assert counted(program(body, entry)) == [
        ("norm", 2 * 8 * 16 + 4 * 16 + (2 * 8 * 16 + 4 * 8), 0, 1)
    ]


LOOP = """%save (stack: f32[5,4,8], x: f32[4,8], i: s32[]) -> f32[5,4,8] {
  %stack = f32[5,4,8]{2,1,0} parameter(0)
  %x = f32[4,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,4,8]{2,1,0} bitcast(%x)
  ROOT %saved = f32[5,4,8]{2,1,0} dynamic-update-slice(%stack, %row, %i, %zero, %zero)
}

%load (weights: f32[5,4,8], j: s32[]) -> f32[4,8] {
  %weights = f32[5,4,8]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %none = s32[] constant(0)
  %part = f32[1,4,8]{2,1,0} dynamic-slice(%weights, %j, %none, %none), dynamic_slice_sizes={1,4,8}
  %view = f32[4,8]{1,0} bitcast(%part)
  ROOT %doubled = f32[4,8]{1,0} add(%view, %view)
}

%body (s: (s32[], f32[5,4,8], f32[5,4,8])) -> (s32[], f32[5,4,8], f32[5,4,8]) {
  %s = (s32[], f32[5,4,8]{2,1,0}, f32[5,4,8]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %a = f32[5,4,8]{2,1,0} get-tuple-element(%s), index=1
  %b = f32[5,4,8]{2,1,0} get-tuple-element(%s), index=2
  %x.1 = f32[4,8]{1,0} fusion(%a, %n), kind=kLoop, calls=%load
  %y = f32[5,4,8]{2,1,0} fusion(%b, %x.1, %n), kind=kLoop, calls=%save
  ROOT %t = (s32[], f32[5,4,8]{2,1,0}, f32[5,4,8]{2,1,0}) tuple(%n, %a, %y)
}

%less (s.1: (s32[], f32[5,4,8], f32[5,4,8])) -> pred[] {
  %s.1 = (s32[], f32[5,4,8]{2,1,0}, f32[5,4,8]{2,1,0}) parameter(0)
  %m = s32[] get-tuple-element(%s.1), index=0
  %end = s32[] constant(5)
  ROOT %l = pred[] compare(%m, %end), direction=LT
}
"""
LOOPS = """  %w = (s32[], f32[5,4,8], f32[5,4,8]) while(%init), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"5"}}
"""  # noqa: E501
SLICE = 4 * 4 * 8  # bytes


def test_loop_with_slices_and_updates_in_place():
    # Each also reads the loop counter, 4 bytes.
    assert counted(program(LOOP, LOOPS)) == [
        ("x.1", 2 * SLICE + 4, 0, 5),
        ("y", 2 * SLICE + 4, 0, 5),
    ]


UPDATE = """  %step = s32[] constant(1)
  %copied = s32[] copy(%n)
  %sum = s32[] add(%copied, %step)
  ROOT %t"""


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("", "", 5),
        ("%step = s32[] constant(1)", "%step = s32[] constant(2)", 3),
        ("s32[]", "u32[]", 5),  # as of products whose operands other TPUs send meanwhile
        ("LT", "NE", 1),
        ("add(%copied, %step)", "multiply(%copied, %step)", 1),
        ("add(%copied, %step)", "add(%copied, %copied)", 1),
        ("add(%copied, %step)", "copy(%copied)", 1),
        ("%end = s32[] constant(5)", "%end = s32[] get-tuple-element(%s.1), index=1", 1),
    ],
)
def test_loops_without_a_count_run_up_to_a_bound_or_once(old, new, trips):
    """The TPU compiler leaves no counts."""
    loop = LOOP.replace("  ROOT %t", UPDATE, 1).replace("tuple(%n, ", "tuple(%sum, ")
    text = program(loop.replace(old, new), LOOPS.replace("known", "unknown"))
    assert [runs for name, *_, runs in counted(text) if name in ("x.1", "y")] == [trips, trips]


def test_slice_and_update_without_a_fusion():
    entry = """  %stack = f32[5,4,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %part = f32[1,4,8]{2,1,0} dynamic-slice(%stack, %i, %i, %i), dynamic_slice_sizes={1,4,8}
  ROOT %new = f32[5,4,8]{2,1,0} dynamic-update-slice(%stack, %part, %i, %i, %i)
"""
    assert counted(program("", entry)) == [("part", 2 * SLICE, 0, 1), ("new", 2 * SLICE, 0, 1)]


WRAPPED = """  %stack.1 = f32[5,4,8]{2,1,0} parameter(0)
  %x.2 = f32[4,8]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %start = ((f32[5,4,8]{2,1,0}, f32[4,8]{1,0}, s32[]), f32[5,4,8]{2,1,0}, u32[]) START
  ROOT %done = f32[5,4,8]{2,1,0} DONE(%start)
"""
WRAPPER = """
%async_computation (q: f32[5,4,8], r: f32[4,8], u: s32[]) -> f32[5,4,8] {
  %q = f32[5,4,8]{2,1,0} parameter(0)
  %r = f32[4,8]{1,0} parameter(1)
  %u = s32[] parameter(2)
  ROOT %inner = f32[5,4,8]{2,1,0} fusion(%q, %r, %u), kind=kLoop, calls=%save
}
"""


@pytest.mark.parametrize(
    ("start", "done"),
    [
        ("async-start(%stack.1, %x.2, %k), calls=%async_computation", "async-done"),
        ("fusion-start(%stack.1, %x.2, %k), kind=kLoop, calls=%save", "fusion-done"),
    ],
    ids=["dumped text", "as_text"],
)
def test_asynchronous_update_in_place(start, done):
    entry = WRAPPED.replace("START", start).replace("DONE", done)
    ((_, moved, _, runs),) = counted(program(LOOP + WRAPPER, entry))
    assert (moved, runs) == (2 * SLICE + 4, 1)


COLLECTIVES = """  %p = f32[8,16]{1,0} parameter(0)
  %q = f32[1,16]{1,0} parameter(1)
  %gathered = f32[8,16]{1,0} all-gather(%q), replica_groups=[1,8]<=[8], dimensions={0}
  %part = f32[1,16]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], to_apply=%add
  %begun = (f32[1,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%q), replica_groups=[1,8]<=[8]
  %relu = f32[8,16]{1,0} maximum(%p, %gathered)
  %ended = f32[8,16]{1,0} all-gather-done(%begun)
  ROOT %all = f32[8,16]{1,0} all-reduce(%relu), replica_groups=[1,8]<=[8], to_apply=%add
"""


def test_collectives_have_the_bytes_of_complete_arrays():
    full = 4 * 8 * 16
    scheduled = [(each.instruction.kind, each.bytes) for each in schedule(program("", COLLECTIVES))]
    assert scheduled == [
        ("all-gather", full),
        ("reduce-scatter", full),
        ("all-gather-start", full),
        ("maximum", 3 * full),
        ("done", 0),
        ("all-reduce", full),
    ]


BESIDE_PRODUCTS = """%begin (p: f32[8,16]) -> (f32[8,16], u32[]) {
  %p = f32[8,16]{1,0} parameter(0)
  %sum.1 = f32[8,16]{1,0} all-reduce(%p), channel_id=7, to_apply=%add
  ROOT %begun = (f32[8,16]{1,0}, u32[]) custom-call(%sum.1), custom_call_target="AsyncCollectiveStart"
}

%beside (q: f32[8,16], r: f32[8,8]) -> (f32[8,16], f32[8,8]) {
  %q = f32[8,16]{1,0} parameter(0)
  %r = f32[8,8]{1,0} parameter(1)
  %sum.2 = f32[8,16]{1,0} all-reduce(%q), channel_id=7, to_apply=%add
  %square = f32[8,8]{1,0} dot(%r, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %both = (f32[8,16]{1,0}, f32[8,8]{1,0}) tuple(%sum.2, %square)
}

%end (s: f32[8,16]) -> f32[8,16] {
  %s = f32[8,16]{1,0} parameter(0)
  %sum.3 = f32[8,16]{1,0} all-reduce(%s), channel_id=7, to_apply=%add
  ROOT %ended = f32[8,16]{1,0} custom-call(%sum.3), custom_call_target="AsyncCollectiveDone"
}

"""  # noqa: E501
STEPS = """  %x = f32[8,16]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %first = (f32[8,16]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%begin
  %g = f32[8,16]{1,0} get-tuple-element(%first), index=0
  %second = (f32[8,16]{1,0}, f32[8,8]{1,0}) fusion(%g, %y), kind=kCustom, calls=%beside
  %h = f32[8,16]{1,0} get-tuple-element(%second), index=0
  ROOT %last = f32[8,16]{1,0} fusion(%h), kind=kCustom, calls=%end
"""


def test_all_reduce_beside_products_of_a_tpu():
    """It counts once, from its start to its end, and the product without it."""
    begin, product, end = schedule(program(BESIDE_PRODUCTS, STEPS))
    assert (begin.instruction.kind, begin.bytes) == ("all-reduce-start", 4 * 8 * 16)
    assert (product.bytes, product.flops) == (2 * 4 * 8 * 8, 2 * 8 * 8 * 8)
    assert (end.instruction.kind, end.bytes) == ("done", 0)
    assert end.instruction.operands == (begin.instruction.name,)


def test_products_of_an_encoder_are_the_analytic_count():
    """One block, and three in a loop; compiled for the CPU."""
    batch, patches, values = 2, 9, 12
    for depth in (1, 3):
        variant = VitVariant(width=32, depth=depth, heads=2, patch=2)
        encoder = make_encoder(variant, (3, 3), execution=ExecutionConfig())
        images = jnp.zeros((batch, patches, values))
        params = jax.eval_shape(encoder.init, jax.random.key(0), images)
        text = jax.jit(encoder.apply).lower(params, images).compile().as_text()
        total = sum(each.flops * each.instruction.runs for each in kernels(text or ""))
        assert total == batch * flops.encoder_flops(variant, patches, patches, values)
