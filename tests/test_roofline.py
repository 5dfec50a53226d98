"""Seconds of kernels and collectives, against programs computed by hand."""

import dataclasses

import pytest

from benchmarks import roofline
from benchmarks.targets import GPUS, TPUS

GPU = dataclasses.replace(
    GPUS["h200"], bandwidth=1e9, flops=1e12, link_bandwidth=1e8, kernel_s=1e-6
)

PROGRAM = """HloModule jit_f

%save (stack: f32[5,250], x: f32[250], i: s32[]) -> f32[5,250] {
  %stack = f32[5,250]{1,0} parameter(0)
  %x = f32[250]{0} parameter(1)
  %i = s32[] parameter(2)
  %row = f32[1,250]{1,0} bitcast(%x)
  ROOT %saved = f32[5,250]{1,0} dynamic-update-slice(%stack, %row, %i, %i)
}

ENTRY %main (a: f32[5,250]) -> f32[250] {
  %a = f32[5,250]{1,0} parameter(0)
  %b = f32[250]{0} parameter(1)
  %n = s32[] parameter(2)
  %gather = (f32[250]{0}, f32[1000]{0}) all-gather-start(%b), replica_groups=[1,4]<=[4]
  %copy = ((f32[5,250]{1,0}, f32[250]{0}, s32[]), f32[5,250]{1,0}, u32[]) fusion-start(%a, %b, %n), kind=kLoop, calls=%save
  %relu = f32[250]{0} maximum(%b, %b), metadata={op_name="jit(f)/jvp(MAE)/encoder/blocks/mlp/max"}
  %copied = f32[5,250]{1,0} fusion-done(%copy)
  %gathered = f32[1000]{0} all-gather-done(%gather)
  ROOT %sum = f32[250]{0} all-reduce(%relu), replica_groups=[1,4]<=[4], to_apply=%add
}
"""  # noqa: E501


def test_seconds_of_a_gpu():
    timed, collectives = roofline.analyze(PROGRAM, GPU)
    save, relu = timed
    assert save.seconds == pytest.approx(2.004e-6 + 1e-6)  # 1000 bytes and the index, 1000 back
    assert relu.seconds == pytest.approx(3e-6 + 1e-6)
    assert relu.category == "gelu"
    gather, total = collectives
    assert (gather.kind, gather.dtypes, gather.bytes) == ("all-gather", "f32", 4000)
    assert gather.seconds == pytest.approx(40e-6)
    # The two kernels between its start and its end hide a part.
    assert gather.exposed == pytest.approx(40e-6 - save.seconds - relu.seconds)
    assert total.exposed == total.seconds == pytest.approx(2 * 1000 / 1e8)


def test_seconds_of_a_tpu_are_its_compilers_cycles():
    line = '  %x = f32[8]{0} add(%a, %b), backend_config={"estimated_cycles":"1750"}'
    text = f"HloModule jit_f\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n{line}\n}}\n"
    ((each,), _) = roofline.analyze(text, TPUS["v6e"])
    assert each.seconds == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("path", "category"),
    [
        ("jit(train_step)/jvp(MAE)/encoder/blocks/attn/qkv/dot_general", "qkv"),
        ("jit(train_step)/transpose(jvp(MAE))/encoder/blocks/attn/proj/reduce_sum", "proj"),
        ("jit(train_step)/jvp(MAE)/decoder/blocks/attn/bthe,bshe->bhts/dot_general", "scores"),
        ("jit(train_step)/jvp(MAE)/decoder/blocks/attn/exp", "softmax"),
        ("jit(train_step)/jvp(MAE)/decoder/blocks/attn/dot_product_attention_fwd", "attention"),
        ("jit(train_step)/jvp(MAE)/decoder/blocks/attn/custom_partitioning", "attention"),
        ("jit(train_step)/jvp(MAE)/while/body/blocks/dynamic_update_index_in_dim", "copies"),
        ("jit(train_step)/transpose(jvp(fold_norms))/reduce_sum", "norms"),
        ("jit(train_step)/jvp(MAE)/decoder/blocks/mlp/fc1/dot_general", "mlp"),
        ("jit(train_step)/jvp(MAE)/decoder/blocks/mlp/erf", "gelu"),
        ("jit(train_step)/jvp(MAE)/decoder/blocks/norm2/reduce_sum", "norms"),
        ("jit(train_step)/jvp(MAE)/encoder/patch_embed/dot_general", "embedding"),
        ("jit(train_step)/optimizer/mul", "optimizer"),
        ("", "other"),
    ],
)
def test_categories(path, category):
    entry = f'  %x = f32[8]{{0}} add(%a, %b), metadata={{op_name="{path}"}}'
    text = f"HloModule jit_f\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n{entry}\n}}\n"
    ((each,), _) = roofline.analyze(text, GPU)
    assert each.category == category


@pytest.mark.parametrize(
    ("name", "cycles", "flops"), [("forward", 10, 4000), ("backward", 20, 10000)]
)
def test_seconds_of_fused_attention_on_a_tpu(name, cycles, flops):
    """By the registers of scores that the kernel declares, or by its bytes if these take longer."""
    estimate = f'{{"cost_estimate":{{"flops":"{flops}","transcendentals":"{700 * 1024}"}}}}'
    line = (
        '  %x = f32[8]{0} custom-call(%a, %b), custom_call_target="tpu_custom_call", '
        f'metadata={{op_name="attn/tpu_attention_{name}_kernel"}}, backend_config={estimate}'
    )
    text = f"HloModule jit_f\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n{line}\n}}\n"
    tpu = dataclasses.replace(TPUS["v6e"], attention_cycles=(10, 20))
    ((each,), _) = roofline.analyze(text, tpu)
    assert each.category == "attention"
    assert each.kernel.flops == flops
    assert each.seconds == pytest.approx(700 * cycles / 1.75e9)
    ((each,), _) = roofline.analyze(text, dataclasses.replace(tpu, bandwidth=1.0))
    assert each.seconds == each.kernel.bytes == 32
