"""Command-line overrides of config keys: --config.key=value, of which the last of a key counts."""

from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.tuple_parser import TupleParser

from mae_jax.train import recipes
from mae_jax.train.config_schema import INT_OR_TUPLE
from mae_jax.utils.paths import expand_path


class _ValueParser(flags.ArgumentParser):
    """Parses the text of one override; None unsets a key, and config_schema checks whether it may.

    Args:
      parse_text: raises ValueError for text of a wrong type.
      expected: what the text should be, with an example.
    """

    def __init__(self, parse_text: Callable[[str], Any], expected: str):
        super().__init__()
        self._parse_text, self._expected = parse_text, expected

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):  # the value of the recipe
            return argument
        if argument == "None":
            return None
        try:
            return self._parse_text(argument)
        except ValueError:
            raise ValueError(f"must be {self._expected}") from None


def _refuse(text: str) -> None:
    raise ValueError(text)


def _parse_tuple(text: str) -> tuple[Any, ...]:
    """Return the values between commas; names need no quotes, as in jsonl,wandb."""
    names = tuple(name.strip() for name in text.strip("() ").split(","))
    return names if all(map(str.isidentifier, names)) else TupleParser().parse(text)


def _parse_sides(text: str) -> int | tuple[Any, ...]:
    return _parse_tuple(text) if "," in text else flags.IntegerParser().parse(text)


def register_parsers() -> None:
    """Replace the parsers of ml_collections, which append tuples given twice and refuse None."""
    for kind, parse_text, expected in (
        (int, flags.IntegerParser().parse, "an integer, as in 8"),
        (float, flags.FloatParser().parse, "a number, as in 0.5 or 1e-4"),
        (bool, flags.BooleanParser().parse, "True or False"),
        (str, str, "text"),
        (INT_OR_TUPLE, _parse_sides, "an integer or two, height and width, as in 16 or 4,256"),
        (tuple, _parse_tuple, "one or more values with commas between them, as in 32,48"),
        (ConfigDict, _refuse, "set key by key, as in --config.model.width=64: it is a group"),
    ):
        config_flags.register_flag_parser_for_type(kind, _ValueParser(parse_text, expected))


def keep_last_config(argv: list[str]) -> list[str]:
    """Return the arguments with the last --config only, as the path of a file.

    Wrapper scripts give a default before "$@"; ml_collections fails for a config file given twice.

    Raises:
      UserError: it is not a local path, or neither a file nor a recipe.
    """
    config, others, arguments = None, [], iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            config = value if equals else next(arguments, None)
        else:
            others.append(argument)
    if config is None:
        return argv
    config = recipes.find_config(expand_path(config))
    return [*others[:1], f"--config={config}", *others[1:]]


def explain_bad_key(argv: list[str]) -> str | None:
    """Return what is wrong with the first override of a part of a value, or of no name at all."""
    from mae_jax.train.config import Config
    from mae_jax.train.config_schema import declared_keys

    keys = declared_keys(Config())
    names = (argument.partition("=")[0].lstrip("-") for argument in argv)
    for key in (name.removeprefix("config.") for name in names if name.startswith("config.")):
        whole = next((name for name in keys if key.startswith((f"{name}.", f"{name}["))), None)
        if whole:
            return f"no such config key: {key!r}; set all of {whole}: --config.{whole}=VALUE"
        if not all(part.isidentifier() for part in key.split(".")):
            return f"no such config key: {key!r}"
    return None
