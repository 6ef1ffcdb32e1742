"""What is wrong with something that the user gave, as exceptions that the tools print."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave does not fit; the message says what was expected and what to change."""

    def __str__(self) -> str:
        """The message alone, where a data loader's process puts its traceback before it."""
        return super().__str__().rpartition(f'{__name__}.{type(self).__name__}: ')[2].rstrip()


class CheckpointError(InputError):
    """A checkpoint that cannot be read, runs code, or belongs to another model."""
