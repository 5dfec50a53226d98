"""Errors that a user can fix: the message names the value and the remedy."""

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """Bad input. The entry points print its message and exit with code 2.

    Args:
      problem: what is wrong and what to do about it.
      key: config key with the bad value, as in "mask.ratio"; the message then begins with
        key=value.
      value: the bad value.
    """

    def __init__(self, problem: str, *, key: str | None = None, value: Any = None):
        super().__init__(problem)
        self.problem, self.key, self.value = problem, key, value

    def __str__(self) -> str:
        return self.problem if self.key is None else f"{self.key}={self.value!r} {self.problem}"

    def as_flag(self, flags: Mapping[str, str]) -> str:
        """Return the message with the flag of a command in place of the config key."""
        if self.key is None:
            return self.problem
        if self.key not in flags:
            return str(self)
        value = self.value
        if isinstance(value, tuple | list):
            value = ",".join(map(str, value))
        return f"{flags[self.key]} {value} {self.problem}"
