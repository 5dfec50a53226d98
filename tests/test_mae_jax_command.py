"""The command mae-jax: its subcommands, names in usage and errors, recipes, shell completion."""

import subprocess
import sys

import pytest

import mae_jax
from mae_jax.data.demo_dataset import photograph
from mae_jax.train import __main__ as train_command
from mae_jax.train import commands, recipes
from mae_jax.utils.errors import UserError


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run mae-jax in a new process, whose last line of output says whether it imported jax."""
    code = "import atexit, sys; atexit.register(lambda: print('jax' in sys.modules)); "
    code += "from mae_jax.train.commands import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_help_has_a_line_per_subcommand_and_does_not_import_jax():
    done = call("--help")
    assert done.returncode == 0
    for name, command in commands.COMMANDS.items():
        assert name in done.stdout
        assert command.help in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "required: SUBCOMMAND"), (["trian"], "invalid choice: 'trian'")],
)
def test_an_unknown_subcommand_is_an_error(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["mae-jax", *arguments])
    with pytest.raises(SystemExit, match="2"):
        commands.main()
    assert message in capsys.readouterr().err


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mae-jax", "--version"])
    with pytest.raises(SystemExit, match="0"):
        commands.main()
    assert mae_jax.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_usage_names_what_was_typed(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mae-jax", name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        commands.main()
    assert f"usage: mae-jax {name} " in capsys.readouterr().out


def test_the_demo_is_train_with_a_recipe_and_a_workdir(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mae-jax", "demo", "--config.steps=9"])
    monkeypatch.setattr(train_command, "run", lambda: print(*sys.argv))
    commands.main()
    expected = "mae-jax demo --config=demo --workdir=runs/demo --config.steps=9\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_subcommands_flags_keys_and_recipes(shell, capsys):
    commands.print_completion([shell])
    script = capsys.readouterr().out
    for word in ("reconstruct", "checkpoint", "config.mask.ratio", "pretrain", "prepare"):
        assert word in script


@pytest.mark.parametrize("name", [name for name in recipes.names() if name != "ablations"])
def test_recipes_are_found_by_name(name):
    assert recipes.find_config(f"{name}:x").endswith(f"configs/{name}.py:x")
    assert recipes.get(name).batch_size


def test_a_file_of_the_user_wins_over_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain").mkdir()  # a folder is no config file
    assert recipes.find_config("pretrain").endswith("configs/pretrain.py")
    (tmp_path / "mine.py").touch()
    assert recipes.find_config("mine.py:a:b") == "mine.py:a:b"


def test_neither_a_file_nor_a_recipe_is_an_error_that_lists_the_recipes():
    with pytest.raises(UserError, match=r"nope.py is neither a file .* linprobe, pixio, pretrain"):
        recipes.find_config("nope.py:vit_b16")


def test_the_demo_without_its_photographs_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib scikit-image scikit-learn"):
        photograph("astronaut")
