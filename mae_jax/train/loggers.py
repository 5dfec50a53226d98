"""Loggers: TensorBoard, W&B (Weights & Biases, wandb) and MLflow.

A logger gets the config of a run when it is made, then scalars and pictures. To add one, write a
class with the methods of `Logger`, add it to `LOGGERS`, and its package to pyproject.toml.
"""

import importlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import flatten

log = logging.getLogger("mae_jax.run")

TIMEOUT_S = 30  # seconds for the server of W&B to answer, and for the last upload
SECRETS = re.compile("KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)  # in names of environment variables
MIN_SECRET = 8  # characters; shorter values are words such as "true"


@dataclass(frozen=True)
class RunInfo:
    """What loggers show of a run.

    Args:
      project: W&B project, MLflow experiment; name: of the run.
      config: nested dict of values, as in config.json.
      id: letters and digits that name the run; the same when it is resumed.
    """

    workdir: Path
    project: str = "mae_jax"
    name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


class Logger(Protocol):
    """Shows a run that starts, or resumes, after a step.

    All methods may raise and take any time: `BackgroundLogger` calls them.
    """

    purges: ClassVar[bool]  # whether a new object drops what earlier ones got after its step

    def __init__(self, run: RunInfo, step: int): ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name."""
        ...

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a uint8 [h, w, 3] image."""
        ...

    def close(self) -> None:
        """Finish what is pending."""
        ...


class TensorBoard:
    """Event files in WORKDIR/tensorboard."""

    purges: ClassVar[bool] = True

    def __init__(self, run: RunInfo, step: int):
        from tensorboardX import SummaryWriter  # not for commands that only read configs

        folder = os.fspath(run.workdir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=step + 1)
        text = json.dumps(run.config, indent=2).replace("\n", "\n    ")  # a block of Markdown
        self._writer.add_text("config", f"    {text}", step)
        self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers to disk."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an image to disk."""
        self._writer.add_image(name, image, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, with its files in WORKDIR/wandb.

    Without an API key or a server that answers, they stay there for `wandb sync`.
    """

    purges: ClassVar[bool] = False

    def __init__(self, run: RunInfo, step: int):
        import wandb  # pyright: ignore[reportMissingImports]

        del step
        self._image = wandb.Image

        def init(mode: Any) -> Any:
            return wandb.init(
                project=run.project,
                name=run.name,
                id=run.id,
                resume="allow",
                dir=run.workdir,
                mode=mode,
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    init_timeout=TIMEOUT_S,
                    finish_timeout=TIMEOUT_S,
                    x_transaction_log_flush_interval=1.0,  # seconds that a crash may lose
                ),
            )

        try:
            mode = os.environ.get("WANDB_MODE")
            self._run = init(mode or (None if wandb.login(prompt=False) else "offline"))
        except wandb.errors.CommError as error:
            log.warning("W&B cannot be reached (%s)", describe(error))
            self._run = init("offline")
        self._run.define_metric("*", step_metric="step")  # W&B's own also grows after a rollback
        self._run.config.update(dict(run.config), allow_val_change=True)
        if self._run.offline:
            files = run.workdir / "wandb" / "offline-run-*"
            log.info("W&B is offline: wandb sync %s uploads the run", files)
        else:
            log.info("W&B: %s", self._run.url)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hand numbers to the process that uploads them."""
        self._log(step, values)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Hand an image to the process that uploads it."""
        self._log(step, {name: self._image(image)})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        # W&B's own step must grow, also over the files of an offline run that was resumed.
        own = max(step, self._run.step)
        self._run.log({"step": step, **values}, step=own, commit=True)

    def close(self) -> None:
        """Wait for the uploads."""
        self._run.finish()


class MLflow:
    """A run of MLflow at MLFLOW_TRACKING_URI, by default in mlflow.db beside the workdir."""

    purges: ClassVar[bool] = False
    _MAX_PARAMS = 100  # per request

    def __init__(self, run: RunInfo, step: int):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        del step
        self._metric = Metric
        folder = run.workdir.absolute().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(uri or f"sqlite:///{folder / 'mlflow.db'}")
        experiment = self._client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else None
        if number is None:  # by default, artifacts go to the current folder
            number = self._client.create_experiment(
                run.project, None if uri else (folder / "mlruns").as_uri()
            )
        found = self._client.search_runs([number], f"tags.`mae_jax.id` = '{run.id}'")
        tags = {"mae_jax.id": run.id}
        self._run = found[0] if found else self._client.create_run(number, None, tags, run.name)
        self._id = self._run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self._client.log_dict(self._id, dict(run.config), "config.json")
        known = self._run.data.params  # MLflow refuses other values of these
        params = [
            Param(name, str(value))
            for name, value in flatten(run.config, sep=".").items()
            if name not in known
        ]
        for begin in range(0, len(params), self._MAX_PARAMS):
            self._client.log_batch(self._id, params=params[begin : begin + self._MAX_PARAMS])
        log.info("MLflow: run %s of experiment %s", self._id, run.project)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers in one request."""
        now = round(time.time() * 1000)
        metrics = [self._metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Send an image."""
        self._client.log_image(self._id, image, key=name, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
NAMES = ("jsonl", *LOGGERS)


def import_packages(names: Sequence[str]) -> None:
    """Import the packages of loggers; raise UserError if one is not installed.

    In the main thread: on Python 3.11, imports in several threads may fail (CPython issue 106905).
    """
    for name in ("wandb", "mlflow"):
        if name in names:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                problem = f"needs {error.name}, which is not installed"
                remedy = f"pip install 'mae_jax[{name}]'"
                raise UserError(f"{problem}: {remedy}", key="log.to", value=tuple(names)) from error


def describe(error: BaseException) -> str:
    """Return type and first line of an error, without passwords and keys."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    for name, value in os.environ.items():
        if SECRETS.search(name) and len(value) >= MIN_SECRET:
            text = text.replace(value, "***")
    return text
