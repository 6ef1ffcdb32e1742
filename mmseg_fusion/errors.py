"""What is wrong with something that the user gave, as exceptions that the tools print."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave does not fit; the message says what was expected and what to change."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read, runs code, or belongs to another model."""
