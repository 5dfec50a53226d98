"""What the rows of a suite say together: tables, and the goals."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mae_jax.utils.console import print_table

Entry = dict[str, Any]

# Of training in bfloat16. "mfu" is against the product measured in the same row, images/s are meant
# for one H200, other names are ratios of a step's time: of that implementation over ours.
GOALS = {
    "vit_b16": {"mfu": 0.40, "images/s": 5400, "hf_compile": 1.15, "hf": 1.8},
    "vit_l16": {"mfu": 0.48, "images/s": 3050, "hf_compile": 1.10, "hf": 1.5},
    "vit_h14": {"mfu": 0.52, "images/s": 1410, "hf_compile": 1.10, "hf": 1.4},
}
STRETCH = {"vit_b16": 0.48, "vit_l16": 0.56, "vit_h14": 0.60}  # of "mfu"
OURS = "mae_jax"


def last_words(text: str) -> str:
    """The line of a log that best says why a process failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [
        line for line in lines if re.search(r"error|unknown flag|not do the work", line, re.I)
    ]
    return (telling or lines or ["it said nothing"])[-1][:300]


def goals(rows: Sequence[Entry], about: Entry) -> list[Entry]:
    """Every goal with the best that was measured, in which row, and whether that meets it.

    Where nothing was measured, or not on a GPU, `measured` and `met` are None.
    """
    found = []
    for size, targets in GOALS.items():
        wanted = [*targets.items(), ("stretch: mfu", STRETCH[size])]
        for name, target in wanted:
            values = [] if about["tiny"] else list(_measured(rows, size, name.split()[-1]))
            best, row = max(values, default=(None, None))
            met = None if best is None else best >= target
            found.append(
                {"size": size, "goal": name, "target": target, "measured": best}
                | {"met": met, "row": row}
            )
    return found


def _measured(rows: Sequence[Entry], size: str, goal: str) -> Iterator[tuple[float, str]]:
    """Values for a goal, each with the name of its row."""
    for row in rows:
        flags = row["command"]
        if not {"benchmarks.step", "--task=train", "--dtype=bf16", f"--size={size}"} <= set(flags):
            continue
        for each in row.get("result", {}).get("rows", ()):
            if each["implementation"] == OURS and goal == "mfu":
                yield each["mfu_measured"], row["name"]
            elif each["implementation"] == OURS and goal == "images/s":
                yield each["images_per_s"], row["name"]
            elif each["implementation"] == goal:
                yield each["ratio"]["median"], row["name"]


def show(report: Entry) -> None:
    """Prints everything."""
    where = f"{report['device']} ({report['platform']})"
    if report["tiny"]:
        where = f"TINY sizes on {where}, which say nothing about a GPU"
    done = [row for row in report["rows"] if row["status"] == "done"]
    of = lambda module: [row for row in done if row["command"][0] == f"benchmarks.{module}"]
    if steps := of("step"):
        columns = ("row", "step ms", "images/s", "MFU", "GB", "ratio", "base")
        print_table(f"Steps: {where}", columns, _steps(steps))
        print("MFU: of a product measured beside it. GB: most memory. ratio: time of a step over")
        print("ours. base: images/s over those of the same size without the flags of the row.\n")
    if measured := of("kernels"):
        columns = ("row", "ceiling", "products", "share", "encoder ms", "decoder ms")
        title = "Kernels, TFLOP/s of products and the fastest attention"
        print_table(f"{title}: {where}", columns, map(_kernels, measured))
    if profiles := of("profile"):
        columns = ("row", "step ms", "matmul", "attn", "elem", "optim", "copies", "idle")
        print_table(f"Profiles: {where}", columns, map(_profile, profiles))
    columns = ("size", "goal", "target", "measured", "", "row")
    print_table("Goals", columns, map(_goal, report["goals"]))
    for row in report["rows"]:
        if row["status"] != "done":
            print(f"{row['name']} {row['status']}: {row['error']}")
    if report["left_out"]:
        names = ", ".join(row["name"] for row in report["left_out"])
        print(f"left out, for they did not fit the time: {names}")


def _base(name: str) -> str:
    """The row that a variant is compared with: that of the same size with no flags of its own."""
    return f"{'b' if name.startswith('flag-') else name.partition('-')[0]}-base"


def _steps(rows: Sequence[Entry]) -> Iterator[list[str]]:
    speeds = {row["name"]: row["result"]["rows"][0]["images_per_s"] for row in rows}
    for row in rows:
        base = speeds.get(_base(row["name"]))
        for each in row["result"]["rows"]:
            ours, ratio = each["implementation"] == OURS, each.get("ratio")
            yield [
                row["name"] if ours else f"  {each['implementation']}",
                f"{1e3 * each['step_s']['median']:.2f}",
                f"{each['images_per_s']:,.1f}",
                f"{each['mfu_measured']:.1%}",
                f"{each['peak_bytes'] / 1e9:.2f}",
                f"{ratio['median']:.2f}" if ratio else "",
                f"{each['images_per_s'] / base:.3f}" if ours and base else "",
            ]


def _kernels(row: Entry) -> list[str]:
    result = row["result"]
    linears = result["linears"]

    def fastest(part: str) -> str:
        timed = [
            (each["ms"], each["implementation"])
            for each in result["attention"]
            if each["attention"] == part and "ms" in each
        ]
        return "{:.3f} {}".format(*min(timed)) if timed else "failed"

    return [
        row["name"],
        f"{result['ceiling']['flops_per_s'] / 1e12:.4g}",
        f"{linears['tflops']:.4g}" if linears else "failed",
        f"{linears['share_of_ceiling']:.1%}" if linears else "",
        fastest("encoder"),
        fastest("decoder"),
    ]


def _profile(row: Entry) -> list[str]:
    result = row["result"]
    names = ("matmul", "attention", "norms and elementwise", "optimizer")
    names += ("copies and transposes", "idle")
    shares = [f"{result['categories'][name]:.1%}" for name in names]
    return [row["name"], f"{result['step_ms']:.2f}", *shares]


def _goal(goal: Entry) -> list[str]:
    show = lambda value: f"{value:,.0f}" if value > 100 else f"{value:.2f}"
    words = {None: "not measured", True: "met", False: "missed"}
    measured = "" if goal["measured"] is None else show(goal["measured"])
    cells = [goal["size"], goal["goal"], show(goal["target"]), measured]
    return [*cells, words[goal["met"]], goal["row"] or ""]
