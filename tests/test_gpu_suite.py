"""What the benchmarks of one GPU count, choose and read; real runs of them are in tests/faults."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks import gpu_suite, kernels, operations, suite_report, timing, traces
from benchmarks.kernels import Tokens
from benchmarks.suite_run import Row, Suite, expected_seconds
from benchmarks.traces import Interval
from mae_jax.models.flops import encoder_flops, forward_flops
from mae_jax.models.variants import VARIANTS

ROOT = Path(__file__).parent.parent
ABOUT = {"platform": "gpu", "device": "a GPU", "tiny": False}
PATCHES = {"vit_b16": 196, "vit_l16": 196, "vit_h14": 256}


# Kernels


@pytest.mark.parametrize(("name", "patches"), PATCHES.items())
def test_linears_and_attentions_are_all_that_is_counted(name, patches):
    size, kept = VARIANTS[name], patches // 4
    values = size.patch**2 * 3
    paper = Tokens(patches, kept + 1, patches + 1, patches + 1)
    encoder, decoder, whole = kernels.attentions(size, patches, paper)
    linears = sum(each.flops() * each.times for each in kernels.linears(size, paper))
    attention = encoder.flops() * size.depth + decoder.flops() * size.decoder_depth
    assert linears + attention == forward_flops(size, patches, kept, values)

    images = Tokens(patches, patches + 1, 0, 0)
    linears = sum(each.flops() * each.times for each in kernels.linears(size, images)[:5])
    expected = encoder_flops(size, patches, patches, values)
    assert linears + whole.flops() * size.depth == expected


def test_our_step_embeds_what_is_kept_and_predicts_what_is_not():
    tokens = kernels.step_tokens(196, 49)
    found = {each.name: each for each in kernels.linears(VARIANTS["vit_b16"], tokens)}
    shape = lambda name: (found[name].tokens, found[name].inputs, found[name].outputs)
    assert shape("patch_embed") == (49, 768, 768)
    assert shape("encoder qkv") == (50, 768, 2304)
    assert shape("decoder fc2") == (197, 2048, 512)
    assert shape("head") == (147, 512, 768)


def test_products_of_a_layer_are_its_gradients():
    x, kernel, gradient = timing.random_arrays(
        jax.random.key(0), [(6, 4), (4, 5), (6, 5)], jnp.float32
    )
    result, backward = jax.vjp(jnp.matmul, x, kernel)
    expected = (result, *backward(gradient))
    for product, array in zip(kernels.PRODUCTS.values(), expected):
        assert jnp.allclose(product(x, kernel, gradient), array, atol=1e-5)


def test_what_fails_is_a_row_with_its_reason():
    heads = kernels.Heads("encoder", 3, 2, 8)
    works, fails = (kernels.measure_attention(heads, 2, "f32", by, 1e-4) for by in ("xla", "cudnn"))
    assert works["ms"] > 0
    assert works["distance"] < 1e-5
    assert "ms" not in fails
    assert "cudnn" in fails["error"].lower()


def test_a_call_has_work_enough_but_not_too_much_memory():
    assert timing.copies_for(1e12, assumed=5e14, bytes_each=1000) == 2
    assert timing.copies_for(1e11, assumed=5e14, bytes_each=1000) == 10
    assert timing.copies_for(1.0, assumed=5e14, bytes_each=1000) == 16
    assert timing.copies_for(1.0, assumed=5e14, bytes_each=10**9) == 4


# Profiles


def test_moments_are_shared_and_gaps_are_idle():
    found = [Interval("a", 0, 10), Interval("b", 6, 10), Interval("a", 20, 25)]
    assert traces.attribute([*found, Interval("c", 22, 22)]) == ({"a": 13, "b": 2}, 10)


def test_what_reads_a_result_begins_after_its_end():
    program = operations.operations("""
ENTRY %main (x: f32[4]) -> f32[4] {
  %gelu = f32[4]{0} exponential(%x)
  %seen = f32[2,2]{1,0} bitcast(%gelu)
  %product = f32[2,2]{1,0} dot(%seen, %seen), lhs_contracting_dims={1}
  ROOT %other = f32[4]{0} negate(%x)
}
""")
    intervals = [Interval("product", 0, 1), Interval("gelu", 2, 9), Interval("other", 3, 4)]
    found = traces.ended([*intervals, Interval("product", 5, 8)], program)
    assert [each.end for each in found] == [1, 5, 4, 8]


PROGRAM = """HloModule jit_step

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %t = f32[4]{0} transpose(%p), dimensions={0}
}

%gemm (p.1: f32[4]) -> f32[4] {
  ROOT %d = f32[4,4]{1,0} dot(%p.1, %p.1), lhs_contracting_dims={1}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], /*index=1*/f32[4]{0}) while(%x), condition=%c, body=%b
  %moved.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(s)/jvp(MAE)/encoder/blocks/attn/transpose"}
  %gemm.2 = f32[4]{0} fusion(%x), kind=kCustom, calls=%gemm, metadata={op_name="jit(s)/transpose(jvp(MAE))/decoder/while/body/blocks/attn/qkv/dot_general"}
  %scores = f32[4]{0} dot(%x, %x), metadata={op_name="jit(s)/jvp(MAE)/decoder/blocks/attn/vmap(BTNH,BSNH->BNTS)/dot_general"}
  %flash = (f32[4]{0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  %blas = (f32[4]{0}, s8[8]{0}) custom-call(%x), custom_call_target="__cublas$gemm", metadata={op_name="jit(s)/jvp(MAE)/encoder/mlp/fc1/dot_general"}
  %norm = f32[4]{0} multiply(%x, %x), metadata={op_name="jit(s)/jvp(MAE)/encoder/norm/mul"}
  %adam.3 = f32[4]{0} add(%x, %x), metadata={op_name="jit(s)/add"}
  %order = f32[4]{0} sort(%x), dimensions={0}, metadata={op_name="jit(s)/jit(argsort)/sort"}
  %sum = f32[4]{0} all-reduce-start(%x), to_apply=%add
  ROOT %out = f32[4]{0} copy(%x)
}
"""  # noqa: E501


def test_what_operations_are_for():
    found = operations.operations(PROGRAM)
    category = lambda name: (operations.category(found[name]), operations.part(found[name]))
    assert category("moved.1") == (operations.COPIES, "encoder forward")
    assert category("gemm.2") == (operations.MATMUL, "decoder backward")
    assert category("scores") == (operations.ATTENTION, "decoder forward")
    assert category("flash")[0] == operations.ATTENTION
    assert category("blas") == (operations.MATMUL, "encoder forward")
    assert category("norm") == (operations.ELEMENTWISE, "encoder forward")
    assert category("adam.3") == (operations.OPTIMIZER, "optimizer and metrics")
    assert category("order") == (operations.MASKS, operations.MASKS)
    assert category("sum")[0] == operations.COLLECTIVES
    assert category("out") == (operations.COPIES, "added by XLA")
    assert found["w"].opcode in operations.CONTROL


def test_shares_sum_to_one_and_kernels_are_found_by_their_names():
    seen = [Interval("w", 0, 100), Interval("gemm_2", 0, 6), Interval("nvjet_tst_128", 8, 10)]
    found = traces.shares(seen, operations.operations(PROGRAM))
    assert found["nanoseconds"] == 10  # a loop is not work of its own
    assert sum(found["categories"].values()) == pytest.approx(1)
    assert found["categories"][operations.MATMUL] == pytest.approx(0.8)
    assert found["parts"] == pytest.approx({"decoder backward": 0.6, "unknown": 0.2, "idle": 0.2})
    assert found["unknown"] == pytest.approx(0.2)
    assert [each["name"] for each in found["longest"]] == ["gemm_2", "nvjet_tst_128"]


GPU_TRACE = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #13(Compute)"
    timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 6000 stats { metadata_id: 1 str_value: "gemm.2" } }
    events { metadata_id: 2 offset_ps: 8000 duration_ps: 2000 }
  }
  lines {
    name: "XLA Modules"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 90000 }
  }
  event_metadata { key: 1 value { id: 1 name: "nvjet_tst_128x256" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyD2D" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 500 } } }
"""  # noqa: E501


# The event's statistics are a type of jaxlib's that names no module.
@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_kernels_of_a_gpu_are_those_of_its_streams(tmp_path):
    trace = ProfileData.text_proto_to_serialized_xspace(GPU_TRACE)
    (tmp_path / "host.xplane.pb").write_bytes(trace)
    found = traces.read_intervals(tmp_path, "jit_step")
    assert found == [Interval("gemm.2", 1000, 1006), Interval("MemcpyD2D", 1008, 1010)]
    (tmp_path / "host.xplane.pb").write_bytes(b"")
    with pytest.raises(ValueError, match="the profiler saw no operation of jit_step"):
        traces.read_intervals(tmp_path, "jit_step")


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", operations.ATTENTION),
        ("sm90_xmma_gemm_bf16bf16", operations.MATMUL),
        ("MemcpyD2D", operations.COPIES),
        ("ncclDevKernel_AllReduce_Sum_f32", operations.COLLECTIVES),
        ("loop_add_fusion_3", operations.ELEMENTWISE),
    ],
)
def test_kernels_that_are_no_instructions(kernel, kind):
    assert operations.kernel_category(kernel) == kind


# The suite


def test_the_driver_leaves_the_gpu_to_the_rows():
    code = "import sys, benchmarks.gpu_suite; print(*{'jax', 'torch', 'flax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("module", ["kernels", "profile"])
def test_rows_need_nothing_that_reads_data(module):
    preparing = {"grain", "tensorflow_datasets", "ml_collections", "tensorboardX", "torch"}
    code = f"import sys, benchmarks.{module}; print(*{preparing} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_rows_have_names_of_their_own_and_flags_that_their_benchmarks_take():
    from benchmarks import step

    found = gpu_suite.rows(tiny=False)
    assert len({row.name for row in found}) == len(found)
    assert [row.name for row in found[:3]] == ["train-b", "profile-b", "b-base"]
    names = [row.name for row in found]
    first = found[: names.index("flag-gemm-no-triton") + 1]
    assert sum(row.estimate for row in first) <= 20 * 60
    assert [row.name for row in gpu_suite.rows(tiny=True)] == [row.name for row in found]
    for row in found:
        if row.module == "benchmarks.step":
            step.parse(row.arguments[1:])


def test_rows_are_chosen_by_patterns():
    found = gpu_suite.rows(tiny=False)
    names = [row.name for row in gpu_suite.choose(found, "train-b,kernels-?")]
    assert names == ["train-b", "kernels-b", "kernels-l", "kernels-h"]
    with pytest.raises(ValueError, match="--only=nothing: there is no such row; there are train-b"):
        gpu_suite.choose(found, "train-b,nothing")


def test_estimates_learn_from_rows_that_are_done():
    row = Row("b", "benchmarks.step", {}, 10, "")
    done = lambda module, seconds: {"command": [module], "seconds": seconds, "estimate": 10}
    assert expected_seconds(row, []) == 10
    assert expected_seconds(row, [done("benchmarks.kernels", 5)]) == 5
    rows = [done("benchmarks.kernels", 5), *(done("benchmarks.step", x) for x in (20, 40, 90))]
    assert expected_seconds(row, rows) == 40


@pytest.fixture
def suite_of(tmp_path, monkeypatch):
    """Suites whose rows are modules that do as they are told: `works` and `fails`."""
    (tmp_path / "works.py").write_text(
        "import sys\npath = sys.argv[-1].removeprefix('--json=')\nopen(path, 'w').write('{}')\n"
    )
    (tmp_path / "fails.py").write_text(
        "import sys\nsys.exit('Traceback\\nValueError: no such flag\\nand more')\n"
    )
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(60)\n")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}

    def make(fresh=False, about=ABOUT):
        return Suite(tmp_path / "out", about, environment, [], fresh=fresh)

    return make


def rows_of(*names, estimate=1.0, **flags):
    return [Row(name, name.split("-")[0], flags, estimate, "") for name in names]


def read(tmp_path):
    return json.loads((tmp_path / "out" / "suite.json").read_text())


def test_a_row_that_fails_stops_nobody(suite_of, tmp_path):
    suite_of().run(rows_of("works-a", "fails", "works-b"), 100)
    rows = {row["name"]: row for row in read(tmp_path)["rows"]}
    assert [row["status"] for row in rows.values()] == ["done", "failed", "done"]
    assert rows["fails"]["error"] == "ValueError: no such flag"
    assert rows["works-a"]["result"] == {}


def test_what_does_not_fit_is_left_out(suite_of, tmp_path):
    large, small = rows_of("works-large", estimate=1000.0), rows_of("works-small")
    suite_of().run([*large, *small], 100)
    report = read(tmp_path)
    assert [row["name"] for row in report["rows"]] == ["works-small"]
    assert report["left_out"] == [{"name": "works-large", "expected_s": 1000}]


def test_a_row_that_takes_too_long_is_stopped(suite_of, tmp_path):
    suite_of().run(rows_of("sleeps", estimate=0.1), 1.0)
    (row,) = read(tmp_path)["rows"]
    assert (row["status"], row["error"]) == ("stopped", "stopped after 1 s")
    assert row["seconds"] < 10


def test_the_same_command_goes_on_where_it_was(suite_of, tmp_path):
    rows = rows_of("works-a", "fails", "works-b")
    suite_of().run(rows[:2], 100)
    dates = {row["name"]: row["date"] for row in read(tmp_path)["rows"]}
    (tmp_path / "fails.py").write_text((tmp_path / "works.py").read_text())
    suite_of().run(rows, 100)
    found = {row["name"]: row for row in read(tmp_path)["rows"]}
    assert [row["status"] for row in found.values()] == ["done"] * 3
    assert found["works-a"]["date"] == dates["works-a"]
    suite_of().run(rows_of("works-a", batch=2), 100)  # another row of the same name
    changed = {row["name"]: row for row in read(tmp_path)["rows"]}["works-a"]
    assert changed["command"] == ["works", "--batch=2"]
    assert suite_of(fresh=True).report["rows"] == []


def test_rows_of_another_device_or_a_damaged_file_are_refused(suite_of, tmp_path):
    suite_of().run(rows_of("works-a"), 100)
    with pytest.raises(ValueError, match="holds rows of .*another --out, or --fresh"):
        suite_of(about=ABOUT | {"device": "another GPU"})
    (tmp_path / "out" / "suite.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read .*--fresh"):
        suite_of()


def step_row(name, size, *rows, dtype="bf16"):
    command = ["benchmarks.step", "--task=train", f"--size={size}", f"--dtype={dtype}"]
    return {"name": name, "command": command, "status": "done", "result": {"rows": list(rows)}}


def test_goals_take_the_best_that_was_measured():
    ours = lambda mfu, speed: {
        "implementation": "mae_jax",
        "mfu_measured": mfu,
        "images_per_s": speed,
    }
    compiled = {"implementation": "hf_compile", "ratio": {"median": 1.2}}
    rows = [
        step_row("train-b", "vit_b16", ours(0.39, 5000), compiled),
        step_row("b-unroll", "vit_b16", ours(0.45, 5900)),
        step_row("train-b-f32", "vit_b16", ours(0.99, 9900), dtype="f32"),
        {"name": "train-l", "command": ["benchmarks.step"], "status": "failed", "error": ""},
    ]
    found = {(goal["size"], goal["goal"]): goal for goal in suite_report.goals(rows, ABOUT)}
    result = lambda name: [found["vit_b16", name][key] for key in ("measured", "met", "row")]
    assert result("mfu") == [0.45, True, "b-unroll"]
    assert result("stretch: mfu") == [0.45, False, "b-unroll"]
    assert result("images/s") == [5900, True, "b-unroll"]
    assert result("hf_compile") == [1.2, True, "train-b"]
    assert result("hf") == [None, None, None]
    assert found["vit_l16", "mfu"]["met"] is None
    tiny = suite_report.goals(rows, ABOUT | {"tiny": True})
    assert all(goal["met"] is None for goal in tiny)


def test_last_words():
    text = "Traceback\nValueError: bad\nduring teardown\n"
    assert suite_report.last_words(text) == "ValueError: bad"
    assert suite_report.last_words("F1 Unknown flag in XLA_FLAGS: --a\n*** stack") == (
        "F1 Unknown flag in XLA_FLAGS: --a"
    )
    assert suite_report.last_words("killed\n") == "killed"
    assert suite_report.last_words("\n") == "it said nothing"


def test_the_table_compares_with_peers_and_with_the_row_without_flags(capsys):
    each = lambda name, speed, **more: {
        "implementation": name,
        "step_s": {"median": 0.05},
        "images_per_s": speed,
        "mfu_measured": 0.4,
        "peak_bytes": 3e10,
        **more,
    }
    rows = [
        step_row(
            "train-b", "vit_b16", each("mae_jax", 5100), each("hf", 9, ratio={"median": 1.93})
        ),
        step_row("b-base", "vit_b16", each("mae_jax", 5000)),
        step_row("flag-buffer-unrolled", "vit_b16", each("mae_jax", 5600)),
        {"name": "flag-a", "command": [], "status": "failed", "error": "Unknown flag"},
    ]
    left_out = [{"name": "encode-l", "expected_s": 9}]
    goals = suite_report.goals(rows, ABOUT)
    suite_report.show(ABOUT | {"rows": rows, "goals": goals, "left_out": left_out})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["hf", "50.00", "9.0", "40.0%", "30.00", "1.93"] in lines
    assert ["flag-buffer-unrolled", "50.00", "5,600.0", "40.0%", "30.00", "1.120"] in lines
    assert ["vit_b16", "hf", "1.80", "1.93", "met", "train-b"] in lines
    assert ["flag-a", "failed:", "Unknown", "flag"] in lines
    assert lines[-1][-1] == "encode-l"
