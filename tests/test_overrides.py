"""Overrides on the command line: the last of a key counts, None unsets, errors name the key."""

import dataclasses

import pytest
from absl import flags
from ml_collections import config_flags
from run_helpers import ROOT, run, write_tiny

from mae_jax.train import overrides
from mae_jax.train.config import Config, from_config_dict
from mae_jax.train.config_schema import Group
from mae_jax.utils.errors import UserError

# ml_collections imports config files so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")
PRETRAIN = f"--config={ROOT}/configs/pretrain.py:vit_ti16"


def parse(*arguments: str) -> Config:
    """Return the config that train.py gets from these arguments."""
    overrides.register_parsers()
    values = flags.FlagValues()
    argv = ["train.py", *arguments]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(overrides.keep_last_config(argv))
    return from_config_dict(config.value)


@pytest.mark.parametrize(
    ("key", "texts", "value"),
    [
        ("data.mean", ["(0.5,0.5,0.5)", "(0.1,0.2,0.3)"], (0.1, 0.2, 0.3)),
        ("data.mean", ["0.5,0.5,0.5", "[0.1, 0.2, 0.3]"], (0.1, 0.2, 0.3)),
        ("eval.knn_k", ["5", "20"], (20,)),
        ("model.image_size", ["32,32", "48,64"], (48, 64)),
        ("model.patch", ["8", "(4,256)"], (4, 256)),
        ("model.patch", ["4,256", "8"], 8),
        ("data.crop_scale", ["0.2,1.0", "0.5,1"], (0.5, 1.0)),
        ("eval.show_channels", ["2,1,0", "0,1,2"], (0, 1, 2)),
        ("batch_size", ["8", "16"], 16),
        ("data.flip", ["True", "False"], False),
        ("data.path", ["a", "b"], "b"),
        ("optim.clip_norm", ["None", "1"], 1.0),
    ],
    ids=str,
)
def test_an_override_given_twice_replaces(key, texts, value):
    config = parse(PRETRAIN, *(f"--config.{key}={text}" for text in texts))
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value


def test_a_config_file_given_twice_replaces_and_keeps_the_overrides():
    small = f"{ROOT}/configs/small.py:vit_ti16,64"
    config = parse(PRETRAIN, "--config.seed=3", "--config", small, "--config.batch_size=8")
    assert (config.model.image_size, config.seed, config.batch_size) == ((64, 64), 3, 8)


def leaf_keys(group: Group, optional: bool) -> list[str]:
    keys = []
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if isinstance(value, Group):
            keys += leaf_keys(value, optional)
        elif ("None" in str(field.type)) == optional:
            keys.append(f"{group.prefix}{field.name}")
    return keys


@pytest.mark.parametrize("key", leaf_keys(Config(), optional=True))
def test_none_unsets_an_optional_key(key):
    config = parse(PRETRAIN, f"--config.{key}=1", f"--config.{key}=None")
    for name in key.split("."):
        config = getattr(config, name)
    assert config is None


@pytest.mark.parametrize("key", leaf_keys(Config(), optional=False))
def test_none_for_another_key_is_an_error_that_names_it(key):
    with pytest.raises(UserError, match=f"^{key}=None must be "):
        parse(PRETRAIN, f"--config.{key}=None")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=many", "config.batch_size=many: must be an integer, as in 8"),
        ("optim.base_lr=fast", "config.optim.base_lr=fast: must be a number, as in 0.5 or 1e-4"),
        ("data.flip=perhaps", "config.data.flip=perhaps: must be True or False"),
        ("model.image_size=(32,32", "config.model.image_size=.* as in 32,48"),
        ("model={}", "config.model=.* key by key, as in --config.model.width=64"),
        ("model.image_size=big", r"model.image_size=.* must be 2 numbers, as in \(224, 224\)"),
        ("model.image_size=1,2,3", r"model.image_size=.* must be 2 numbers, as in \(224, 224\)"),
        ("data.crop_scale=0.2", r"data.crop_scale=.* must be 2 numbers, as in \(0.2, 1.0\)"),
        ("eval.knn_k=a,b", r"eval.knn_k=.* must be of type int, as in \(10,\)"),
        (
            "eval.show_channels=0,1",
            r"eval.show_channels=.* one or three numbers, as in \(0, 1, 2\)",
        ),
        ("data.mean=0.1,0.2,0.3,0.4", "data.mean=.* a value for each of 3 channels"),
        ("data.std=0.1", "data.std=.* a value for each of 3 channels"),
        ("model.channels=4", "data.mean=.* a value for each of 4 channels"),
    ],
    ids=str,
)
def test_a_wrong_value_is_an_error_that_names_the_key_and_shows_an_example(override, message):
    with pytest.raises((UserError, flags.IllegalFlagValueError), match=message):
        parse(PRETRAIN, f"--config.{override}")


def test_one_channel_takes_the_first_default_statistics_but_no_others():
    gray = parse(PRETRAIN, "--config.model.channels=1")
    assert gray.pixel_stats == ((0.485,), (0.229,))
    with pytest.raises(UserError, match="data.mean=.* a value for each of 1 channels"):
        parse(PRETRAIN, "--config.model.channels=1", "--config.data.mean=0.1,0.2,0.3")


def test_train_py_takes_defaults_and_then_the_arguments_of_a_wrapper(tmp_path):
    """A process: the first --config does not exist, and the size that counts is no grid."""
    config = write_tiny(tmp_path)
    size = ["--config.model.image_size=16,24", "--config.model.image_size=16,20"]
    output = run("nowhere.py", tmp_path / "run", f"--config={config}", *size, code=2)
    assert "error: model.image_size=(16, 20) must be" in output


def test_parts_of_values_are_no_keys():
    for key, problem in (
        ("data.mean.x", "'data.mean.x'; set all of data.mean: --config.data.mean=VALUE"),
        ("data.mean.0", "'data.mean.0'; set all of data.mean: --config.data.mean=VALUE"),
        ("data.mean[0]", "'data.mean[0]'; set all of data.mean: --config.data.mean=VALUE"),
        ("steps.x", "'steps.x'; set all of steps: --config.steps=VALUE"),
        ("data..mean", "'data..mean'"),
        ("", "''"),
    ):
        argv = ["train.py", PRETRAIN, f"--config.{key}=1"]
        assert overrides.explain_bad_key(argv) == f"no such config key: {problem}"
    for key in ("data.mean", "batch_size", "data", "no_such"):
        assert overrides.explain_bad_key(["train.py", PRETRAIN, f"--config.{key}=1"]) is None
