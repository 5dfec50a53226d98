"""The scripts of published comparisons, a hundred times shorter, on generated data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from image_helpers import encoded, noise_image
from run_helpers import ROOT, environment

SMALL = ["--config.model.depth=1", "--config.model.width=24", "--config.model.decoder_depth=1"]
SMALL += ["--config.batch_size=16", "--config.log.every_steps=1", "--config.model.heads=2"]


def run_script(name, *arguments):
    scripts = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "scripts" / name, *map(str, arguments)],
        env=environment() | {"PATH": scripts, "FRACTION": "0.01"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_cifar10(tmp_path):
    folder = tmp_path / "cifar10" / "plain_text"
    folder.mkdir(parents=True)
    names = [f"class {number}" for number in range(10)]
    features = {"img": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    for split, count in (("train", 40), ("test", 20)):
        images = [{"bytes": encoded(noise_image(i, (32, 32))), "path": None} for i in range(count)]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        labels = pa.array(np.arange(count) % 10)
        table = pa.table({"img": pa.array(images, kind), "label": labels})
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        path = folder / f"{split}-00000-of-00001.parquet"
        pq.write_table(table.replace_schema_metadata(metadata), path)
    output = run_script("reproduce_cifar10.sh", tmp_path / "cifar10", tmp_path / "runs", *SMALL)
    assert "finetune" in output
    assert read_summary(tmp_path / "runs" / "pretrain")["steps"] == 20 * (40 // 16)
    for name in ("finetune", "scratch"):
        summary = read_summary(tmp_path / "runs" / name)
        assert summary["steps"] == 40 // 16
        assert 0 <= summary["top1"] <= 1


def test_imagenette(tmp_path):
    for split, count in (("train", 12), ("val", 4)):
        for name in ("n01440764", "n02102040"):
            folder = tmp_path / "imagenette2" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise_image(number, (90, 120)).save(folder / f"{name}_{number}.JPEG")
    workdir = tmp_path / "run"
    run_script("reproduce_imagenette.sh", tmp_path / "imagenette2", workdir, *SMALL)
    assert read_summary(workdir)["steps"] == 2 * (24 // 16)
    results = json.loads((workdir / "evaluate.json").read_text())["results"]
    assert {"k-NN, k = 10", "linear probe"} <= {row["measure"] for row in results}
