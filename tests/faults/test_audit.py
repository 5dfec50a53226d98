"""What commands write, under bad conditions: real processes, the table in fault_tolerance.md."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL
from run_helpers import ROOT, environment, write_tiny

from mae_jax.convert import weights

# Runs commands one after the other, as `mae-jax` does; the fault happens when a command renames
# its temporary file: the folder is deleted, or the process killed.
DRIVER = """
import contextlib, importlib, io, json, os, shutil, signal, sys, traceback

out, fault, commands = json.loads(sys.argv[1])
from mae_jax.utils import cli
import mae_jax.convert.weights

armed = [True]

def hook(event, values):
    if armed[0] and event == "os.rename" and os.fsdecode(values[0]).startswith(out):
        armed[0] = False
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "gone":
            shutil.rmtree(out)

if fault in ("killed", "gone"):
    sys.addaudithook(hook)
results = {}
for name, (module, argv) in commands.items():
    code, text = 0, io.StringIO()
    sys.argv = ["mae-jax " + name, *argv]
    if fault == "gone":
        os.makedirs(out, exist_ok=True)
        armed[0] = True
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            cli.run_command(importlib.import_module(module).main)
        except SystemExit as error:
            code = error.code
        except BaseException:
            code = "traceback"
            traceback.print_exc()
    results[name] = (code, text.getvalue(), os.path.exists(out))
print(json.dumps(results))
"""
FILES = {  # written by a command, under the name of its row in the table
    "`features`": "f.npz",
    "`predict`": "p.csv",
    "`reconstruct`": "r.png",
    "`evaluate`": "e.json",
    "`data check`": "bad.txt",
    "`convert`, one file": "official.safetensors",
}
FOLDERS = {
    "`convert --to hf`": "hf",
    "`convert --to timm`": "timm",
    "`convert --to mae_jax`": "mae_jax",
    "`push`": "pushed",
}
WRITTEN = FILES | FOLDERS
CONDITIONS = ("odd path", "disk full", "read-only", "gone in the middle", "killed", "two at once")
OLD = "old"
AS_ROOT = ("disk full", "read-only")  # which mount a small disk


@pytest.fixture(scope="session")
def inputs(golden, tmp_path_factory):
    """A folder of images in two classes and splits, and a tiny classifier."""
    folder = tmp_path_factory.mktemp("audit")
    write_tiny(folder)
    encoder = weights.encoder_only(weights.read(golden / OFFICIAL, **HEADS))
    rng = np.random.default_rng(0)
    head = {
        "head/kernel": rng.normal(size=(encoder.info.width, 2)).astype(np.float32),
        "head/bias": np.zeros(2, np.float32),
    }
    info = dataclasses.replace(encoder.info, num_classes=2)
    classifier = dataclasses.replace(encoder, arrays=encoder.arrays | head, info=info)
    weights.write(classifier, folder / "classifier", "mae_jax")
    return folder, golden / OFFICIAL


def commands_for(inputs, out):
    """Return the module and flags of each command, by name of what it writes."""
    folder, official = map(str, inputs)
    images, heads = f"{folder}/val/dark", ["--num-heads", "2", "--decoder-num-heads", "2"]
    model = ["--checkpoint", official, *heads]
    paths = {name: str(out / file) for name, file in WRITTEN.items()}
    convert, data = "mae_jax.convert.__main__", "mae_jax.data.__main__"

    def to(name, dialect):
        return convert, [official, paths[name], "--to", dialect, "--overwrite", *heads]

    classifier = ["--checkpoint", f"{folder}/classifier"]
    evaluate = ["--data", folder, "--eval-split", "val", "--suite", "knn", *model]
    pushed = ["--out", paths["`push`"], "--overwrite", *heads]
    timm, (_, flags) = "`convert --to timm`", to("`convert --to timm`", "timm")
    commands = {
        "`features`": ("mae_jax.features", [images, *model]),
        "`predict`": ("mae_jax.predict", [images, *classifier]),
        "`reconstruct`": ("mae_jax.reconstruct", [images, *model, "--target", "pixels"]),
        "`evaluate`": ("mae_jax.evaluate.__main__", evaluate),
        "`data check`": (data, ["check", images]),
    }
    for name, (_, argv) in commands.items():
        argv += ["--out", paths[name]]
    return commands | {
        "`convert`, one file": to("`convert`, one file", "official"),
        "`convert --to hf`": to("`convert --to hf`", "hf"),
        timm: (convert, [*flags, "--encoder-only"]),
        "`convert --to mae_jax`": to("`convert --to mae_jax`", "mae_jax"),
        "`push`": ("mae_jax.convert.push", [official, "me/vit", *pushed]),
    }


def start(out, fault, commands):
    argv = [sys.executable, "-c", DRIVER, json.dumps([str(out), fault, commands])]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(argv, cwd=ROOT, env=environment(), **pipes)


def finish(process):
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, output + errors
    return json.loads(output.splitlines()[-1])


def write_old(out):
    out.mkdir(parents=True, exist_ok=True)
    for file in FILES.values():
        (out / file).write_text(OLD)


def mount(out, *options):
    subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(out)], check=True)


def fill(out):
    """Fill a disk to the last byte."""
    with (out / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


@pytest.fixture(scope="session")
def results(inputs, tmp_path_factory):
    """Return a function of a condition: its folder, and the results of each process in it.

    The processes of a condition run once, for all commands.
    """
    done, mounted = {}, []

    def run(condition):
        if condition in done:
            return done[condition]
        base = tmp_path_factory.mktemp("out")
        out = base / ("a b [x] *?\nü" if condition == "odd path" else "out")
        out.mkdir()
        if condition in AS_ROOT:
            mount(out, "-o", "size=1m")
            mounted.append(out)
        write_old(out)
        if condition == "disk full":
            fill(out)
        if condition == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(out)], check=True)
        fault = "gone" if condition == "gone in the middle" else ""
        count = 2 if condition == "two at once" else 1
        processes = [start(out, fault, commands_for(inputs, out)) for _ in range(count)]
        done[condition] = out, [finish(process) for process in processes]
        return done[condition]

    yield run
    for out in mounted:
        subprocess.run(["umount", str(out)], check=True)


@pytest.fixture(scope="session")
def killed(inputs, tmp_path_factory):
    """Kill each command before it renames what it wrote, then run all of them again.

    Returns the folder, the return codes of the killed, what they left, and the later results.
    """
    out = tmp_path_factory.mktemp("killed")
    write_old(out)
    codes, left = {}, {}
    for name, command in commands_for(inputs, out).items():
        process = start(out, "killed", {name: command})
        process.communicate(timeout=600)
        codes[name] = process.returncode
        path = out / WRITTEN[name]
        left[name] = path.read_text() if path.is_file() else path.exists()
    parts = {name: parts_of(out, WRITTEN[name]) for name in WRITTEN}
    return out, codes, left, parts, finish(start(out, "", commands_for(inputs, out)))


def parts_of(out, file):
    """Return the temporary files of a file or folder."""
    return [path.name for path in out.iterdir() if path.name.startswith(f".{file}.")]


def assert_complete(out, name):
    path = out / WRITTEN[name]
    assert not parts_of(out, WRITTEN[name])
    if name in FOLDERS:
        assert "config.json" in os.listdir(path) or name.endswith("mae_jax`")
        assert weights.read(path).arrays
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            assert len(arrays["files"]) == len(arrays["cls"]) == 3
    elif path.suffix == ".csv":
        assert len(path.read_text().splitlines()) == 1 + 3 * 2
    elif path.suffix == ".json":
        assert json.loads(path.read_text())
    elif path.suffix == ".png":
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
    elif path.suffix == ".safetensors":
        assert weights.read(path, **HEADS).arrays
    else:
        assert path.read_text() == "", "no image is bad"


def assert_one_sentence(code, text):
    assert code in (1, 2), text
    assert "Traceback" not in text
    assert len(re.findall(r"^error: .+", text, re.MULTILINE)) == 1, text


def assert_old(out, name):
    path = out / WRITTEN[name]
    assert not parts_of(out, WRITTEN[name])
    assert path.read_text() == OLD if name in FILES else not path.exists()


NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
CELLS = [
    pytest.param(name, condition, marks=NEEDS_ROOT if condition in AS_ROOT else ())
    for condition in CONDITIONS
    for name in WRITTEN
    if (name, condition) != ("`data check`", "disk full")  # its list is empty, which needs no room
]


@pytest.mark.parametrize(("name", "condition"), CELLS)
def test_cell(name, condition, request):
    if condition == "killed":
        out, codes, left, _, again = request.getfixturevalue("killed")
        assert codes[name] == -signal.SIGKILL
        assert left[name] == (OLD if name in FILES else False)
        assert again[name][0] == 0, again[name][1]
        assert_complete(out, name)
        return
    out, processes = request.getfixturevalue("results")(condition)
    for process in processes:
        code, text, exists = process[name]
        if condition in ("odd path", "two at once"):
            assert code == 0, text
            assert "Traceback" not in text
            assert_complete(out, name)
        else:
            assert_one_sentence(code, text)
            if condition == "gone in the middle":
                assert not exists, "what was deleted is not made again"
            else:
                assert_old(out, name)


def test_killed_commands_had_written_something(killed):
    """Otherwise nothing is shown by their removal."""
    assert all(killed[3].values()), killed[3]


def test_the_table_names_the_tested_cells():
    text = (ROOT / "docs" / "fault_tolerance.md").read_text()
    lines = text.split("## What is written, and what can happen to it")[1].split("\n\n")[2]
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()
    ]
    tested = {
        (row[0], condition)
        for row in rows
        for condition, cell in zip(header[1:], row[1:], strict=True)
        if cell == "tested"
    }
    assert tested == {tuple(cell.values) for cell in CELLS}
