"""The benchmark of compiled train steps, and with it that activations stay on their device."""

import dataclasses

import numpy as np
import pytest

from benchmarks import cluster, hlo, scaling
from benchmarks.hlo import Collective, Shape
from mae_jax.models.variants import VitVariant

PROGRAM = """HloModule jit_f, is_scheduled=true, entry_computation_layout={()->f32[]}, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p.1: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %g = bf16[4,16]{1,0} all-gather(%a), replica_groups=[4,2]<=[8], dimensions={1}
  %s = f32[4]{0} reduce-scatter(%b), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%outer (p.2: (s32[], f32[])) -> (s32[], f32[]) {
  %w.1 = (s32[], bf16[4,16]{1,0}) while(%t), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %r = (f32[2,3]{1,0}, /*index=1*/f32[]) all-reduce(%c, %d), replica_groups={}, to_apply=%add
}

%less (p.3: (s32[], f32[])) -> pred[] {
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x.1: f32[8]) -> f32[] {
  %start = (f32[2]{0}, f32[16]{0}) all-gather-start(%x.1), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %done = f32[16]{0} all-gather-done(%start), metadata={op_name="an all-gather("}
  %p = pred[3]{0} collective-permute(%q), source_target_pairs={{0,1},{1,2}}
  ROOT %w.2 = (s32[], f32[]) while(%t.2), condition=%less, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_collectives_count_as_often_as_their_loops_run():
    found = {(each.kind, each.times): each for each in hlo.collectives(PROGRAM)}
    assert {name: each.payload for name, each in found.items()} == {
        ("all-gather", 1): 64,
        ("all-gather", 15): 128,
        ("reduce-scatter", 15): 16 * 4,
        ("all-reduce", 3): 28,
        ("collective-permute", 1): 3,
    }
    assert [str(shape) for shape in found["all-reduce", 3].shapes] == ["f32[2,3]", "f32[]"]
    assert hlo.total_bytes(list(found.values()), "all-gather") == 64 + 15 * 128
    assert hlo.total_bytes(list(found.values()), "all-to-all") == 0


WIDENED = """HloModule jit_f

%fused (p: bf16[8]) -> f32[8] {
  %p = bf16[8]{0} parameter(0)
  ROOT %c = f32[8]{0} convert(%p)
}

ENTRY %main (x: f32[8], y: bf16[8]) -> f32[16] {
  %x = f32[8]{0} parameter(0)
  %y = bf16[8]{0} parameter(1)
  %f = f32[8]{0} fusion(%y), kind=kLoop, calls=%fused
  %g = f32[16]{0} all-gather(%f), replica_groups={{0,1}}, dimensions={0}
  %h = f32[16]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}
}
"""


def test_what_the_compiler_of_the_cpu_has_widened_is_sent_at_half_the_bytes():
    assert [(each.payload, each.sent) for each in hlo.collectives(WIDENED)] == [(64, 32), (64, 64)]


MESH = "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4]"


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups={{0,4},{1,5}}", [[0, 4], [1, 5]]),
        ("replica_groups=[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (MESH + " {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (MESH + ", device_ids=([4,2]T(1,0)) {'axis_0'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (MESH + " {'axis_0','axis_2'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_of_devices(written, groups):
    text = PROGRAM.replace("replica_groups=[4,2]<=[8]", written)
    found = next(each for each in hlo.collectives(text) if each.shapes[0].dtype == "bf16")
    assert found.groups.tolist() == groups


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="unknown length"):
        hlo.collectives(PROGRAM.replace('"known_trip_count":{"n":"5"}', ""))
    with pytest.raises(ValueError, match="unknown replica groups"):
        hlo.collectives(PROGRAM.replace("[4,2]<=[8]", "mesh['x'=8] {'x':(1)2}"))
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives("")


def test_arrays_of_a_batch():
    assert Shape("f32", (64, 8, 5)).has_rows(64, {5})
    assert Shape("f32", (320, 8)).has_rows(64, {4, 5})
    assert not Shape("f32", (320, 8)).has_rows(64, {4})
    assert not Shape("f32", (64, 5)).has_rows(64, {5})  # a parameter may well be


def test_predicted_seconds_of_collectives():
    links = cluster.Cluster(
        peak_flops=1e12,
        node_devices=4,
        node_bandwidth=1000.0,
        network_bandwidth=100.0,
        node_latency=1.0,
        network_latency=10.0,
    )

    def seconds(kind, groups):
        each = Collective(kind, (Shape("f32", (200,)),), np.array(groups), 1)
        return cluster.collective_seconds(each, links)

    assert seconds("all-gather", [[0, 1, 2, 3]]) == pytest.approx(0.75 * 0.8 + 3)
    assert seconds("all-reduce", [[0, 1, 2, 3]]) == pytest.approx(1.5 * 0.8 + 4)
    assert seconds("all-reduce", [[0, 4], [1, 5]]) == pytest.approx(8 + 20)
    whole_nodes = seconds("all-gather", [list(range(8))])
    assert whole_nodes == pytest.approx(7 / 8 * 800 / 400 + 2 * (3 + 10))
    found = [Collective("all-reduce", (Shape("f32", (200,)),), np.arange(4)[None], 2)]
    prediction = cluster.predict(4e11, found, links)
    assert prediction["step_seconds"] == pytest.approx(1 + 2 * 5.2)
    assert prediction["step_seconds_overlapped"] == pytest.approx(2 * 5.2)
    assert prediction["efficiency"] == pytest.approx(1 / 11.4)


TINY = scaling.Setup(
    size=VitVariant(64, 3, 2, 8, decoder_width=32, decoder_depth=2, decoder_heads=2),
    fsdp=4,
    per_device_batch=24,
    image_size=40,
    min_split_bytes=2048,
)


@pytest.fixture(scope="module")
def pinned():
    return scaling.report(scaling.compile_step(TINY), cluster.Cluster(peak_flops=1e12))


def test_activations_stay_on_their_devices(pinned):
    assert pinned["global_batch"] == 96
    assert pinned["foreign_arrays"] == pinned["global_batch_arrays"] == []
    assert pinned["params_bytes"] < pinned["all_gather_bytes"] < 2.1 * pinned["params_bytes"]
    assert pinned["params_bytes"] <= pinned["all_reduce_bytes"] < 1.1 * pinned["params_bytes"]


def test_bfloat16_weights_are_gathered_as_such(pinned):
    """Half of the bytes but for biases, though the CPU's compiler widens what it sends."""
    program = scaling.compile_step(dataclasses.replace(TINY, dtype="bf16"))
    found = hlo.collectives(program.compiled.as_text())
    sent = sum(each.sent * each.times for each in found if each.kind == "all-gather")
    assert 0.5 <= sent / pinned["all_gather_bytes"] < 0.51
    row = scaling.report(program, cluster.Cluster(peak_flops=1e12))
    assert row["foreign_arrays"] == row["global_batch_arrays"] == []
    assert row["temp_bytes_per_device"] < pinned["temp_bytes_per_device"]


def test_a_model_that_is_not_pinned_is_found_out(pinned):
    program = scaling.compile_step(dataclasses.replace(TINY, pinned=False))
    loose = scaling.report(program, cluster.Cluster(peak_flops=1e12))
    assert loose["global_batch_arrays"]
    assert loose["all_gather_bytes"] > 2.1 * loose["params_bytes"]


def test_memory_is_that_of_the_layout(pinned):
    state = pinned["params_bytes_per_device"] + pinned["optimizer_bytes_per_device"]
    images = 24 * 40 * 40 * 3
    numbers = 3 * 4  # step, position, skipped
    assert pinned["args_bytes_per_device"] == state + images + numbers
    assert pinned["params_bytes_per_device"] < 0.3 * pinned["params_bytes"]
    assert 0 < pinned["prediction"]["efficiency"] < 1


def test_copies_only_reduce_gradients():
    program = scaling.compile_step(dataclasses.replace(TINY, fsdp=1))
    row = scaling.report(program, cluster.Cluster(peak_flops=1e12))
    assert row["all_gather_bytes"] == 0
    assert row["all_reduce_bytes"] == row["params_bytes"] + 4  # and the loss
    assert row["params_bytes_per_device"] == row["params_bytes"]


def test_a_state_that_stays_whole_is_refused():
    with pytest.raises(ValueError, match="mesh.fsdp=4 leaves 100 %"):
        scaling.compile_step(dataclasses.replace(TINY, min_split_bytes=2**30))
