"""Exceptions for faults in the user's input; the tools print their messages."""

from __future__ import annotations


class InputError(ValueError):
    """The user's input does not fit; the message says what was expected and what to change."""

    def __str__(self) -> str:
        """The message alone, where a data loader's process puts its traceback before it."""
        return super().__str__().rpartition(f'{__name__}.{type(self).__name__}: ')[2].rstrip()


class CheckpointError(InputError):
    """A checkpoint that cannot be read, runs code, or belongs to another model."""
