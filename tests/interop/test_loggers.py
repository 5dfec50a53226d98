"""W&B in offline mode and MLflow with SQLite, through real runs that are killed and resumed."""

import json
import signal

import pytest
from run_helpers import FAST_COMPILATION, lines, run, start, wait_for, write_tiny

wandb = pytest.importorskip("wandb")
mlflow = pytest.importorskip("mlflow")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's SQLAlchemy

NAMES = ("wandb", "mlflow")
BLOCK = 32768  # bytes of a block of a .wandb file, which is a LevelDB log
HEADER = 7  # bytes, of the file and of each chunk: checksum, length and type
FIRST = (1, 2)  # types of chunks that begin a record: the whole of it, or its first part


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a run that was killed when both loggers had its step 12, and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    tiny, workdir = write_tiny(folder / "tiny"), folder / "first"
    flags = ["--config.log.to=jsonl,tensorboard,wandb,mlflow", "--config.log.project=trees"]
    flags += ["--config.resume.allow=steps"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("XLA_FLAGS", FAST_COMPILATION)
        process = start(tiny, workdir, *flags, "--config.steps=1000000")
        wait_for(process, lambda: all(last_sent(workdir, name) >= 12 for name in NAMES))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        (workdir / "killed.json").write_text(json.dumps({n: last_sent(workdir, n) for n in NAMES}))
        last = max(row["step"] for row in lines(workdir))
        run(tiny, workdir, *flags, f"--config.steps={last + 12}")
    return workdir


def last_sent(workdir, name):
    path = workdir / "loggers" / f"{name}.json"
    steps = json.loads(path.read_text())["steps"] if path.exists() else {}
    return steps.get("loss", 0)


def expected(workdir, name):
    return [(row["step"], row[name]) for row in lines(workdir) if name in row]


def missing(steps, workdir, name):
    """Return the steps that were not logged, all of which were on their way at the kill."""
    wanted = [step for step, _ in expected(workdir, name)]
    assert set(steps) <= set(wanted)
    left_out = [step for step in wanted if step not in steps]
    if left_out:
        assert left_out == [step for step in wanted if left_out[0] <= step <= left_out[-1]]
    return left_out


def killed_at(workdir, name):
    """Return the last step that was handed to a logger before the run was killed."""
    return json.loads((workdir / "killed.json").read_text())[name]


def wandb_records(path):
    """Give the records of a .wandb file, parsed by the package's own protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = path.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        size = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        chunk = data[place + HEADER : place + HEADER + size]
        record = chunk if kind in FIRST else record + chunk
        if kind in (1, 4):  # the whole of it, or its last part
            yield Record.FromString(record)
        place += HEADER + size


def wandb_rows(workdir):
    files = sorted((workdir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1, "the same run"
    rows = []
    for path in files:
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                names = [item.key or "/".join(item.nested_key) for item in items]
                rows.append(dict(zip(names, (json.loads(item.value_json) for item in items))))
    return rows


@pytest.mark.parametrize("name", ["loss", "learning_rate", "epoch", "knn_top1"])
def test_wandb_has_every_step_once(workdir, name):
    rows = [(row["step"], row[name]) for row in wandb_rows(workdir) if name in row]
    steps = [step for step, _ in rows]
    assert steps == sorted(set(steps))
    assert max(missing(steps, workdir, name), default=0) <= killed_at(workdir, "wandb")


def test_the_own_step_of_wandb_grows_over_its_files(workdir):
    """Else a server might drop what the resumed run logs, whose own step began at 0."""
    rows = [row for row in wandb_rows(workdir) if "loss" in row]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert all(row["_step"] >= row["step"] for row in rows)


def test_wandb_has_pictures_and_config(workdir):
    pictures = [row for row in wandb_rows(workdir) if "reconstruction/height" in row]
    assert pictures
    assert all(row["step"] > 0 for row in pictures)
    for path in (workdir / "wandb").glob("offline-run-*/*.wandb"):
        updates = [r.config.update for r in wandb_records(path) if r.HasField("config")]
        config = {item.key: item.value_json for update in updates for item in update}
        assert json.loads(config["batch_size"]) == 8


@pytest.fixture(scope="module")
def mlflow_run(workdir):
    """The client of the store beside the workdir, and its only run."""
    client = mlflow.MlflowClient(f"sqlite:///{workdir.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("trees")
    [found] = client.search_runs([experiment.experiment_id])
    return client, found


@pytest.mark.parametrize("name", ["loss", "learning_rate", "epoch", "knn_top1"])
def test_mlflow_has_every_step_once(workdir, mlflow_run, name):
    client, found = mlflow_run
    steps = [metric.step for metric in client.get_metric_history(found.info.run_id, name)]
    assert len(steps) == len(set(steps))
    assert len(missing(steps, workdir, name)) <= 1


def test_mlflow_has_pictures_and_config(mlflow_run):
    client, found = mlflow_run
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.params["batch_size"] == "8"
    pictures = [file.path for file in client.list_artifacts(found.info.run_id, "images")]
    assert any("reconstruction" in path for path in pictures)
    assert client.list_artifacts(found.info.run_id)
