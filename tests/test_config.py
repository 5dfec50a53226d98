"""Every key can be overridden, and bad values end in one clear sentence."""

import ast
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common, demo, pretrain
from mae_jax.checkpoint import flatten
from mae_jax.data.sources import DataError
from mae_jax.experiment import FREE, ConfigError, build
from mae_jax.sizes import SIZES

CONFIGS = Path(common.__file__).parent


def keys_and_values():
    return flatten(common.base().to_dict()).items()


@pytest.mark.parametrize(("key", "value"), keys_and_values(), ids=lambda x: str(x))
def test_every_key_can_be_overridden(key, value):
    config = common.base()
    config.lock()
    change = {
        bool: lambda v: not v,
        int: lambda v: v + 1,
        float: lambda v: v + 0.5,
        str: lambda v: v + "x",
        tuple: lambda v: tuple(x + 1 for x in v),
        type(None): lambda v: type_of(config, key)(3),  # None stands for a value of some type
    }
    new = change[type(value)](value)
    config.update_from_flattened_dict({key: new})
    assert flatten(config.to_dict())[key] == new


def type_of(config: ConfigDict, key: str) -> type:
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    return config.get_type(last)


def test_recipes_add_no_key_of_their_own():
    known = flatten(common.base().to_dict()).keys()
    for config in (demo.get_config(), *(pretrain.get_config(size) for size in SIZES)):
        assert flatten(config.to_dict()).keys() == known


def test_an_unknown_key_is_refused_with_the_closest_one():
    config = common.base()
    config.lock()
    with pytest.raises((AttributeError, KeyError), match="base_lr"):
        config.optim.base_lrr = 1.0


def test_free_keys_exist():
    known = flatten(common.base().to_dict())
    for free in FREE:
        assert free in known or any(key.startswith(free) for key in known if free.endswith("."))


def test_configs_say_how_they_are_run():
    for path in CONFIGS.glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if path.name not in ("__init__.py", "common.py"):
            assert "train.py" in text or "make demo" in text, path


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    for i in range(8):
        Image.fromarray(np.full((20, 20, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def config_of(folder, **overrides) -> ConfigDict:
    config = demo.get_config()
    config.batch_size = 8
    config.data.update(source="folder", path=str(folder))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def test_a_folder_without_labels_has_no_knn(folder):
    run = build(config_of(folder), folder / "run")
    assert run.knn is None
    assert len(run.train_source) == 8
    assert run.duration.total_steps == 1000


def test_epochs_and_steps(folder):
    run = build(
        config_of(
            folder, steps=None, epochs=30.0, optim__warmup_steps=None, optim__warmup_epochs=2.5
        ),
        folder / "run",
    )
    assert run.duration.total_steps == 30
    assert run.duration.warmup_steps == 2.5
    assert float(run.learning_rate(30)) == 0.0
    assert float(run.learning_rate(2.5)) == pytest.approx(4e-3 * 8 / 256)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(model__image_size=(64, 60)), r"60 = 7 \* 8 \+ 4. Use 56 or 64"),
        (dict(mask__ratio=0.99), "keeps 0 of 64 patches"),
        (dict(mask__ratio=0.0), "mask.ratio=0.0 keeps 64"),
        (dict(mask__kind="stripes"), "mask.kind='stripes'; use one of random, block, grid, user"),
        (dict(mask__kind="grid", mask__ratio=0.5), "one of each 2x2"),
        (dict(mask__kind="user"), "mask.path"),
        (dict(mask__path="/nowhere.npy", mask__kind="user"), "/nowhere.npy.* cannot be read"),
        (dict(batch_size=6), "batch_size=6 .*4 devices. Use 4 or 8"),
        (dict(batch_size=8, accumulate=3), "accumulate=3"),
        (dict(model__dtype="float16"), "model.dtype='float16'"),
        (dict(model__channels=4), "model.channels=4"),
        (dict(model__heads=5), "model.width=128"),
        (dict(model__remat="some"), "model.remat='some'"),
        (dict(data__on_bad="ignore"), "data.on_bad='ignore'"),
        (dict(task="classify"), "task='classify'"),
        (dict(steps=50), "must be shorter than the whole run"),
        (dict(mesh__fsdp=3), "mesh.fsdp=3"),
        (dict(eval__stats="mine"), "eval.stats='mine'"),
        (dict(data__crop_scale=(0.5, 0.2)), "data.crop_scale"),
        (dict(log__every_steps=0), "log.every_steps=0"),
        (dict(checkpoint__every_steps=0), "checkpoint.every_steps=0"),
        (dict(eval__pictures=0), "eval.pictures=0"),
    ],
    ids=str,
)
def test_bad_values(folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(config_of(folder, **overrides), folder / "run")
    assert not (folder / "run").exists()


def test_bad_data(folder):
    with pytest.raises(DataError, match="nowhere"):
        build(config_of(folder / "nowhere"), folder / "run")
    with pytest.raises(DataError, match="batch_size=16 is larger than the data set of 8"):
        build(config_of(folder, batch_size=16), folder / "run")
