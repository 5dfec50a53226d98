"""Paths at every door: "~" is expanded, and gs:// and the like are refused before any work."""

import argparse
import dataclasses
import importlib
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import ROOT, environment

import mae_jax
from mae_jax.convert import __main__ as convert
from mae_jax.convert import weights
from mae_jax.convert.locate import checkpoint_argument
from mae_jax.data.sources import FileSource
from mae_jax.train.config import Config, from_config_dict
from mae_jax.train.config_schema import Group, to_config_dict
from mae_jax.train.trainer import train_and_evaluate
from mae_jax.utils import cli
from mae_jax.utils.errors import UserError
from mae_jax.utils.paths import expand_path, local_path

ADDRESSES = ["gs://b/run", "s3://b/run", "hdfs://host/run", "az://box/run", "file:///tmp/run"]
ADDRESSES += ["GS://b/run", "abfss://c@a.dfs.core.windows.net/x", "gs:/b/run"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_are_refused_as_text_and_as_path(address):
    scheme = address.split(":")[0]
    for path in (address, Path(address)):
        with pytest.raises(UserError, match=f"{scheme}:// is not supported"):
            local_path(path)


def test_home_directories_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/a home")
    assert expand_path("~") == "/a home"
    assert expand_path("~/runs/x") == "/a home/runs/x"
    assert expand_path("~root/x") == os.path.expanduser("~root/x") != "~root/x"
    for path in ("runs/x", "a:b", "x/gs://y", "C:x", "", "eurosat/all", "cifar10:3.0.2"):
        assert expand_path(path) == path
    with pytest.raises(UserError, match=r"~nobody_here/x: there is no such home directory"):
        expand_path("~nobody_here/x")


@pytest.mark.parametrize("name", ["~/x", "~root/x", "~nobody_here", "gs:/x", "gs://x"])
def test_local_folders_of_such_names_stay_local(name):
    path = expand_path(f"./{name}")
    assert path == os.path.abspath(f"./{name}")
    assert expand_path(Path(path)) == path


# Every module with a parser, and the arguments that select it.
COMMANDS = {
    "mae_jax.convert.__main__": ([], ["inspect"]),
    "mae_jax.convert.export": ([],),
    "mae_jax.convert.push": ([],),
    "mae_jax.data.__main__": ([],),
    "mae_jax.evaluate.__main__": ([],),
    "mae_jax.evaluate.similar": ([],),
    "mae_jax.features": ([],),
    "mae_jax.predict": ([],),
    "mae_jax.reconstruct": ([],),
    "mae_jax.train.compare": ([],),
    "benchmarks.compile": ([],),
    "benchmarks.gpu_sweep": ([],),
    "benchmarks.input_pipeline": ([],),
    "benchmarks.step": ([],),
    "benchmarks.step_report": ([],),
    "scripts.ablations": ([],),
}
# The first takes the name of a command, the second is for maintainers.
NO_PATHS = {"mae_jax.train.commands", "scripts.run_notebook"}
LOCAL_TYPES = (cli.path_argument, cli.path_text)
PATH_TYPES = (*LOCAL_TYPES, cli.dataset_text, checkpoint_argument)
# Flags that take text which is no path.
TEXTS = {
    "help",
    "command",
    "image_feature",
    "mask_feature",
    "train_split",
    "eval_split",
    "suite",
    "split",
    "name",
}
TEXTS |= {"nodata", "bands", "dicom_window"}
TEXTS |= {"only", "step_flags", "target", "xla_flags", "compile_mode"}


class _FoundError(Exception):
    """Raised in place of parsing, with the parser."""


def parsers_of(module: str, arguments: list[str], monkeypatch) -> list[argparse.ArgumentParser]:
    def parse_args(parser, *_: object):
        raise _FoundError(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(_FoundError) as parsed:
        importlib.import_module(module).main(arguments)
    (parser,) = parsed.value.args
    nested = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [parser, *(sub for choices in nested for sub in choices.values())]


@pytest.mark.parametrize(
    ("module", "arguments"), [(name, args) for name, each in COMMANDS.items() for args in each]
)
def test_every_path_of_every_command_is_checked(module, arguments, monkeypatch):
    paths = 0
    for parser in parsers_of(module, arguments, monkeypatch):
        for action in parser._actions:
            assert action.type is not Path, action.dest
            if action.type is None and action.nargs != 0 and not action.choices:
                assert action.dest in TEXTS, f"{action.dest}: a path, or text?"
            if action.type in PATH_TYPES:
                paths += 1
                scheme = "gs" if action.type in LOCAL_TYPES else "az"
                with pytest.raises(argparse.ArgumentError, match=f"{scheme}:// is not supported"):
                    parser._get_value(action, f"{scheme}://b/x")
    assert paths


def test_the_list_of_commands_is_complete():
    folders = ("mae_jax", "benchmarks", "scripts")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    found = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in files
        if ".parse_args(" in file.read_text()
    }
    assert found - NO_PATHS == COMMANDS.keys()


# Config keys of text that are neither paths nor one of some choices.
CONFIG_TEXTS = {
    "nodata",
    "bands",
    "dicom_window",
    "attention",
    "name",
    "image_feature",
    "mask_feature",
    "train_split",
    "eval_split",
    "allow",
}
CONFIG_TEXTS |= {"project", "run_name", "mirror"}


def text_fields(group: Group):
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if isinstance(value, Group):
            yield from text_fields(value)
        elif "str" in str(field.type) and not field.metadata["choices"]:
            yield group, field


@pytest.mark.parametrize(
    ("group", "field"),
    [(g, f) for g, f in text_fields(Config()) if f.name not in CONFIG_TEXTS],
    ids=lambda x: getattr(x, "name", "") or x.prefix,
)
def test_every_path_of_the_config_is_checked(group, field, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    config, name = to_config_dict(Config()), f"{group.prefix}{field.name}"
    remote = field.metadata["remote"] or field.metadata["checkpoint"]
    scheme = "az" if remote else "s3"
    config.update_from_flattened_dict({name: f"{scheme}://b/x"})
    with pytest.raises(UserError, match=f"^{name}: {scheme}://b/x .* {scheme}:// is not supported"):
        from_config_dict(config)
    config.update_from_flattened_dict({name: "~/y"})
    assert operator.attrgetter(name)(from_config_dict(config)) == "/home/x/y"


def test_python_functions_check_paths(tmp_path, monkeypatch, golden):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(golden))
    with pytest.raises(UserError, match="az:// is not supported"):
        mae_jax.load("az://b/model.pth")
    checkpoint = weights.read("~/hf/hf_tiny/pretrained_v5", require_num_heads=())
    with pytest.raises(UserError, match="s3:// is not supported"):
        weights.write(checkpoint, "s3://b/model.safetensors", "mae_jax")
    with pytest.raises(UserError, match="az:// is not supported"):
        FileSource(["az://b/x.png"])
    with pytest.raises(UserError, match="gs:// is not supported"):
        train_and_evaluate(Config(), Path("gs://b/run"))
    with pytest.raises(SystemExit) as exit_:
        convert.main(["~/hf/hf_tiny/pretrained_v5", "gs://b/m", "--to", "mae_jax"])
    assert exit_.value.code == 2
    assert not list(tmp_path.iterdir())


def train(folder, *flags):
    """Run train.py in a folder; return exit code and stderr."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("door", ["--workdir", "--config"])
def test_train_py_refuses_addresses_and_writes_nothing(tmp_path, door):
    flags = {"--config": f"{ROOT}/configs/pretrain.py", "--workdir": "run", door: "gs://b/x"}
    code, error = train(tmp_path, *(f"{flag}={value}" for flag, value in flags.items()))
    assert code == 2
    assert "gs:// is not supported" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())
