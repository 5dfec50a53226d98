"""What holds the speed of the train step where nothing can be timed: its program, counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import counts, program, scaling
from mae_jax.distributed import sharding
from mae_jax.models.variants import VitVariant

# As wide as ViT-B, for products to outweigh all else.
WIDE = scaling.Setup(
    size=VitVariant(768, 2, 12, 16, decoder_depth=2), fsdp=1, per_device_batch=4, remat="none"
)
DTYPES = list(scaling.DTYPES)


@pytest.fixture(scope="module")
def steps():
    """The compiled step of the budgets, by dtype."""
    return {
        dtype: program.compile_step(dataclasses.replace(program.TINY, dtype=dtype))
        for dtype in DTYPES
    }


@pytest.mark.parametrize("flops", [program.forward_flops, program.train_flops])
def test_no_operation_beyond_what_the_form_needs(flops):
    by_xla, counted = flops(WIDE)
    assert by_xla == pytest.approx(counted, rel=0.03)


def test_no_float32_product_in_bfloat16(steps):
    found = {
        dtype: counts.lowered_products(step.lowered.as_text()) for dtype, step in steps.items()
    }
    assert len(counts.float32(found["f32"])) == len(found["f32"]) > 20
    assert len(found["bf16"]) > 20
    assert counts.float32(found["bf16"]) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_budget(steps, dtype):
    budgets, version = program.read_budgets(), program.minor_version()
    command = "python -m benchmarks.program --record"
    if version not in budgets:
        pytest.skip(f"no budgets for jax {version}: {command}")
    budget, now = budgets[version][dtype], program.measure(steps[dtype])
    over = {name: (now[name], most) for name, most in budget.items() if now[name] > most}
    assert not over, f"now, and at most; if so much is meant to be: {command}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_state_is_donated(steps, dtype):
    step = steps[dtype]
    state = sum(sharding.bytes_per_device(step.shapes, step.shardings))
    assert step.compiled.memory_analysis().alias_size_in_bytes == state


def test_a_step_leaves_nothing_of_the_state_before(steps):
    step = steps["f32"]
    zeros = lambda leaf, where: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), where)
    state = jax.tree.map(zeros, step.shapes, step.shardings)
    images = np.zeros((32, 64, 64, 3), np.uint8)
    step.compiled(state, sharding.shard_batch({"image": images}, step.mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


LOOP = """HloModule jit_f, is_scheduled=true

%fused (p: bf16[4,8]) -> f32[8,4] {
  %p = bf16[4,8]{1,0} parameter(0)
  %c = f32[4,8]{1,0} convert(%p)
  ROOT %t = f32[8,4]{1,0} transpose(%c), dimensions={1,0}
}

%body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %f = f32[8,4]{1,0} fusion(%a), kind=kLoop, calls=%fused
  %d = f32[8,8]{1,0} dot(%f, %b), metadata={op_name="layer/product"}
}

%less (s.1: (s32[], f32[8,4])) -> pred[] {
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[8,4]) -> f32[8,8] {
  %b = f32[4,8]{1,0} parameter(1)
  %x = bf16[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]) while(%t.1), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %g = (bf16[8,8]{1,0}, s8[9]) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  ROOT %k = f32[4,8]{1,0} copy(%b)
}
"""  # noqa: E501


def test_instructions_count_as_often_as_they_run():
    found = counts.counts(LOOP)
    assert found == {
        "transpose": 3,
        "copy": 1,
        "gather": 0,
        "scatter": 0,
        "sort": 0,
        "convert": 3,
        "while": 1,
    }
    products = counts.products(LOOP)
    assert [(each.operands, each.times) for each in products] == [
        (("f32", "f32"), 3),
        (("bf16", "bf16"), 1),
    ]
    assert [each.source for each in counts.float32(products)] == ["layer/product"]
    with pytest.raises(ValueError, match="unknown length"):
        counts.counts(LOOP.replace("known_trip_count", "trips"))


def test_a_product_that_gives_float32_takes_bfloat16_as_it_is():
    """On CPUs too; one that gives bfloat16 is widened there by some versions of XLA."""
    product = lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 512), (512, 256))]
    with jax.default_matmul_precision("default"):
        native, wide = (
            jax.jit(function).lower(*shapes).compile().as_text()
            for function in (product, lambda x, w: product(x.astype("float32"), w))
        )
    assert [each.operands for each in counts.products(native)] == [("bf16", "bf16")]
    assert [each.operands for each in counts.products(wide)] == [("f32", "f32")]
