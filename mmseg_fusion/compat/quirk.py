"""The record of a quirk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirk:
    """One third-party quirk that was worked around.

    Attributes:
        name: short name, the name of the function that works around it.
        what: description of the quirk and of the workaround.
        until: the version that makes the quirk unnecessary.
    """

    name: str
    what: str
    until: str
